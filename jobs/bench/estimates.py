"""Compare the estimates of `nightshift estimate` with the jobs: three archives are estimated, then run.

    python jobs/bench/estimates.py
    python jobs/bench/estimates.py --cases photos --json estimate.json

photos: with ResNet-18, which is the bottleneck. decode: photos with the null network, so reading and decoding are the
bottleneck. tiles: 64 × 64 JPEGs in tars with the null network. Each job runs on a small and on a large archive. Its
marginal images/s (more images / more seconds) are compared with the estimate for the large archive, which is made anew
in each round. The exit code is 1 if an estimate is wrong by more than a quarter.
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

from jobs.bench.harness import archives, show
from jobs.bench.harness.archives import Archive
from jobs.bench.harness.contest import JOBS, OUR_NULL, marginal_rate
from jobs.bench.harness.measure import TAIL_CHARACTERS, CommandFailed, spend
from pipeline import cli
from pipeline.errors import SettingRefused

TOLERANCE = 0.25


@dataclass(frozen=True)
class Case:
    """archive: of `jobs.bench.harness.archives`. small, large: images."""

    archive: str
    model: str
    small: int
    large: int


CASES = {
    "photos": Case("photos", "resnet18", 100, 700),
    "decode": Case("photos", OUR_NULL, 1_000, 7_000),
    "tiles": Case("tiles", "jobs.bench.harness.null:tile_network", 10_000, 60_000),
}


@dataclass(frozen=True)
class Outcome:
    """Rates in images/s, medians of the rounds. measured: None if the large archive took no longer."""

    case: str
    estimated: float
    measured: float | None
    bottleneck: str
    forecasts: tuple[dict[str, Any], ...]

    @property
    def error(self) -> float | None:
        """measured / estimated − 1: above 0 if the job was faster than its estimate."""
        return None if self.measured is None else self.measured / self.estimated - 1

    @property
    def is_close(self) -> bool:
        return self.error is not None and abs(self.error) <= TOLERANCE


def check(name: str, case: Case, rounds: int) -> Outcome:
    """Estimate and run a case. Raises CommandFailed."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        small, large = archives.make(archives.CASES[case.archive], Path(folder), case.small, case.large)
        figures = [
            (_forecast(large, case.model), _seconds(small, case.model), _seconds(large, case.model))
            for _ in range(rounds)
        ]
    forecasts, small_seconds, large_seconds = zip(*figures, strict=True)
    rate = marginal_rate(case.small, case.large, median(small_seconds), median(large_seconds))
    estimated = median(each["estimate"]["images_per_second"] for each in forecasts)
    return Outcome(name, estimated, rate, forecasts[0]["estimate"]["bottleneck"], forecasts)


def _flags(archive: Archive, model: str) -> list[str]:
    return ["--input", str(archive.folder), "--model", model, "--weights", "random"]


def _forecast(archive: Archive, model: str) -> dict[str, Any]:
    command = [sys.executable, str(JOBS / "estimate.py"), "--json", *_flags(archive, model)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise CommandFailed(
            f"the estimate of {archive.folder} ended with {done.returncode}", done.stderr[-TAIL_CHARACTERS:]
        )
    return dict(json.loads(done.stdout))


def _seconds(archive: Archive, model: str) -> float:
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        command = [sys.executable, str(JOBS / "embed.py"), "--output", folder, *_flags(archive, model)]
        return spend(command, _environment()).seconds


def _environment() -> dict[str, str]:
    root = str(JOBS.parent)  # to import the null network
    return {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": root}


def table(outcomes: list[Outcome]) -> Table:
    rows = Table(title="marginal images/s, estimated and measured", title_justify="left")
    for header in ("case", "bottleneck"):
        rows.add_column(header)
    for header in ("estimated", "measured", "measured / estimated", f"within {TOLERANCE:.0%}"):
        rows.add_column(header, justify="right")
    for each in outcomes:
        ratio = None if each.error is None else 1 + each.error
        figures = (show.number(each.estimated, ",.1f"), show.number(each.measured, ",.1f"), show.number(ratio, ".2f"))
        rows.add_row(each.case, each.bottleneck, *figures, "yes" if each.is_close else "no")
    return rows


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--cases", metavar="CASE,…", default=",".join(CASES), help="default: all")
    flags.add_argument("--rounds", metavar="N", type=int, default=1, help="default: 1")
    flags.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    return flags


def main() -> int:
    options = parser().parse_args()
    return cli.guarded(lambda: report(options))


def report(options: argparse.Namespace) -> int:
    names = options.cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown or options.rounds < 1:
        raise SettingRefused(
            f"--cases {options.cases} --rounds {options.rounds}: cases must be of {', '.join(CASES)}, "
            "and rounds at least 1"
        )
    outcomes = [check(name, CASES[name], options.rounds) for name in names]
    show.console().print(table(outcomes))
    if options.json:
        record = [{**asdict(each), "error": each.error} for each in outcomes]
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(each.is_close for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
