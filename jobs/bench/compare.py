"""Compare our job with its peers: speed, memory and CPU time of whole commands on the same images.

    python jobs/bench/compare.py
    python jobs/bench/compare.py --images photos/ --model resnet18 null --json figures.json --chart rates.png

Each command runs on a small and on a large archive, in turn. The marginal rate (more images / more seconds) is the rate
of a long run; the start-up is the rest of the time. Memory and core-seconds are those of all processes of a command.
Weights are random. Networks and images are the same for all, and each command has at most one GPU. A run with the
network `null`, which computes nothing, costs what everything but the network costs. Without --images the archives are
drawn. On two cores --form standard takes half an hour, long some hours, quick minutes; quick only shows that everything
runs.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.bench.harness import archives, command, machine, roofline, s3, show
from jobs.bench.harness.archives import CASES, PHOTOS, Archive, Case
from jobs.bench.harness.contest import CHECKOUT, OURS, PEERS, contest, our_name, why_left_out
from jobs.bench.harness.programme import FORMS, NULL, Entry
from jobs.bench.harness.record import Outcome
from pipeline.errors import SettingRefused

FIDELITY_IMAGES = 100


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--form", choices=FORMS, default="standard", help="default: standard")
    flags.add_argument("--images", metavar="FOLDER", type=Path, help="your own JPEGs and PNGs (default: drawn)")
    flags.add_argument("--model", metavar="NAME", nargs="+", default=[], help="default: resnet18 or null, by case")
    flags.add_argument("--cases", metavar="CASE,…", help=f"of {', '.join(CASES)} (default: by form)")
    flags.add_argument("--small", metavar="N", type=int, help="images of the small archive (default: by case)")
    flags.add_argument("--large", metavar="N", type=int, help="images of the large archive (default: by case)")
    flags.add_argument("--rounds", metavar="N", type=int, help="the figures are medians of these (default: by form)")
    flags.add_argument(
        "--peers", metavar="PEER,…", default=",".join(PEERS), help=f"of {', '.join(PEERS)} (default: all)"
    )
    flags.add_argument(
        "--checkout", metavar="FOLDER", type=Path, help="another checkout of Nightshift, to compare two versions of it"
    )
    flags.add_argument(
        "--batch-size", metavar="N", type=int, help="of the peers (default: as ours, 64, or 256 on a GPU)"
    )
    flags.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    flags.add_argument("--chart", metavar="FILE", type=Path, help="write a bar chart of the marginal rates, as PNG")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return command.guarded(lambda: Benchmark.of(options).run())


@dataclass
class Benchmark:
    """The settings of one benchmark, and its results so far.

    trains: also train a network, and count how often the default settings change its answers.
    """

    cases: dict[str, Case]
    entries: list[Entry]
    peers: list[str]
    rounds: int
    peer_batch_size: int | None
    json: Path | None
    chart: Path | None
    trains: bool = False
    console: Console = field(default_factory=show.console)
    machine: dict[str, Any] = field(default_factory=machine.describe)
    peak_gflops: dict[str, float] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    fidelity: list[dict[str, Any]] = field(default_factory=list)
    agreement: dict[str, Any] | None = None
    left_out: list[str] = field(default_factory=list)

    @staticmethod
    def of(options: argparse.Namespace) -> "Benchmark":
        """Check the flags. Raises SettingRefused and InputRefused."""
        form = FORMS[options.form]
        cases = _cases(options.images)
        chosen = (
            _chosen("--cases", options.cases, cases)
            if options.cases
            else [name for name in form.models if name in cases]
        )
        entries = form.entries(chosen, options.model, options.small, options.large)
        rounds = form.rounds if options.rounds is None else options.rounds
        for flag, value in (("--rounds", rounds), ("--batch-size", options.batch_size)):
            if value is not None and value < 1:
                raise SettingRefused(f"{flag} is {value}: it must be at least 1")
        for entry in entries:
            if not 2 <= entry.small < entry.large:
                raise SettingRefused(
                    f"{entry.case}: --small is {entry.small} and --large is {entry.large}: "
                    "--small must be at least 2, and --large larger"
                )
        if any(cases[entry.case].on_s3 for entry in entries):
            s3.rclone()
        for path in (options.json, options.chart):
            command.check_writable(path)
        if options.form == "quick":
            command.say("--form quick: the figures show that everything runs, not how fast it is")
        peers = _chosen("--peers", options.peers, PEERS) if options.peers else []
        if options.checkout:
            if not (options.checkout / "jobs" / "embed.py").is_file():
                raise SettingRefused(f"--checkout {options.checkout} is not a checkout of Nightshift")
            peers.append(f"{CHECKOUT}{options.checkout.resolve()}")
        trains = options.form != "quick" and any(entry.model != NULL for entry in entries)
        return Benchmark(cases, entries, peers, rounds, options.batch_size, options.json, options.chart, trains)

    def run(self) -> int:
        self._print(show.machine_line(self.machine))
        self._print(show.versions_line(self.machine))
        self.peak_gflops = roofline.peaks()
        self._print(show.peak_line(self.peak_gflops))
        for entry in self.entries:
            command.say(f"{entry.case}: making archives of {entry.small:,} and {entry.large:,} images")
            with archives.temporary(self.cases[entry.case], entry.small, entry.large) as (small, large):
                self._compare(entry, small, large)
            self._save()
        if self.trains:
            command.say("fidelity: training a network")
            self.agreement = _agreement()
            self._print(show.agreement_line(self.agreement))
            self._save()
        if any(outcome.model == NULL for outcome in self.outcomes):
            self.console.print(show.cpu_table(self.outcomes))
        return 0

    def _compare(self, entry: Entry, small: Archive, large: Archive) -> None:
        """Run the contestants that can take part, then our stages alone, then measure our fidelity."""
        case, model = entry.case, entry.model
        results = contest(
            self._names(model, small), model, small, large, self.rounds, self.peer_batch_size, command.say
        )
        ours = results[OURS]
        command.say(f"{case}, {model}: the stages alone")
        rows_per_part = max(1, large.images // max(1, ours.large_files))
        cores, is_real = self.machine["cores"], model != NULL
        alone = roofline.measure(small, our_name(model), rows_per_part, cores, ours.compiled_share, is_real)
        outcome = Outcome(case, self.cases[case].description, model, results, alone)
        self.outcomes.append(outcome)
        self.console.print(show.contest_table(outcome))
        self._print(show.memory_line(outcome))
        self.console.print(show.roofline_table(outcome))
        self._print(show.roofline_line(outcome))
        if alone.networks:
            self.console.print(show.network_table(outcome, alone.networks, self.peak_gflops))
            self._print(show.network_line(outcome, alone.networks, self.peak_gflops))
            if not (small.in_tars or small.on_s3):
                self.fidelity.append({"case": case, "model": model, **_fidelity(small, model)})
                self._print(show.fidelity_line(self.fidelity[-1]))

    def _names(self, model: str, archive: Archive) -> list[str]:
        """Contestants that can take part. Print why the others cannot."""
        reasons = {peer: why_left_out(peer, model, archive.in_tars, archive.on_s3) for peer in self.peers}
        for why in filter(None, reasons.values()):
            if why not in self.left_out:
                self.left_out.append(why)
                self._print(why)
        return [OURS, *(peer for peer in self.peers if not reasons[peer])]

    def _save(self) -> None:
        """Write all results so far, so that an interrupted benchmark loses little."""
        if self.json:
            record = {
                "machine": {**self.machine, "peak_gflops": self.peak_gflops},
                "settings": {"rounds": self.rounds, "peer_batch_size": self.peer_batch_size},
                "outcomes": [outcome.as_json() for outcome in self.outcomes],
                "fidelity": self.fidelity,
                "agreement": self.agreement,
                "left_out": self.left_out,
            }
            self.json.write_text(json.dumps(record, indent=1) + "\n")
        if self.chart:
            from jobs.bench.harness import chart  # needs matplotlib, which is only in the extra `bench`

            chart.draw(self.outcomes, show.machine_line(self.machine), self.chart)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _fidelity(archive: Archive, model: str) -> dict[str, Any]:
    """Error in spread of the default settings, against the float32 reference; see jobs/bench/fidelity.py."""
    from jobs.bench import fidelity  # imports torch

    paths = sorted(archive.folder.iterdir())[:FIDELITY_IMAGES]
    embeddings = fidelity.embeddings(paths, model, "random", "auto")
    compared = fidelity.compare(embeddings, fidelity.reference(paths, model, "random"))
    return {"images": len(paths), "median": compared.median, "worst": compared.worst}


def _agreement() -> dict[str, Any]:
    """Share of images for which the default settings give the reference's class; see jobs/bench/fidelity.py."""
    from jobs.bench import fidelity

    return asdict(fidelity.defaults_agreement())


def _cases(folder: Path | None) -> dict[str, Case]:
    """All cases; with a folder of images only those of photos, with these images instead."""
    if folder is None:
        return dict(CASES)
    images = archives.own(folder)
    return {name: replace(case, images=images) for name, case in CASES.items() if case.images is PHOTOS}


def _chosen(flag: str, names: str, known: Mapping[str, object]) -> list[str]:
    """Split a list at its commas, and drop repetitions."""
    chosen = list(dict.fromkeys(names.split(",")))
    if not set(chosen) <= set(known):
        raise SettingRefused(f"{flag} is {names!r}: it must be one or more of {','.join(known)}")
    return chosen


if __name__ == "__main__":
    command.exit_on_signals()
    sys.exit(main())
