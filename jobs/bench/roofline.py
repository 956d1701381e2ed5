"""How near a run comes to what its stages cost alone: read + decode + predict on every core, and nothing else."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from jobs.bench.measure import TAIL_CHARACTERS, CommandFailed

STAGES = ("read", "decode", "predict", "write")
ROOF = STAGES[:3]


@dataclass(frozen=True)
class Roofline:
    """CPU core-seconds an image.

    stages: read, decode, predict and write, each alone. gpus: with one, the network's work is not the CPU's, and the
    ceiling says nothing.
    """

    stages: dict[str, float]
    cores: int
    gpus: int = 0

    @property
    def ceiling(self) -> float:
        """images/s of all cores that read, decode and predict without a pause."""
        return self.cores / sum(self.stages[name] for name in ROOF)

    def share(self, rate: float | None) -> float | None:
        """Of the ceiling, of a run's marginal images/s."""
        return None if rate is None or self.gpus else rate / self.ceiling

    def everything_else(self, core_seconds_per_image: float | None) -> float | None:
        """What a run's marginal core-seconds hold besides its stages: Ray, copies, waiting threads that spin."""
        return None if core_seconds_per_image is None else core_seconds_per_image - sum(self.stages.values())


def measure(archive: Path, model: str, rows_per_part: int, cores: int) -> Roofline:
    """In a process of its own, so that torch's threads stay out of the benchmark's. Raises CommandFailed."""
    command = [sys.executable, "-m", "jobs.bench.stages", str(archive), "--model", model]
    done = subprocess.run([*command, "--rows-per-part", str(rows_per_part)], capture_output=True, text=True)
    if done.returncode:
        raise CommandFailed(f"the stages of {archive} could not be measured alone", done.stderr[-TAIL_CHARACTERS:])
    found = json.loads(done.stdout.splitlines()[-1])
    gpus = found.pop("gpus")
    return Roofline(found, cores, gpus)
