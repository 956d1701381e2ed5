"""Progress of a run whose commits are minutes apart."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from rich.progress import Progress

from pipeline.output.commit import Commit
from pipeline.output.ledger import Ledger
from pipeline.planning import plan as plans
from pipeline.report import report as reports
from pipeline.report.progress import TAR_OVERHEAD_BYTES, Meter


class Run:
    """One commit per minute with 100 images. clock: the time that the meter reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, planned: int | None) -> None:
        self.clock, self.commits = 1_000.0, 0
        monkeypatch.setattr(reports.time, "monotonic", lambda: self.clock)
        plan = SimpleNamespace(images=lambda totals: planned, uncounted_shards=planned is None, size_bytes=0)
        self.ledger, self.screen = Ledger("out", attempt=1), io.StringIO()
        self.meter = Meter(plan, self.ledger, Console(file=self.screen, width=100))  # type: ignore[arg-type]

    def commit(self, bytes_read: int = 0) -> None:
        self.clock += 60
        first = 100 * self.commits
        self.commits += 1
        done = {0: ((first, first + 100),)}
        name = f"part-1-0-{first}"
        commit = Commit(name, 1, f"{first}.parquet", None, done, {}, rows=99, errors=1, bytes_read=bytes_read)
        self.ledger.accept(commit)
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


def test_a_kept_column_without_any_value_is_named(tmp_path: Path) -> None:
    plan = plans.Plan(str(tmp_path), (), 0, 0, pa.schema([]), np.empty(0, np.int64), {})
    ledger = Ledger(str(tmp_path), attempt=1)
    for start, nulls in ((0, {"json": 2, "cls": 2, "old": 2}), (2, {"json": 2, "cls": 1})):
        done = {0: ((start, start + 2),)}
        ledger.accept(Commit(f"part-1-0-{start}", 1, f"{start}.parquet", None, done, {}, rows=2, errors=0, nulls=nulls))
    report = reports.Report.of(plan, ledger, "resnet18", "done", 1.0, keep=["json", "cls", "old", "txt"])
    assert report.null_columns == ["json"]
    assert ("keep", "json: no image has a value; check the names in --keep") in report._lines()


def test_images_of_one_colour_after_scaling_are_in_the_report(tmp_path: Path) -> None:
    plan = plans.Plan(str(tmp_path), (), 0, 0, pa.schema([]), np.empty(0, np.int64), {})
    ledger = Ledger(str(tmp_path), attempt=2)
    for attempt, constant in ((1, {0: ((0, 2),)}), (2, {0: ((3, 4),)})):
        done = {0: ((2 * attempt - 2, 2 * attempt),)}
        ledger.accept(Commit(f"part-{attempt}", attempt, "p", None, done, {}, rows=2, errors=0, constant=constant))
    reports.Report.of(plan, ledger, "resnet18", "done", 1.0).save()
    assert json.loads((tmp_path / "_report.json").read_text())["constant_images"] == 3
    lines = list(reports.Report.load(str(tmp_path))._lines())
    assert (
        "scale",
        "3 images are one colour after --scale: all values are equal, outside of its range, or no data",
    ) in lines


def test_the_total_of_tars_is_estimated_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, planned=None)
    run.meter.plan.size_bytes = 1_000 * (10_000 + TAR_OVERHEAD_BYTES)
    run.commit(bytes_read=1_000_000)
    run.commit(bytes_read=1_000_000)
    last = run.screen.getvalue().splitlines()[-1]
    assert last == "200 images of about 1,000 (20%), 1.7/s, 2 errors, 0:08:00 left"
    for _ in range(10):
        run.commit(bytes_read=1_000_000)
    assert "1,200 images of about 1,212 (99%)" in run.screen.getvalue(), "more than expected, and not done"


def test_no_remaining_time_is_shown_without_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, planned=None)
    run.commit()
    run.commit()
    assert run.screen.getvalue().splitlines()[-1] == "200 images, 1.7/s, 2 errors"
