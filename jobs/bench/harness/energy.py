"""Energy of a machine's CPU packages, from the counters that Linux reads by RAPL (docs.kernel.org/power/powercap)."""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
COUNTERS = "intel-rapl:[0-9]*"
"""Also the name on AMD. `intel-rapl:0` is a package; `intel-rapl:0:0` is a part of it."""


class Meter:
    """Measures the energy since it was made. A counter may overflow once in that time."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        """powercap: folder with the counters."""
        self.packages = [path for path in sorted(powercap.glob(COUNTERS)) if path.name.count(":") == 1]
        self.start = self._counters()

    def joules(self) -> float | None:
        """Energy of all packages, with whatever else runs on them; None if no counter can be read, as in most VMs."""
        now = self._counters()
        if not self.start or not now:
            return None
        try:
            pairs = zip(self.packages, self.start, now, strict=True)
            return sum((after - before) % _read(path / "max_energy_range_uj") for path, before, after in pairs) / 1e6
        except (OSError, ValueError):
            return None

    def _counters(self) -> list[int]:
        """Microjoules by package; empty if one cannot be read. Most systems let only root read them."""
        try:
            return [_read(path / "energy_uj") for path in self.packages]
        except (OSError, ValueError):
            return []


def _read(path: Path) -> int:
    return int(path.read_text())
