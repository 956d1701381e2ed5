"""The results of a benchmark as JSON: all runs, and the figures computed from them."""

from dataclasses import asdict, dataclass
from typing import Any

from jobs.bench.harness.contest import CHECKOUT, OURS, PEERS, Result
from jobs.bench.harness.roofline import Roofline


@dataclass(frozen=True)
class Outcome:
    """One case with one network. results: by contestant, Nightshift first."""

    case: str
    description: str
    model: str
    results: dict[str, Result]
    roofline: Roofline

    @property
    def ours(self) -> Result:
        return self.results[OURS]

    def times_faster(self, name: str) -> float | None:
        """Our marginal rate divided by that of a contestant."""
        ours, theirs = self.ours.rate, self.results[name].rate
        return None if ours is None or theirs is None else ours / theirs

    def as_json(self) -> dict[str, Any]:
        roofline, rate, networks = self.roofline, self.ours.rate, self.roofline.networks
        return {
            "case": self.case,
            "description": self.description,
            "model": self.model,
            "small_images": self.ours.small_images,
            "large_images": self.ours.large_images,
            "contestants": {name: self._contestant(name) for name in self.results},
            "roofline": {
                "core_seconds_per_image": {
                    **roofline.stages,
                    "everything_else": roofline.everything_else(self.ours.core_seconds_per_image),
                },
                "images_per_second": None if roofline.gpus else roofline.ceiling,
                "share": roofline.share(rate),
                "gpus": roofline.gpus,
            },
            "network": networks
            and {
                **asdict(networks),
                "gflops": {form: networks.gflops(form) for form in networks.speeds},
                "compiled_share": roofline.compiled_share,
            },
        }

    def _contestant(self, name: str) -> dict[str, Any]:
        result = self.results[name]
        return {
            "runs": {
                "small": [asdict(spent) for spent in result.small],
                "large": [asdict(spent) for spent in result.large],
            },
            "small_seconds": result.small_seconds,
            "large_seconds": result.large_seconds,
            "marginal_images_per_second": result.rate,
            "startup_seconds": result.startup_seconds,
            "small_memory_bytes": result.small_memory_bytes,
            "peak_memory_bytes": result.peak_memory_bytes,
            "core_seconds_per_image": result.core_seconds_per_image,
            "core_seconds_per_image_by_role": result.by_role,
            "networks": {"small": result.small_networks, "large": result.large_networks},
            "ours_times_faster": self.times_faster(name),
        }


def title(name: str) -> str:
    """The usual name of a contestant."""
    if name.startswith(CHECKOUT):
        return name
    return PEERS[name].title if name in PEERS else "Nightshift"
