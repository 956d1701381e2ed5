"""Compares a run with the sum of its stages alone, and its network with the peak speed of the machine."""

from collections.abc import Mapping
from dataclasses import dataclass

from jobs.bench.harness.archives import Archive
from jobs.bench.harness.measure import json_of

STAGES = ("read", "decode", "predict", "write")
ROOF = STAGES[:3]


@dataclass(frozen=True)
class Speed:
    """core_seconds: per image, of all cores together."""

    core_seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Networks:
    """A network alone, on all cores or on the GPU.

    speeds: by form: eager and compiled, as in our actors, and plain, as in the peers (float32, channels first, batch
    normalisation not folded, eager). dtype: the number format of our forms.
    """

    dtype: str
    flops_per_image: int
    speeds: dict[str, Speed]

    def gflops(self, form: str) -> float:
        """GFLOP/s; a multiplication and an addition are two operations (torch.utils.flop_counter)."""
        return self.flops_per_image * self.speeds[form].images_per_second / 1e9


@dataclass(frozen=True)
class Roofline:
    """CPU core-seconds per image.

    stages: read, decode, predict and write, each alone; predict is compiled for `compiled_share` of the images, as in
    the run. gpus: with one or more, predict is not the CPU's work, and the ceiling means nothing.
    """

    stages: dict[str, float]
    cores: int
    gpus: int = 0
    networks: Networks | None = None
    compiled_share: float = 0.0

    @property
    def ceiling(self) -> float:
        """images/s if all cores read, decode and predict all the time."""
        return self.cores / sum(self.stages[name] for name in ROOF)

    def share(self, rate: float | None) -> float | None:
        """Share of the ceiling that the marginal images/s of a run reach."""
        return None if rate is None or self.gpus else rate / self.ceiling

    def everything_else(self, core_seconds_per_image: float | None) -> float | None:
        """Marginal core-seconds of a run without those of its stages: Ray, copies, threads that spin."""
        return None if core_seconds_per_image is None else core_seconds_per_image - sum(self.stages.values())


def measure(
    archive: Archive, model: str, rows_per_part: int, cores: int, compiled_share: float, with_networks: bool
) -> Roofline:
    """Measure in another process, so that torch starts no threads in this one. Raises CommandFailed."""
    command = ["-m", "jobs.bench.harness.stages", archive.uri, "--model", model, "--rows-per-part", str(rows_per_part)]
    figures = json_of([*command, *(["--networks"] if with_networks else [])], archive.environment)
    networks = None
    if with_networks:
        fields = figures.pop("networks")
        speeds = {form: Speed(**each) for form, each in fields["speeds"].items()}
        networks = Networks(**{**fields, "speeds": speeds})
        eager, compiled = (networks.speeds[form].core_seconds for form in ("eager", "compiled"))
        figures["predict"] = eager + compiled_share * (compiled - eager)
    gpus = figures.pop("gpus")
    return Roofline(figures, cores, gpus, networks, compiled_share)


def peaks() -> dict[str, float]:
    """Peak GFLOP/s of the machine by number format, from jobs/bench/harness/peak.py. Raises CommandFailed."""
    return json_of(["-m", "jobs.bench.harness.peak"])


def largest_ratio(networks: Networks, peak_gflops: Mapping[str, float]) -> float:
    """How many times faster than the peers' form the network would be at the peak of the machine."""
    return max(peak_gflops.values()) / networks.gflops("plain")
