"""A whole job, jobs/embed.py with Ray, and how fast it was once it was under way."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.bench.measure import spend

EMBED = Path(__file__).resolve().parents[1] / "embed.py"


@dataclass(frozen=True)
class Steady:
    """Between the first commit of a run and its last. start, stop: seconds since the epoch."""

    images: int
    start: float
    stop: float

    @property
    def images_per_second(self) -> float | None:
        """None where there was but one commit."""
        return self.images / (self.stop - self.start) if self.stop > self.start else None


def run(archive: Path, output: Path, settings: Sequence[str]) -> Steady:
    """Raises CommandFailed."""
    command = [sys.executable, str(EMBED), "--input", str(archive), "--output", str(output), *settings]
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    spend(command, environment)
    return steady(output)


def steady(output: Path) -> Steady:
    """What a run did between its first commit and its last, by the times of their files."""
    commits = sorted((path.stat().st_mtime, json.loads(path.read_text())["rows"]) for path in output.glob("_commits/*"))
    return Steady(sum(rows for _, rows in commits[1:]), commits[0][0], commits[-1][0])
