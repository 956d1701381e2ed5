"""Removes a line of Ray's C++ code from standard error: a warning about actors that Ray has no setting for."""

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NOISE = re.compile(rb"core_worker\.cc.*has constructor arguments in the object store")
"""Ray Data starts each of its actors in a way that makes Ray warn about restarts (ray #53727)."""

JOIN_SECONDS = 1.0


@contextmanager
def filtered_native_stderr() -> Iterator[None]:
    """Leave NOISE out of what this process writes to descriptor 2. Python's standard error is not delayed.

    Does nothing if Python's standard error is not descriptor 2, such as in a job that has diverted the descriptor.
    """
    python_stderr = sys.stderr
    try:
        is_native = python_stderr.fileno() == 2
    except (OSError, ValueError, AttributeError):  # a notebook's, or none
        is_native = False
    if not is_native:
        yield
        return
    native = os.dup(2)
    read_end, write_end = os.pipe()
    os.dup2(write_end, 2)
    os.close(write_end)
    sys.stderr = os.fdopen(os.dup(native), "w", buffering=1)
    thread = threading.Thread(target=_forward, args=(read_end, native), daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()  # not closed: a logging handler may keep it
        sys.stderr = python_stderr
        os.dup2(native, 2)
        thread.join(JOIN_SECONDS)  # a child that inherited the pipe may keep it open


def _forward(read_end: int, native: int) -> None:
    """Copy lines until the pipe is closed."""
    with os.fdopen(read_end, "rb") as lines:
        for line in lines:
            if not NOISE.search(line):
                os.write(native, line)
    os.close(native)
