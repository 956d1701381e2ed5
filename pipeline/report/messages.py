"""Messages of a job: on standard error, and with times in the file of --log-file."""

import sys
import threading
import time
from dataclasses import dataclass
from typing import IO

from pipeline.config import flag
from pipeline.errors import SettingRefused, printable

PREFIX = "nightshift: "


@dataclass
class MessageFlags:
    """How much a job says. Results and errors are printed in any case."""

    quiet: bool = flag("print only errors and warnings on standard error", False)
    verbose: bool = flag("also print each step, each part and the causes of errors", False)
    log_file: str | None = flag("append all messages with their times to a local file", None, metavar="FILE")

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise SettingRefused("--quiet and --verbose contradict each other: use one of them")


class _Messages:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.flags = MessageFlags()
        self.file: IO[str] | None = None


_messages = _Messages()


def configure(flags: MessageFlags) -> None:
    """Apply the flags to this process. Raises SettingRefused if the log file cannot be opened."""
    if _messages.file:
        _messages.file.close()
    _messages.flags, _messages.file = flags, None
    if flags.log_file:
        try:
            _messages.file = open(flags.log_file, "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise SettingRefused(f"--log-file {flags.log_file} cannot be written: {error.strerror}") from error


def is_quiet() -> bool:
    """Whether only errors and warnings are shown."""
    return _messages.flags.quiet


def error(text: str) -> None:
    """Print an error or a warning, in any case."""
    _write(text, shown=True)


def say(text: str) -> None:
    """Print a message, unless --quiet is set."""
    _write(text, shown=not _messages.flags.quiet)


def detail(text: str) -> None:
    """Print a message if --verbose is set."""
    _write(text, shown=_messages.flags.verbose)


def _write(text: str, shown: bool) -> None:
    line = printable(text)
    with _messages.lock:
        if shown:
            print(f"{PREFIX}{line}", file=sys.stderr, flush=True)
        if _messages.file:
            print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}", file=_messages.file, flush=True)
