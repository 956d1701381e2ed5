"""Machines, their prices, and clusters of them: `8xg6.2xlarge`, `4xg6.2xlarge+2xc7i.4xlarge`, `local`.

The figures are in `prices.yaml` next to this module, or in a file of the same form that the user names.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import SettingRefused
from pipeline.storage import strict_yaml

LOCAL = "local"
REFERENCE_MODEL = "resnet50"
"""The network for which every GPU in a price file has a rate."""
CGROUP = Path("/sys/fs/cgroup")
PRICES = Path(__file__).with_name("prices.yaml")


@dataclass(frozen=True, slots=True)
class Machine:
    """One type of machine. None means unknown.

    vcpus_per_core: 2 if a vCPU is one of a core's two hardware threads, else 1. gpu: name of its GPUs, "" without one.
    network_gbit: sustained Gbit/s in each direction. usd_per_hour, spot_usd_per_hour: US dollars.
    """

    name: str
    vcpus: int
    vcpus_per_core: int = 2
    memory_gib: float | None = None
    gpus: int = 0
    gpu: str = ""
    network_gbit: float | None = None
    usd_per_hour: float | None = None
    spot_usd_per_hour: float | None = None

    @property
    def cores(self) -> float:
        """Physical cores."""
        return self.vcpus / self.vcpus_per_core

    @staticmethod
    def local(gpus: int = 0, gpu: str = "") -> "Machine":
        """This machine: the CPUs that this process may use, and the given GPUs."""
        return Machine(LOCAL, cpus_here(), 2 if _threads_share_cores() else 1, gpus=gpus, gpu=gpu)


def cpus_here() -> int:
    """Number of CPUs that this process may use, by its affinity and by the quota of its container, as Ray counts."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(count, int(_cpu_quota(CGROUP) or count)))


def _cpu_quota(cgroup: Path) -> float | None:
    """CPU limit of a control group (Linux, version 2 or 1), in CPUs; None without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        return int(quota) / int(period) if quota.isdigit() else None
    return None


def _threads_share_cores() -> bool:
    """True if simultaneous multithreading is active, by Linux's own report; False on other systems."""
    try:
        return Path("/sys/devices/system/cpu/smt/active").read_text().strip() == "1"
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class GpuRate:
    """Speed of one type of GPU.

    images_per_second: of one GPU in half precision at 224 × 224 pixels, by network; REFERENCE_MODEL is one of them.
    source: origin of the figures.
    """

    images_per_second: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Cluster:
    """A cluster. groups: (number of machines, machine)."""

    groups: tuple[tuple[int, Machine], ...]

    def __str__(self) -> str:
        return "+".join(
            machine.name if machine.name == LOCAL else f"{count}x{machine.name}" for count, machine in self.groups
        )

    @property
    def is_local(self) -> bool:
        return any(machine.name == LOCAL for _, machine in self.groups)

    @property
    def machines(self) -> int:
        return sum(count for count, _ in self.groups)

    @property
    def vcpus(self) -> int:
        return sum(count * machine.vcpus for count, machine in self.groups)

    @property
    def cores(self) -> float:
        return sum(count * machine.cores for count, machine in self.groups)

    @property
    def gpus(self) -> int:
        return sum(count * machine.gpus for count, machine in self.groups)

    @property
    def usd_per_hour(self) -> float | None:
        """US dollars per hour on demand, of all machines; None if one has no price."""
        return _sum_known([(count, machine.usd_per_hour) for count, machine in self.groups])

    @property
    def spot_usd_per_hour(self) -> float | None:
        """US dollars per hour on the spot market, of all machines; None if one has no price."""
        return _sum_known([(count, machine.spot_usd_per_hour) for count, machine in self.groups])


def _sum_known(prices: Sequence[tuple[int, float | None]]) -> float | None:
    known = [count * price for count, price in prices if price is not None]
    return sum(known) if len(known) == len(prices) else None


