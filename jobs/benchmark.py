"""Our job and its peers side by side: whole commands on the same images, their speed, memory and CPU time.

    python jobs/benchmark.py
    python jobs/benchmark.py --images photos/ --model resnet18 null --json figures.json --chart rates.png

Each command runs on a small and on a large archive, in turn. Marginal images/s (more images / more seconds) are what a
long run sees, start-up what is left. Memory and core-seconds are those of all processes of a command. Weights are
random, networks and images the same for all, and of several GPUs everyone has one. The network `null` does nothing:
what a run costs then is the cost of everything else. Without --images the archives are drawn. --form standard takes
half an hour on two cores, long some hours, quick minutes: it only shows that everything runs.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.bench import archives, command, machine, roofline, s3, show
from jobs.bench.archives import CASES, PHOTOS, Archive, Case
from jobs.bench.contest import OURS, PEERS, contest, left_out, our_name
from jobs.bench.programme import FORMS, NULL, Entry
from jobs.bench.record import Outcome
from pipeline.errors import SettingRefused

FIDELITY_IMAGES = 100


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--form", choices=FORMS, default="standard", help="how much of it (default: standard)")
    made.add_argument("--images", metavar="FOLDER", type=Path, help="JPEGs and PNGs of your own (default: drawn)")
    made.add_argument("--model", metavar="NAME", nargs="+", default=[], help="default: resnet18 and null, by case")
    made.add_argument("--cases", metavar="CASE,…", help=f"of {', '.join(CASES)} (default: by form)")
    made.add_argument("--small", metavar="N", type=int, help="images of the small archive (default: by case)")
    made.add_argument("--large", metavar="N", type=int, help="images of the large archive (default: by case)")
    made.add_argument("--rounds", metavar="N", type=int, help="medians of so many (default: by form)")
    made.add_argument(
        "--peers", metavar="PEER,…", default=",".join(PEERS), help=f"of {', '.join(PEERS)} (default: all)"
    )
    made.add_argument(
        "--batch-size", metavar="N", type=int, help="of the peers (default: as ours, 64, and 256 where there is a GPU)"
    )
    made.add_argument("--json", metavar="FILE", type=Path, help="write every figure")
    made.add_argument("--chart", metavar="FILE", type=Path, help="write a bar chart of the marginal rates, as PNG")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return command.guarded(lambda: Benchmark.of(given).run())


@dataclass
class Benchmark:
    """One benchmark, as the flags ask for it, and what it has found so far.

    trains: also asks a network that has learned something whether the speed turns its answers.
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
    def of(given: argparse.Namespace) -> "Benchmark":
        """Raises SettingRefused and InputRefused, before any work."""
        form = FORMS[given.form]
        cases = _cases(given.images)
        chosen = (
            _chosen("--cases", given.cases, cases) if given.cases else [name for name in form.models if name in cases]
        )
        entries = form.entries(chosen, given.model, given.small, given.large)
        rounds = form.rounds if given.rounds is None else given.rounds
        for flag, value in (("--rounds", rounds), ("--batch-size", given.batch_size)):
            if value is not None and value < 1:
                raise SettingRefused(f"{flag} is {value}: it must be at least 1")
        for entry in entries:
            if not 2 <= entry.small < entry.large:
                raise SettingRefused(
                    f"{entry.case}: --small is {entry.small} and --large is {entry.large}: "
                    "--small must be 2 or more, --large larger"
                )
        if any(cases[entry.case].on_s3 for entry in entries):
            s3.rclone()
        for path in (given.json, given.chart):
            command.check_writable(path)
        if given.form == "quick":
            command.say("--form quick: the numbers show that it runs here, not how fast anything is")
        peers = _chosen("--peers", given.peers, PEERS) if given.peers else []
        trains = given.form != "quick" and any(entry.model != NULL for entry in entries)
        return Benchmark(cases, entries, peers, rounds, given.batch_size, given.json, given.chart, trains)

    def run(self) -> int:
        self._print(show.machine_line(self.machine))
        self._print(show.versions_line(self.machine))
        self.peak_gflops = roofline.peaks()
        self._print(show.peak_line(self.peak_gflops))
        for entry in self.entries:
            command.say(f"{entry.case}: making archives of {entry.small:,} and {entry.large:,} images")
            with archives.made(self.cases[entry.case], entry.small, entry.large) as (small, large):
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
        """All contestants that can take part, then our stages alone, then what the speed costs in truth."""
        case, model = entry.case, entry.model
        results = contest(
            self._names(model, small), model, small, large, self.rounds, self.peer_batch_size, command.say
        )
        ours = results[OURS]
        command.say(f"{case}, {model}: the stages alone")
        rows_per_part = max(1, large.images // max(1, ours.large_files))
        cores, is_real = self.machine["cores"], model != NULL
        alone = roofline.measure(small, our_name(model), rows_per_part, cores, ours.compiled_share, is_real)
        outcome = Outcome(case, self.cases[case].what, model, results, alone)
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
        """Who can take part; of the others it is said why not."""
        reasons = {peer: left_out(peer, model, archive.in_tars, archive.on_s3) for peer in self.peers}
        for why in filter(None, reasons.values()):
            if why not in self.left_out:
                self.left_out.append(why)
                self._print(why)
        return [OURS, *(peer for peer in self.peers if not reasons[peer])]

    def _save(self) -> None:
        """Everything found so far, so that a stop loses little."""
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
            from jobs.bench import chart  # matplotlib is no part of what the jobs need

            chart.draw(self.outcomes, show.machine_line(self.machine), self.chart)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _fidelity(archive: Archive, model: str) -> dict[str, Any]:
    """Error in spread of the default settings against the float32 reference; see jobs/fidelity.py."""
    from jobs import fidelity  # imports torch, which nothing else here needs

    paths = sorted(archive.folder.iterdir())[:FIDELITY_IMAGES]
    found = fidelity.embeddings(paths, model, "random", "auto")
    compared = fidelity.compare(found, fidelity.reference(paths, model, "random"))
    return {"images": len(paths), "median": compared.median, "worst": compared.worst}


def _agreement() -> dict[str, Any]:
    """For how many images the default settings name the reference's class; see jobs/fidelity.py."""
    from jobs import fidelity

    return asdict(fidelity.defaults_agreement())


def _cases(own: Path | None) -> dict[str, Case]:
    """All cases; with images of one's own, those that hold photos hold them instead."""
    if own is None:
        return dict(CASES)
    images = archives.own(own)
    return {name: replace(case, images=images) for name, case in CASES.items() if case.images is PHOTOS}


def _chosen(flag: str, names: str, known: Mapping[str, object]) -> list[str]:
    """The names of a list with commas, each once."""
    chosen = list(dict.fromkeys(names.split(",")))
    if not set(chosen) <= set(known):
        raise SettingRefused(f"{flag} is {names!r}: it is one or more of {','.join(known)}")
    return chosen


if __name__ == "__main__":
    command.leave_on_signals()
    sys.exit(main())
