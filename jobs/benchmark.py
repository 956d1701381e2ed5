"""Our job and its peers side by side: whole commands on the same images, their speed, memory and CPU time.

    python jobs/benchmark.py
    python jobs/benchmark.py --images photos/ --model resnet18 resnet50 --json figures.json --chart rates.png

Each command runs on a small and on a large archive, in turn, several rounds. Marginal images/s (more images / more
seconds) are what a long run sees, start-up what is left. Memory and core-seconds are those of all processes of a
command. Weights are random, networks and images the same for all. Without --images the archives are drawn.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.bench import archives, machine, roofline, show
from jobs.bench.archives import CASES, Archive, Case
from jobs.bench.contest import OURS, PEERS, contest, left_out
from jobs.bench.measure import CommandFailed
from jobs.bench.record import Outcome
from pipeline import cli
from pipeline.errors import SettingRefused, printable

QUICK = {"photos": (32, 96), "tiles": (64, 192), "large": (4, 12)}
FIDELITY_IMAGES = 100


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--images", metavar="FOLDER", type=Path, help="JPEGs and PNGs of your own (default: drawn)")
    made.add_argument("--model", metavar="NAME", nargs="+", default=["resnet18"], help="default: resnet18")
    made.add_argument(
        "--cases", metavar="CASE,…", default=",".join(CASES), help=f"of {', '.join(CASES)} (default: all)"
    )
    made.add_argument("--small", metavar="N", type=int, help="images of the small archive (default: by case)")
    made.add_argument("--large", metavar="N", type=int, help="images of the large archive (default: by case)")
    made.add_argument("--rounds", metavar="N", type=int, help="default: 3")
    made.add_argument(
        "--peers", metavar="PEER,…", default=",".join(PEERS), help=f"of {', '.join(PEERS)} (default: all)"
    )
    made.add_argument("--batch-size", metavar="N", type=int, default=64, help="of the peers (default: 64, as ours)")
    made.add_argument("--quick", action="store_true", help="tiny archives, one round: does it run here?")
    made.add_argument("--json", metavar="FILE", type=Path, help="write every figure")
    made.add_argument("--chart", metavar="FILE", type=Path, help="write a bar chart of the marginal rates, as PNG")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)

    def work() -> int:
        try:
            return Benchmark.of(given).run()
        except CommandFailed as error:
            for line in error.output.splitlines():
                _say(f"  {printable(line)}")
            raise

    return cli.guarded(work)


@dataclass
class Benchmark:
    """One benchmark, as the flags ask for it, and what it has found so far."""

    cases: dict[str, Case]
    sizes: dict[str, tuple[int, int]]
    models: list[str]
    peers: list[str]
    rounds: int
    peer_batch_size: int
    json: Path | None
    chart: Path | None
    console: Console = field(default_factory=show.console)
    machine: dict[str, Any] = field(default_factory=machine.describe)
    outcomes: list[Outcome] = field(default_factory=list)
    fidelity: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @staticmethod
    def of(given: argparse.Namespace) -> "Benchmark":
        """Raises SettingRefused and InputRefused, before any work."""
        if given.images:
            cases = {"photos": archives.own_images(given.images)}
        else:
            cases = {name: CASES[name] for name in _chosen("--cases", given.cases, CASES)}
        rounds = (1 if given.quick else 3) if given.rounds is None else given.rounds
        for flag, value in (("--rounds", rounds), ("--batch-size", given.batch_size)):
            if value < 1:
                raise SettingRefused(f"{flag} is {value}: it must be at least 1")
        for path in (given.json, given.chart):
            if path and not path.absolute().parent.is_dir():
                raise SettingRefused(f"{path} cannot be written: there is no folder {path.parent}")
        if given.quick:
            _say("--quick: the numbers show that it runs here, not how fast anything is")
        sizes = {name: _sizes(given, name, case) for name, case in cases.items()}
        peers = _chosen("--peers", given.peers, PEERS) if given.peers else []
        return Benchmark(cases, sizes, given.model, peers, rounds, given.batch_size, given.json, given.chart)

    def run(self) -> int:
        self._print(show.machine_line(self.machine))
        self._print(show.versions_line(self.machine))
        for name, case in self.cases.items():
            with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
                _say(f"{name}: making archives of {self.sizes[name][0]:,} and {self.sizes[name][1]:,} images")
                pair = archives.make(case, Path(folder), *self.sizes[name])
                for model in self.models:
                    self._compare(name, model, *pair)
                    self._save()
        return 0

    def _compare(self, name: str, model: str, small: Archive, large: Archive) -> None:
        """All contestants that can take part, then our stages alone, then what the speed costs in truth."""
        results = contest(self._names(model, small), model, small, large, self.rounds, self.peer_batch_size, _say)
        _say(f"{name}: the stages alone")
        rows_per_part = max(1, large.images // max(1, results[OURS].large_files))
        alone = roofline.measure(small.folder, model, rows_per_part, self.machine["cores"])
        outcome = Outcome(name, self.cases[name].what, model, results, alone)
        self.outcomes.append(outcome)
        self.console.print(show.contest_table(outcome))
        self.console.print(show.roofline_table(outcome))
        self._print(show.roofline_line(outcome))
        if not small.in_tars:
            self.fidelity.append({"case": name, "model": model, **_fidelity(small, model)})
            self._print(show.fidelity_line(self.fidelity[-1]))

    def _names(self, model: str, archive: Archive) -> list[str]:
        """Who can take part; of the others it is said why not."""
        absent = {peer: why for peer in self.peers if (why := left_out(peer, model, archive.in_tars))}
        for why in absent.values():
            if why not in self.left_out:
                self.left_out.append(why)
                self._print(why)
        return [OURS, *(peer for peer in self.peers if peer not in absent)]

    def _save(self) -> None:
        """Everything found so far, so that a stop loses little."""
        if self.json:
            record = {
                "machine": self.machine,
                "settings": {"rounds": self.rounds, "peer_batch_size": self.peer_batch_size},
                "outcomes": [outcome.as_json() for outcome in self.outcomes],
                "fidelity": self.fidelity,
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


def _chosen(flag: str, names: str, known: Mapping[str, object]) -> list[str]:
    """The names of a list with commas, each once."""
    chosen = list(dict.fromkeys(names.split(",")))
    if not set(chosen) <= set(known):
        raise SettingRefused(f"{flag} is {names!r}: it is one or more of {','.join(known)}")
    return chosen


def _sizes(given: argparse.Namespace, name: str, case: Case) -> tuple[int, int]:
    small, large = QUICK[name] if given.quick else (case.small, case.large)
    small, large = (small if given.small is None else given.small), (large if given.large is None else given.large)
    if not 2 <= small < large:
        raise SettingRefused(
            f"{name}: --small is {small} and --large is {large}: --small must be 2 or more, --large larger"
        )
    return small, large


def _say(line: str) -> None:
    """Progress: the tables alone are standard output."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):  # leave as a failure leaves: no process and no archive stays behind
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
