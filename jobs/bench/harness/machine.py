"""The machine of a benchmark, and the versions of its packages."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from pipeline.estimates.machines import cpus_here

PACKAGES = ("nightshift", "ray", "torch", "torchvision", "pyarrow", "pillow", "daft")


def describe() -> dict[str, object]:
    """cpu, cores (those that this process may use), memory_bytes, system, python, versions of PACKAGES."""
    return {
        "cpu": _cpu_model(),
        "cores": cpus_here(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: number for name in PACKAGES if (number := _version(name))},
    }


def _cpu_model() -> str:
    """The name in /proc/cpuinfo on Linux, else the one that Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
