"""What the benchmarks have in common as commands: progress, how they fail and how they are stopped."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from jobs.bench.measure import CommandFailed
from pipeline import cli
from pipeline.errors import SettingRefused, printable


def say(line: str) -> None:
    """Progress: the tables alone are standard output."""
    print(line, file=sys.stderr, flush=True)


def guarded(work: Callable[[], int]) -> int:
    """As `cli.guarded`; of a measured command that failed, the end of what it printed comes first."""

    def told() -> int:
        try:
            return work()
        except CommandFailed as error:
            for line in error.output.splitlines():
                say(f"  {printable(line)}")
            raise

    return cli.guarded(told)


def check_writable(path: Path | None) -> None:
    """Raises SettingRefused, before any work, where a file of figures could not be written."""
    if path and not path.absolute().parent.is_dir():
        raise SettingRefused(f"{path} cannot be written: there is no folder {path.parent}")


def leave_on_signals() -> None:
    """Leave as a failure leaves: no process and no archive stays behind."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
