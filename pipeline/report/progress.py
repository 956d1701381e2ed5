"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pipeline.errors import printable
from pipeline.output.ledger import Ledger
from pipeline.planning.left_out import describe
from pipeline.planning.plan import Plan
from pipeline.report import messages

PLAIN_LINE_SECONDS = 10.0
TAR_OVERHEAD_BYTES = 768
"""Per image: its header, and on average half a block of padding."""
MAX_ESTIMATED_SHARE = 0.99
"""An estimated total never says that a run is done."""


class Meter:
    """Shows the progress of a run after each commit.

    Updates a bar on a terminal. Elsewhere prints a line, at most one per PLAIN_LINE_SECONDS. Computes the remaining
    time itself: rich ignores progress that is older than 30 seconds, and commits may be minutes apart.
    """

    def __init__(self, plan: Plan, ledger: Ledger, console: Console) -> None:
        self.plan, self.ledger, self.console = plan, ledger, console
        self.printed_at = time.monotonic()
        self.first: tuple[float, int] | None = None
        self.bar: Progress | None = None
        self.task: Any = None

    def update(self) -> None:
        """Show the state of the ledger. Called after each commit."""
        if self.first is None and self.ledger.current.parts:
            self.first = time.monotonic(), self._images()
        done = self.ledger.rows + self.ledger.errors + self.ledger.empty
        total = self.plan.images({})
        if total is None:
            total = self._estimated_total(done)
        messages.detail(self._line(done, total))
        if self.bar:
            left = f" · {left}" if (left := self._left(done, total)) else ""
            note = f"{self.rate():.1f}/s · {self.ledger.errors} errors{left}"
            self.bar.update(self.task, completed=done, total=total, note=note)
        elif time.monotonic() - self.printed_at >= PLAIN_LINE_SECONDS:
            self.printed_at = time.monotonic()
            self.console.print(self._line(done, total), highlight=False)

    def _estimated_total(self, done: int) -> int | None:
        """Estimated images of shards that only reading can count, such as tars: by the bytes that were read."""
        earlier, current = self.ledger.earlier, self.ledger.current
        read_bytes = earlier.bytes_read + current.bytes_read + TAR_OVERHEAD_BYTES * done
        if not done or not self.plan.size_bytes:
            return None
        return round(done / min(MAX_ESTIMATED_SHARE, read_bytes / self.plan.size_bytes))

    def rate(self) -> float:
        """Images per second since the first part of this attempt; 0 until there is a second one.

        Without the start-up time, which would make the remaining time too long.
        """
        if self.first is None or self._images() == self.first[1]:
            return 0.0
        return (self._images() - self.first[1]) / (time.monotonic() - self.first[0])

    def _images(self) -> int:
        return self.ledger.current.rows + self.ledger.current.errors + self.ledger.current.empty

    def _line(self, done: int, total: int | None) -> str:
        about = "about " if self.plan.uncounted_shards else ""
        of = f" of {about}{total:,} ({done / max(total, 1):.0%})" if total is not None else ""
        speed = f", {rate:.1f}/s" if (rate := self.rate()) else ""
        left = f", {left}" if (left := self._left(done, total)) else ""
        return f"{done:,} images{of}{speed}, {self.ledger.errors:,} errors{left}"

    def _left(self, done: int, total: int | None) -> str:
        """Remaining hours, minutes and seconds at the rate so far; "" if the rate or the total is unknown."""
        rate = self.rate()
        return f"{timedelta(seconds=round((total - done) / rate))} left" if total is not None and rate else ""


@contextmanager
def meter(plan: Plan, ledger: Ledger) -> Iterator[Meter]:
    """Show progress on standard error until the context ends. First name the files that are not read."""
    console = Console(stderr=True, soft_wrap=True)
    if plan.left_out:
        console.print(f"left out: {printable(describe(plan.left_out))}", highlight=False, markup=False)
    progress = Meter(plan, ledger, console)
    if messages.is_quiet():
        progress.printed_at = math.inf
    if not console.is_terminal or messages.is_quiet():
        yield progress
        return
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        progress.bar = bar
        progress.task = bar.add_task("images", total=None, note="starting")
        progress.update()
        yield progress
