"""Memory that threads share: what does not fit beside the others waits."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


class MemoryBudget:
    """So many bytes for all threads of this process; what is larger than that goes alone on the whole machine.

    Where every process of a machine has its share of the memory as its budget, they all together take no more than the
    memory that was shared out and one large item.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.changed = threading.Condition()

    @contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Hold so many bytes; wait until there are."""
        if size_bytes > self.limit_bytes:
            with FileLock(_lock_file()):  # let go of by the operating system if this process dies
                yield
            return
        with self.changed:
            self.changed.wait_for(lambda: self.used_bytes + size_bytes <= self.limit_bytes)
            self.used_bytes += size_bytes
        try:
            yield
        finally:
            with self.changed:
                self.used_bytes -= size_bytes
                self.changed.notify_all()


def _lock_file() -> Path:
    return Path(tempfile.gettempdir()) / f"nightshift-large-image-{os.getuid()}.lock"
