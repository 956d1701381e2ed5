"""The bar of a command that reads an output: after two seconds, on a terminal only."""

import io
import time

import pytest
from rich.console import Console

from pipeline.report import steps as steps_module
from pipeline.report.steps import steps


def shown(*, terminal: bool, quiet: bool = False, seconds: float = 0.3) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with steps(quiet=quiet, console=console) as on_step:
        on_step("finding cells", 0, 0)
        on_step("comparing vectors", 30, 120)
        time.sleep(seconds)
        on_step("comparing vectors", 60, 120)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_a_long_step_has_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "SHOWN_AFTER_SECONDS", 0.05)
    text = shown(terminal=True)
    assert "comparing vectors" in text
    assert "25%" in text
    assert "finding cells" not in text
    assert shown(terminal=True, quiet=True) == ""
    assert shown(terminal=False) == ""


def test_a_short_command_has_no_bar() -> None:
    assert "comparing" not in shown(terminal=True, seconds=0)
