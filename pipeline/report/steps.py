"""Progress of a command that reads an output: a bar on a terminal for what takes more than two seconds."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SHOWN_AFTER_SECONDS = 2.0


class OnStep(Protocol):
    """Called with what the command does, and how many of all units are done. total: 0 if it is unknown."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


class _Bars:
    """The bar of the current step."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            for task in self.tasks.values():
                self.progress.remove_task(task)
            self.tasks = {what: self.progress.add_task(what, total=total or None)}
        self.progress.update(self.tasks[what], completed=done)


def _silent(what: str, done: int, total: int) -> None:
    pass


@contextmanager
def steps(*, quiet: bool = False, console: Console | None = None) -> Iterator[OnStep]:
    """Yield a function to call with the progress. Shows nothing if `quiet`, or if standard error is no terminal."""
    console = console or Console(stderr=True)
    if quiet or not console.is_terminal:
        yield _silent
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    timer = threading.Timer(SHOWN_AFTER_SECONDS, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield _Bars(progress)
    finally:
        timer.cancel()
        timer.join()
        progress.stop()
