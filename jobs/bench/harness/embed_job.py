"""Run jobs/embed.py, and compute its speed after its start."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.bench.harness.measure import spend

EMBED = Path(__file__).resolve().parents[2] / "embed.py"


@dataclass(frozen=True)
class Steady:
    """A run between its first and its last commit. start, stop: seconds since the epoch."""

    images: int
    start: float
    stop: float

    @property
    def images_per_second(self) -> float | None:
        """None if there was only one commit."""
        return self.images / (self.stop - self.start) if self.stop > self.start else None


def run(archive: Path, output: Path, settings: Sequence[str]) -> Steady:
    """Raises CommandFailed."""
    command = [sys.executable, str(EMBED), "--input", str(archive), "--output", str(output), *settings]
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    spend(command, environment)
    return steady(output)


def steady(output: Path) -> Steady:
    """Use the modification times of the commits' files."""
    commits = sorted((path.stat().st_mtime, json.loads(path.read_text())["rows"]) for path in output.glob("_commits/*"))
    return Steady(sum(rows for _, rows in commits[1:]), commits[0][0], commits[-1][0])
