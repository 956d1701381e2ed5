"""Machines, what they cost, and clusters of them: `8xg6.2xlarge`, `4xg6.2xlarge+2xc7i.4xlarge`, `local`.

The figures come from `prices.yaml` beside this module, or from a file like it that the user names.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import SettingRefused

LOCAL = "local"
REFERENCE = "resnet50"
"""The network whose rate every GPU has."""
CGROUP = Path("/sys/fs/cgroup")
PRICES = Path(__file__).with_name("prices.yaml")


@dataclass(frozen=True, slots=True)
class Machine:
    """vcpus_per_core: 2 where a vCPU is one of a core's two threads, half a core. gpu: name, "" without one.

    network_gbit: in each direction, kept up for hours. Prices in US dollars. None: not known.
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
        return self.vcpus / self.vcpus_per_core

    @staticmethod
    def local(gpus: int = 0, gpu: str = "") -> "Machine":
        """The machine at hand: the CPUs that this process may use, and the GPUs that it is told of."""
        return Machine(LOCAL, cpus_here(), 2 if _threads_share_cores() else 1, gpus=gpus, gpu=gpu)


def cpus_here() -> int:
    """CPUs that this process may use: by its affinity and, in a container, by its quota, as Ray counts them."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(count, int(_cpu_quota(CGROUP) or count)))


def _cpu_quota(cgroup: Path) -> float | None:
    """CPUs' worth of time that a control group allows (Linux, version 2 or 1); None without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
        except (OSError, ValueError):
            continue
        return int(quota) / int(period) if quota.isdigit() else None
    return None


def _threads_share_cores() -> bool:
    """Simultaneous multithreading, as Linux tells it; elsewhere none is assumed."""
    try:
        return Path("/sys/devices/system/cpu/smt/active").read_text().strip() == "1"
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class GpuRate:
    """images_per_second: of one GPU at 224 × 224 in half precision, by network; ResNet-50 among them.

    source: whose figures they are.
    """

    images_per_second: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Cluster:
    """Groups of equal machines, each (how many, machine)."""

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
        """On demand; None where a machine has no price."""
        return _sum_known([(count, machine.usd_per_hour) for count, machine in self.groups])

    @property
    def spot_usd_per_hour(self) -> float | None:
        return _sum_known([(count, machine.spot_usd_per_hour) for count, machine in self.groups])


def _sum_known(prices: Sequence[tuple[int, float | None]]) -> float | None:
    known = [count * price for count, price in prices if price is not None]
    return sum(known) if len(known) == len(prices) else None


@dataclass(frozen=True)
class Prices:
    """What a file of prices holds."""

    machines: Mapping[str, Machine] = field(default_factory=dict)
    gpus: Mapping[str, GpuRate] = field(default_factory=dict)

    @staticmethod
    def load(path: str | None = None) -> "Prices":
        """Raises SettingRefused, naming the machine or GPU whose figures make no sense."""
        file = Path(path) if path else PRICES
        try:
            given = yaml.safe_load(file.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SettingRefused(f"--prices {file} cannot be read: {error}") from error
        if not isinstance(given, dict) or not isinstance(given.get("machines"), dict):
            raise SettingRefused(f"--prices {file} has no `machines:`; begin with a copy of {PRICES}")
        gpus = given.get("gpus") or {}
        if not isinstance(gpus, dict):
            raise SettingRefused(
                f"--prices {file}: under `gpus:` there are no names of GPUs; begin with a copy of {PRICES}"
            )
        try:
            share = float(given.get("spot_share_of_on_demand", 1.0))
        except (TypeError, ValueError) as error:
            raise SettingRefused(f"--prices {file}, spot_share_of_on_demand: {error}") from error
        return Prices(
            {str(name): _machine(file, str(name), values, share) for name, values in given["machines"].items()},
            {str(name): _gpu_rate(file, str(name), values) for name, values in gpus.items()},
        )

    def cluster(self, shape: str, local: Machine | None = None) -> Cluster:
        """`local` in a shape is the machine at hand, as it is given or as its CPUs are found.

        Raises SettingRefused for a shape that says nothing, and for a machine that the file does not have.
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
                f"--cluster is {shape!r}: write how many of which machine, as in 8xg6.2xlarge+2xc7i.4xlarge"
            )
        if name not in self.machines:
            near = difflib.get_close_matches(name, self.machines, 4)
            known = f"Near it: {', '.join(near)}" if near else f"It knows {', '.join(self.machines)}"
            raise SettingRefused(
                f"--cluster {shape}: the price file does not say what {name!r} is. {known}; "
                f"add it to a copy of {PRICES.name} and name that with --prices"
            )
        return int(count), self.machines[name]


def _machine(file: Path, name: str, values: Any, spot_share: float) -> Machine:
    try:
        made = Machine(name, **values)
        for each in ("vcpus", "vcpus_per_core", "gpus", "usd_per_hour", "spot_usd_per_hour", "network_gbit"):
            value = getattr(made, each)
            if value is not None and value < (each in ("vcpus", "vcpus_per_core")):
                raise ValueError(f"{each} is {value}")
        if made.network_gbit == 0:
            raise ValueError("network_gbit is 0; leave it out where it is not known")
        if made.gpus and not made.gpu:
            raise ValueError("gpus without a gpu: which one?")
    except (TypeError, ValueError) as error:
        raise SettingRefused(f"--prices {file}, machine {name}: {error}") from error
    if made.spot_usd_per_hour is None and made.usd_per_hour is not None:
        made = Machine(name, **{**values, "spot_usd_per_hour": made.usd_per_hour * spot_share})
    return made


def _gpu_rate(file: Path, name: str, values: Any) -> GpuRate:
    try:
        made = GpuRate(**values)
        if made.images_per_second[REFERENCE] <= 0 or min(made.images_per_second.values()) <= 0:
            raise ValueError(f"images_per_second is {made.images_per_second}")
        return made
    except KeyError as error:
        raise SettingRefused(f"--prices {file}, GPU {name}: images_per_second lacks {REFERENCE}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise SettingRefused(f"--prices {file}, GPU {name}: {error}") from error
