"""Common parts of the benchmarks as commands: progress, failures and signals."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from jobs.bench.harness.measure import CommandFailed
from pipeline import cli
from pipeline.errors import SettingRefused, printable


def say(line: str) -> None:
    """Print progress on standard error; standard output is for the tables."""
    print(line, file=sys.stderr, flush=True)


def guarded(work: Callable[[], int]) -> int:
    """Like `cli.guarded`; first print the end of the output of a measured command that failed."""

    def work_or_print() -> int:
        try:
            return work()
        except CommandFailed as error:
            for line in error.output.splitlines():
                say(f"  {printable(line)}")
            raise

    return cli.guarded(work_or_print)


def check_writable(path: Path | None) -> None:
    """Raise SettingRefused if the folder of an output file does not exist."""
    if path and not path.absolute().parent.is_dir():
        raise SettingRefused(f"{path} cannot be written: the folder {path.parent} does not exist")


def exit_on_signals() -> None:
    """Exit as after a failure, so that no process and no archive is left."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda number, _: sys.exit(128 + number))
