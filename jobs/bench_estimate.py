"""Is the plan's estimate true? It is made for three archives, then the jobs are run, and their speeds compared.

    python jobs/bench_estimate.py
    python jobs/bench_estimate.py --cases photos --json estimate.json

photos: ResNet-18, the network holds the job up. decode: photos and a network of one layer, reading and decoding do.
tiles: 64 × 64 JPEGs in tars and the same. Each job runs on a small and on a large archive; its marginal images/s (more
images / more seconds) are compared with the estimate for the large one, which each round makes anew. Ends with 1 where
one of them is out by more than a quarter.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from jobs.bench import archives, show
from jobs.bench.archives import Archive
from jobs.bench.contest import JOBS, marginal_rate
from jobs.bench.measure import TAIL_CHARACTERS, CommandFailed, spend
from pipeline import cli
from pipeline.config import Transform
from pipeline.errors import SettingRefused

TOLERANCE = 0.25


@dataclass(frozen=True)
class Case:
    """archive: of `jobs.bench.archives`. small, large: images."""

    archive: str
    model: str
    small: int
    large: int


CASES = {
    "photos": Case("photos", "resnet18", 100, 700),
    "decode": Case("photos", "jobs.bench_estimate:one_layer", 1_000, 7_000),
    "tiles": Case("tiles", "jobs.bench_estimate:one_layer_of_tiles", 10_000, 60_000),
}


@dataclass(frozen=True)
class Outcome:
    """Rates in images/s, medians of the rounds; measured is None where the large archive took no longer."""

    case: str
    estimated: float
    measured: float | None
    bottleneck: str
    plans: tuple[dict[str, Any], ...]

    @property
    def error(self) -> float | None:
        """Of the estimated time, as a share of the measured one; above 0 the job was faster than its estimate."""
        return None if self.measured is None else self.measured / self.estimated - 1

    @property
    def is_true(self) -> bool:
        return self.error is not None and abs(self.error) <= TOLERANCE


def one_layer() -> Any:
    """A network that costs next to nothing: each channel's mean, and a classifier."""
    return _one_layer(), Transform()


def one_layer_of_tiles() -> Any:
    return _one_layer(), Transform(resize=64, crop=64)


def _one_layer() -> Any:
    from collections import OrderedDict

    from torch import nn

    layers = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(3, 2)}
    return nn.Sequential(OrderedDict(layers))


def check(name: str, case: Case, rounds: int) -> Outcome:
    """Raises CommandFailed."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        small, large = archives.make(archives.CASES[case.archive], Path(folder), case.small, case.large)
        found = [
            (_plan(large, case.model), _seconds(small, case.model), _seconds(large, case.model)) for _ in range(rounds)
        ]
    plans, small_seconds, large_seconds = zip(*found, strict=True)
    rate = marginal_rate(case.small, case.large, median(small_seconds), median(large_seconds))
    estimated = median(plan["estimate"]["images_per_second"] for plan in plans)
    return Outcome(name, estimated, rate, plans[0]["estimate"]["bottleneck"], plans)


def _flags(archive: Archive, model: str) -> list[str]:
    return ["--input", str(archive.folder), "--model", model, "--weights", "random"]


def _plan(archive: Archive, model: str) -> dict[str, Any]:
    command = [sys.executable, str(JOBS / "plan.py"), "--json", *_flags(archive, model)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise CommandFailed(
            f"the plan of {archive.folder} ended with {done.returncode}", done.stderr[-TAIL_CHARACTERS:]
        )
    return dict(json.loads(done.stdout))


def _seconds(archive: Archive, model: str) -> float:
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        command = [sys.executable, str(JOBS / "embed.py"), "--output", folder, *_flags(archive, model)]
        return spend(command, _environment()).seconds


def _environment() -> dict[str, str]:
    root = str(JOBS.parent)  # the networks above are found by it
    return {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": root}


def table(outcomes: list[Outcome]) -> Table:
    made = Table(title="marginal images/s, estimated and measured", title_justify="left")
    for header in ("case", "held up by"):
        made.add_column(header)
    for header in ("estimated", "measured", "measured / estimated", f"within {TOLERANCE:.0%}"):
        made.add_column(header, justify="right")
    for each in outcomes:
        ratio = None if each.error is None else 1 + each.error
        figures = (show.number(each.estimated, ",.1f"), show.number(each.measured, ",.1f"), show.number(ratio, ".2f"))
        made.add_row(each.case, each.bottleneck, *figures, "yes" if each.is_true else "no")
    return made


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", metavar="CASE,…", default=",".join(CASES), help="default: all")
    made.add_argument("--rounds", metavar="N", type=int, default=1, help="default: 1")
    made.add_argument("--json", metavar="FILE", type=Path, help="write every figure")
    return made


def main() -> int:
    given = parser().parse_args()
    return cli.guarded(lambda: report(given))


def report(given: argparse.Namespace) -> int:
    names = given.cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown or given.rounds < 1:
        raise SettingRefused(
            f"--cases {given.cases} --rounds {given.rounds}: cases are of {', '.join(CASES)}, rounds from 1"
        )
    outcomes = [check(name, CASES[name], given.rounds) for name in names]
    show.console().print(table(outcomes))
    if given.json:
        found = [{**asdict(each), "error": each.error} for each in outcomes]
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(each.is_true for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
