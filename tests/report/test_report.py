"""Progress of a run whose commits are minutes apart."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress

from pipeline.output.commit import Commit
from pipeline.output.ledger import Ledger
from pipeline.report import report as reports
from pipeline.report.progress import Meter


class Run:
    """One commit per minute with 100 images. clock: the time that the meter reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, planned: int | None) -> None:
        self.clock, self.commits = 1_000.0, 0
        monkeypatch.setattr(reports.time, "monotonic", lambda: self.clock)
        plan = SimpleNamespace(images=lambda totals: planned)
        self.ledger, self.screen = Ledger("out", attempt=1), io.StringIO()
        self.meter = Meter(plan, self.ledger, Console(file=self.screen, width=100))  # type: ignore[arg-type]

    def commit(self) -> None:
        self.clock += 60
        first = 100 * self.commits
        self.commits += 1
        done = {0: ((first, first + 100),)}
        self.ledger.accept(Commit(f"part-1-0-{first}", 1, f"{first}.parquet", None, done, {}, rows=99, errors=1))
        self.meter.update()

    def bar(self) -> str:
        """The text next to the bar."""
        (task,) = self.meter.bar.tasks  # type: ignore[union-attr]
        return str(task.fields["note"])


def test_the_bar_shows_the_remaining_time_if_commits_are_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, planned=10_000)
    run.meter.bar = Progress(disable=True)
    run.meter.task = run.meter.bar.add_task("images", total=None, note="starting")
    run.commit()
    assert run.bar() == "0.0/s · 1 errors", "one commit gives no rate"
    for _ in range(3):
        run.commit()
    assert run.bar() == "1.7/s · 4 errors · 1:36:00 left"


def test_plain_lines_are_at_least_ten_seconds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, planned=10_000)
    run.commit()
    run.commit()
    run.meter.update()
    lines = run.screen.getvalue().splitlines()
    assert lines == ["100 images of 10,000 (1%), 1 errors", "200 images of 10,000 (2%), 1.7/s, 2 errors, 1:38:00 left"]


def test_no_remaining_time_is_shown_while_shards_are_uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, planned=None)
    run.commit()
    run.commit()
    assert run.screen.getvalue().splitlines()[-1] == "200 images, 1.7/s, 2 errors"