@dataclass(frozen=True)
class Prices:
    """The machines and GPUs of a price file, by name."""

    machines: Mapping[str, Machine] = field(default_factory=dict)
    gpus: Mapping[str, GpuRate] = field(default_factory=dict)

    @staticmethod
    def load(path: str | None = None) -> "Prices":
        """Read a price file, by default PRICES. Raises SettingRefused, which names the machine or GPU that is wrong."""
        file = Path(path) if path else PRICES
        try:
            content = strict_yaml.load(file.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SettingRefused(f"--prices {file} cannot be read: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("machines"), dict):
            raise SettingRefused(f"--prices {file} has no `machines:` with machines by name; edit a copy of {PRICES}")
        gpus = content.get("gpus") or {}
        if not isinstance(gpus, dict):
            raise SettingRefused(f"--prices {file}: `gpus:` must have GPUs by name; edit a copy of {PRICES}")
        try:
            share = float(content.get("spot_share_of_on_demand", 1.0))
        except (TypeError, ValueError) as error:
            raise SettingRefused(f"--prices {file}, spot_share_of_on_demand: {error}") from error
        return Prices(
            {str(name): _machine(file, str(name), values, share) for name, values in content["machines"].items()},
            {str(name): _gpu_rate(file, str(name), values) for name, values in gpus.items()},
        )

    def cluster(self, shape: str, local: Machine | None = None) -> Cluster:
        """Parse the shape of a cluster, such as `8xg6.2xlarge+2xc7i.4xlarge`.

        local: the machine that `local` in a shape stands for; by default this machine without GPUs.
        Raises SettingRefused for a shape that cannot be parsed, and for a machine that is not in the price file.
        """
        groups = [self._group(text.strip(), shape, local) for text in shape.split("+")]
        return Cluster(tuple(groups))

    def _group(self, text: str, shape: str, local: Machine | None) -> tuple[int, Machine]:
        if text == LOCAL:
            return 1, local or Machine.local()
        count, x, name = text.partition("x")
        if not (x and count.isdigit()):
            count, name = "1", text
        if int(count) < 1 or not name:
            raise SettingRefused(
                f"--cluster is {shape!r}: it must be counts and names of machines, such as 8xg6.2xlarge+2xc7i.4xlarge"
            )
        if name not in self.machines:
            similar = difflib.get_close_matches(name, self.machines, 4)
            known = f"Similar: {', '.join(similar)}" if similar else f"Known: {', '.join(self.machines)}"
            raise SettingRefused(
                f"--cluster {shape}: the price file has no machine {name!r}. {known}; "
                f"add it to a copy of {PRICES.name} and pass that with --prices"
            )
        return int(count), self.machines[name]


def _machine(file: Path, name: str, values: Any, spot_share: float) -> Machine:
    try:
        machine = Machine(name, **values)
        for each in ("vcpus", "vcpus_per_core", "gpus", "usd_per_hour", "spot_usd_per_hour", "network_gbit"):
            value, min_value = getattr(machine, each), 1 if each in ("vcpus", "vcpus_per_core") else 0
            if value is not None and value < min_value:
                raise ValueError(f"{each} is {value}; it must be at least {min_value}")
        if machine.network_gbit == 0:
            raise ValueError("network_gbit is 0; omit it if it is unknown")
        if machine.gpus and not machine.gpu:
            raise ValueError("gpus without gpu; add the name of the GPU, such as gpu: L4")
    except (TypeError, ValueError) as error:
        raise SettingRefused(f"--prices {file}, machine {name}: {error}") from error
    if machine.spot_usd_per_hour is None and machine.usd_per_hour is not None:
        return replace(machine, spot_usd_per_hour=machine.usd_per_hour * spot_share)
    return machine


def _gpu_rate(file: Path, name: str, values: Any) -> GpuRate:
    try:
        rate = GpuRate(**values)
        if rate.images_per_second[REFERENCE_MODEL] <= 0 or min(rate.images_per_second.values()) <= 0:
            raise ValueError(f"images_per_second is {rate.images_per_second}; all rates must be above 0")
        return rate
    except KeyError as error:
        raise SettingRefused(f"--prices {file}, GPU {name}: images_per_second lacks {REFERENCE_MODEL}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise SettingRefused(f"--prices {file}, GPU {name}: {error}") from error
