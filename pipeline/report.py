"""What a run came to, from the ledger alone: `_report.json`, the summary on the screen, the progress while it runs."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline import storage
from pipeline.errors import printable
from pipeline.ledger import Ledger
from pipeline.machines import Cluster
from pipeline.plan import Plan
from pipeline.update import Change

NAME = "_report.json"
PLAIN_LINE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Report:
    """The counts and rates of a run so far.

    status: done, or why it is not. planned: images, None while shards are left that nobody has counted.
    wall_seconds, images_per_second: of this attempt. stage_seconds: summed over images and workers, whole run.
    networks: how the network ran (device, number format, compiled or not) → images.
    core_seconds: CPU time of the workers. gpu_seconds: in which a GPU had a batch under way. bytes_read: of encoded
    images. bytes_written: of parts and errors. All of them of the whole run.
    cost: of this attempt on the machines of --cluster, None where they or their prices are not known.
    unchanged, removed: images (or whole shards) that the last --update skipped, and that it no longer found.
    """

    output: str
    status: str
    model: str
    planned: int | None
    rows: int
    errors: int
    parts: int
    attempt: int
    resumed_images: int
    wall_seconds: float
    images_per_second: float
    bytes_read: int
    errors_by_type: dict[str, int] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    networks: dict[str, int] = field(default_factory=dict)
    unchanged: int = 0
    removed: int = 0
    core_seconds: float = 0.0
    gpu_seconds: float = 0.0
    bytes_written: int = 0
    cost: dict[str, Any] | None = None

    @staticmethod
    def of(
        plan: Plan,
        ledger: Ledger,
        model: str,
        status: str,
        wall_seconds: float,
        change: Change | None = None,
        cluster: Cluster | None = None,
    ) -> "Report":
        earlier, current = ledger.earlier, ledger.current
        seconds = earlier.seconds + current.seconds
        images = current.rows + current.errors
        return Report(
            output=plan.output,
            status=status,
            model=model,
            planned=plan.images(ledger.coverage.totals),
            rows=ledger.rows,
            errors=ledger.errors,
            parts=earlier.parts + current.parts,
            attempt=ledger.attempt,
            resumed_images=earlier.rows + earlier.errors,
            wall_seconds=round(wall_seconds, 3),
            images_per_second=round(images / wall_seconds, 2) if wall_seconds else 0.0,
            bytes_read=earlier.bytes_read + current.bytes_read,
            errors_by_type=dict((earlier.errors_by_type + current.errors_by_type).most_common()),
            stage_seconds={name: round(seconds[name], 3) for name in ("read", "decode", "predict", "write")},
            networks=dict((earlier.networks + current.networks).most_common()),
            unchanged=change.unchanged if change else 0,
            removed=change.removed if change else 0,
            core_seconds=round(earlier.core_seconds + current.core_seconds, 3),
            gpu_seconds=round(earlier.gpu_seconds + current.gpu_seconds, 3),
            bytes_written=earlier.bytes_written + current.bytes_written,
            cost=_cost(cluster, wall_seconds, images),
        )

    def save(self) -> None:
        storage.write(storage.join(self.output, NAME), json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def load(output: str) -> "Report":
        return Report(**storage.read_record(storage.join(output, NAME)))

    def with_change(self, change: Change | None) -> "Report":
        """The report of a finished run, after an update found this."""
        return replace(self, unchanged=change.unchanged, removed=change.removed) if change else self

    def show(self) -> None:
        """The summary that ends a run, on standard output."""
        console = Console(soft_wrap=True)
        for name, value in self._lines():
            console.print(f"[dim]{name:<8}[/dim] {escape(printable(value))}", highlight=False)

    def _lines(self) -> Iterator[tuple[str, str]]:
        planned_text = f" of {self.planned:,} planned" if self.planned is not None else ""
        yield "images", f"{self.rows + self.errors:,}{planned_text}: {self.rows:,} rows, {self.errors:,} errors"
        for kind, count in self.errors_by_type.items():
            yield "", f"{count:,} × {kind}"
        if self.unchanged or self.removed:
            gone = f"; {self.removed:,} are gone from the archive, see _plan/removed.parquet" if self.removed else ""
            yield "update", f"{self.unchanged:,} images or shards were done before and are unchanged{gone}"
        if self.resumed_images:
            yield "resumed", f"{self.resumed_images:,} images were done before, by earlier attempts"
        yield "speed", f"{self.images_per_second:,.1f} images/s over {self.wall_seconds:,.1f} s"
        yield "stages", " · ".join(f"{name} {seconds:,.1f} s" for name, seconds in self.stage_seconds.items())
        gpu = f" · {self.gpu_seconds:,.1f} GPU-seconds" if self.gpu_seconds else ""
        moved = f"{decimal(self.bytes_read)} read, {decimal(self.bytes_written)} written"
        yield "used", f"{self.core_seconds:,.1f} core-seconds{gpu} · {moved}"
        if self.cost:
            million = self.cost["usd_per_million_images"]
            each = f", ${million:,.2f} a million images" if million is not None else ""
            yield "cost", f"${self.cost['usd']:,.2f} on demand for this attempt on {self.cost['cluster']}{each}"
        for network, count in self.networks.items():
            if network:
                yield "network", f"{self.model}: {network}{f' ({count:,} images)' if len(self.networks) > 1 else ''}"
        named = list(filter(None, self.networks))
        if self.gpu_seconds and named and all(network.startswith("cpu") for network in named):
            yield "", "actors that were given a GPU computed on the CPU: torch could use none there"
        yield "output", f"{self.output}  ({self.parts:,} parts, {self.status})"
        yield "open it", f'pandas.read_parquet("{self.output}")'


def _cost(cluster: Cluster | None, wall_seconds: float, images: int) -> dict[str, Any] | None:
    """All machines of the cluster, on demand, for as long as this attempt took."""
    if cluster is None or cluster.usd_per_hour is None:
        return None
    usd = wall_seconds / 3600 * cluster.usd_per_hour
    return {
        "cluster": str(cluster),
        "usd_per_hour": cluster.usd_per_hour,
        "machine_hours": round(wall_seconds / 3600 * cluster.machines, 4),
        "usd": round(usd, 4),
        "usd_per_million_images": round(usd / images * 1e6, 4) if images else None,
    }


class Meter:
    """Shows a run's progress at each commit: a bar on a terminal, elsewhere a plain line, at most one in ten seconds.

    The time that is left is its own reckoning: rich forgets what is older than half a minute, and commits come rarely.
    """

    def __init__(self, plan: Plan, ledger: Ledger, console: Console) -> None:
        self.plan, self.ledger, self.console = plan, ledger, console
        self.printed = time.monotonic()
        self.first: tuple[float, int] | None = None
        self.bar: Progress | None = None
        self.task: Any = None

    def update(self) -> None:
        if self.first is None and self.ledger.current.parts:
            self.first = time.monotonic(), self._images()
        done = self.ledger.rows + self.ledger.errors
        total = self.plan.images({})
        if self.bar:
            left = f" · {left}" if (left := self._left(done, total)) else ""
            note = f"{self.rate():.1f}/s · {self.ledger.errors} errors{left}"
            self.bar.update(self.task, completed=done, total=total, note=note)
        elif time.monotonic() - self.printed >= PLAIN_LINE_SECONDS:
            self.printed = time.monotonic()
            self.console.print(self._line(done, total), highlight=False)

    def rate(self) -> float:
        """Images a second since the first part: the start would make the time that is left look long."""
        if self.first is None or self._images() == self.first[1]:
            return 0.0
        return (self._images() - self.first[1]) / (time.monotonic() - self.first[0])

    def _images(self) -> int:
        return self.ledger.current.rows + self.ledger.current.errors

    def _line(self, done: int, total: int | None) -> str:
        of = f" of {total:,} ({done / max(total, 1):.0%})" if total is not None else ""
        speed = f", {rate:.1f}/s" if (rate := self.rate()) else ""
        left = f", {left}" if (left := self._left(done, total)) else ""
        return f"{done:,} images{of}{speed}, {self.ledger.errors:,} errors{left}"

    def _left(self, done: int, total: int | None) -> str:
        """Hours, minutes and seconds to the end at the rate so far; "" where they cannot be told."""
        rate = self.rate()
        return f"{timedelta(seconds=round((total - done) / rate))} left" if total is not None and rate else ""


@contextmanager
def meter(plan: Plan, ledger: Ledger) -> Iterator[Meter]:
    """Show progress on standard error as long as the context lasts."""
    console = Console(stderr=True)
    shown = Meter(plan, ledger, console)
    if not console.is_terminal:
        yield shown
        return
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        shown.bar = bar
        shown.task = bar.add_task("images", total=None, note="starting")
        shown.update()
        yield shown
