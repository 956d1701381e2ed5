"""The figures of jobs/bench/gpu.py, as JSON and as a table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from jobs.bench.harness.show import number

TOO_FEW, NO_GPU = "too few images", "no GPU"


@dataclass(frozen=True)
class Figure:
    """One row of the table.

    images_per_second: None if not known, for the reason `why`. limit: images/s that a job cannot exceed.
    idle: share of the GPU's time. peak_memory_bytes: of the GPU, all processes together.
    """

    part: str
    setting: str
    images_per_second: float | None
    why: str = TOO_FEW
    limit: float | None = None
    idle: float | None = None
    peak_memory_bytes: int | None = None

    @property
    def rate(self) -> str:
        """As text."""
        return self.why if self.images_per_second is None else f"{self.images_per_second:,.1f}"

    @property
    def share(self) -> float | None:
        """Of the limit."""
        return self.images_per_second / self.limit if self.images_per_second and self.limit else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "why": None if self.images_per_second else self.why, "share": self.share}


def table(figures: Sequence[Figure], title: str) -> Table:
    rows = Table(title=title, title_justify="left")
    rows.add_column("")
    rows.add_column("")
    for header in ("images/s", "limit\nimages/s", "share of\nthe limit", "GPU\nidle", "GPU memory\nMiB"):
        rows.add_column(header, justify="right")
    before = ""
    for figure in figures:
        memory = None if figure.peak_memory_bytes is None else figure.peak_memory_bytes / 2**20
        rows.add_row(
            "" if figure.part == before else figure.part,
            figure.setting,
            figure.rate,
            number(figure.limit, ",.1f"),
            number(figure.share, ".0%"),
            number(figure.idle, ".1%"),
            number(memory, ",.0f"),
        )
        before = figure.part
    return rows
