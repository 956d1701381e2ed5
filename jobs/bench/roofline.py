"""How near a run comes to what its stages cost alone, and its network to what the machine can compute."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.bench.archives import Archive
from jobs.bench.measure import TAIL_CHARACTERS, CommandFailed

STAGES = ("read", "decode", "predict", "write")
ROOF = STAGES[:3]


@dataclass(frozen=True)
class Speed:
    """core_seconds an image, all cores together."""

    core_seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Networks:
    """A network alone, on all cores or the GPU.

    speeds: by form: eager and compiled, as our actors run it, and plain, as the peers do (float32, channels first,
    batch normalisation unfolded, eager). dtype: the number format of ours.
    """

    dtype: str
    flops_per_image: int
    speeds: dict[str, Speed]

    def gflops(self, form: str) -> float:
        """GFLOP/s; a multiplication and an addition are two operations (torch.utils.flop_counter)."""
        return self.flops_per_image * self.speeds[form].images_per_second / 1e9


@dataclass(frozen=True)
class Roofline:
    """CPU core-seconds an image.

    stages: read, decode, predict and write, each alone; predict as the run's network ran, compiled in `compiled_share`
    of the images. gpus: with one, the network's work is not the CPU's, and the ceiling says nothing.
    """

    stages: dict[str, float]
    cores: int
    gpus: int = 0
    networks: Networks | None = None
    compiled_share: float = 0.0

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


def measure(
    archive: Archive, model: str, rows_per_part: int, cores: int, compiled_share: float, with_networks: bool
) -> Roofline:
    """In a process of its own, so that torch's threads stay out of the benchmark's. Raises CommandFailed."""
    command = ["-m", "jobs.bench.stages", archive.uri, "--model", model, "--rows-per-part", str(rows_per_part)]
    found = _json_of([*command, *(["--networks"] if with_networks else [])], archive.environment)
    networks = None
    if with_networks:
        given = found.pop("networks")
        networks = Networks(**{**given, "speeds": {form: Speed(**each) for form, each in given["speeds"].items()}})
        eager, compiled = (networks.speeds[form].core_seconds for form in ("eager", "compiled"))
        found["predict"] = eager + compiled_share * (compiled - eager)
    gpus = found.pop("gpus")
    return Roofline(found, cores, gpus, networks, compiled_share)


def peaks() -> dict[str, float]:
    """GFLOP/s of the machine by number format; see jobs/bench/peak.py. Raises CommandFailed."""
    return _json_of(["-m", "jobs.bench.peak"], {})


def largest_ratio(networks: Networks, peak_gflops: Mapping[str, float]) -> float:
    """How many times the peers' form a network could at most run, were it at the machine's peak."""
    return max(peak_gflops.values()) / networks.gflops("plain")


def _json_of(arguments: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """The JSON in the last line that a Python command prints."""
    line = [sys.executable, *arguments]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise CommandFailed(f"{' '.join(arguments)} failed", done.stderr[-TAIL_CHARACTERS:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
