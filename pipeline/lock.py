"""The lock of an output directory: its heartbeat spares a second driver wasted work; the ledger says what counts."""

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from pipeline import storage
from pipeline.errors import OutputLocked, OutputRefused, StorageRefused

LOCK = "_lock.json"
HEARTBEAT_SECONDS = 5.0
LEASE_SECONDS = 20.0


def taken_over(output: str) -> OutputLocked:
    """What ends a driver that was replaced."""
    return OutputLocked(f"another driver took over {output} while this one stood still; this one stops")


class Lock:
    """One driver at a time on an output directory, as long as its heart beats.

    A lock left behind is taken over at once if its process is gone from this machine, else after its heartbeat has
    stood still for LEASE_SECONDS by the clock of whoever waits: clocks of two machines are never compared.

    lost: another driver has it. slow: a beat took so long that another one may have had it meanwhile.
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self.uri = storage.join(output, LOCK)
        self.owner = {
            "id": uuid.uuid4().hex,
            "host": _machine(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
        }
        self.lost, self.slow = threading.Event(), threading.Event()
        self.beaten = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)

    def __enter__(self) -> "Lock":
        try:
            self._take()
        except OSError as error:
            if not isinstance(error, PermissionError | NotADirectoryError) and error.errno != errno.EROFS:
                raise
            raise OutputRefused(
                f"--output {self.output} cannot be written: {error}; name a directory or bucket that you may write to"
            ) from error
        self.beaten = time.time()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=1)  # a store that does not answer must not hold up the end
        with contextlib.suppress(OSError, StorageRefused):
            if not self.lost.is_set() and self._read().get("id") == self.owner["id"]:
                storage.delete(self.uri)

    def _take(self) -> None:
        beat = self._content(0)
        while True:
            with contextlib.suppress(FileExistsError):
                storage.create(self.uri, beat)
                return
            if self._wait_for_stale():
                storage.write(self.uri, beat)
                return

    def check(self) -> None:
        """Raise OutputLocked if another driver has taken over. By its own heart, unless that has stood still."""
        if abs(time.time() - self.beaten) > LEASE_SECONDS / 2 and not self._may_be_mine(self._read()):
            self.lost.set()
        if self.lost.is_set():
            raise taken_over(self.output)

    def _beat(self) -> None:
        for number in range(1, 1 << 62):
            if self._stop.wait(HEARTBEAT_SECONDS):
                return
            began = time.time()
            with contextlib.suppress(OSError, StorageRefused):  # a beat missed is made up for by the next
                found = self._read()
                if not self._may_be_mine(found):
                    self.lost.set()
                    return
                (storage.write if found else storage.create)(self.uri, self._content(number))
                self.beaten = time.time()
            if abs(time.time() - began) > LEASE_SECONDS / 2:
                self.slow.set()

    def _wait_for_stale(self) -> bool:
        """True where the lock that is there counts no more, False where there is none any more."""
        seen = self._read()
        deadline = time.monotonic() + LEASE_SECONDS
        while not self._owner_is_gone(seen) and time.monotonic() < deadline:
            time.sleep(min(1.0, LEASE_SECONDS / 4))
            found = self._read()
            if not found:
                return False
            if found != seen:
                host = str(found.get("host", "?")).partition("/")[0]
                raise OutputLocked(
                    f"{self.output} is in use by process {found.get('pid')} on {host}; wait until it ends, or stop it"
                )
        return True

    def _may_be_mine(self, found: dict[str, Any]) -> bool:
        """A lock that is missing, or is being written, is nobody else's; unless there was the time to take it, to work,
        and to give it back."""
        if not found:
            return abs(time.time() - self.beaten) <= LEASE_SECONDS
        return bool(found.get("id") == self.owner["id"])

    def _owner_is_gone(self, owner: dict[str, Any]) -> bool:
        if not owner:
            return True
        return bool(owner["host"] == self.owner["host"] and _process_start(owner["pid"]) != owner["process_start"])

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(storage.read(self.uri)))
        except (FileNotFoundError, ValueError):
            return {}

    def _content(self, beat: int) -> bytes:
        return json.dumps({**self.owner, "beat": beat}).encode()


def _machine() -> str:
    """Host name, boot id and namespace of processes: process numbers mean something only between equal ones."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            more = f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        more = ""
    return f"{socket.gethostname()}/{more}"


def _process_start(pid: int) -> str:
    """When a process of this machine started, in clock ticks; "" if there is none (or, without /proc, unknown)."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""
