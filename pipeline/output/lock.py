"""A heartbeat lock on an output directory. It tells a second driver early; correctness rests on the ledger."""

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from typing import Any

from pipeline.errors import OutputLocked, OutputRefused, StorageRefused
from pipeline.storage import access, uris

LOCK, RUN = "_lock.json", "_run.json"
HEARTBEAT_SECONDS = 5.0
LEASE_SECONDS = 20.0

UNWRITABLE = (errno.EROFS, errno.ENOTSUP)


def taken_over(output: str) -> OutputLocked:
    """The error that ends a driver that has been replaced."""
    return OutputLocked(f"another driver took over {output} while this one was paused; this one stops")


def deleted(output: str) -> OutputRefused:
    """The error that ends a driver whose output has been removed."""
    return OutputRefused(
        f"{output} was deleted while this run was writing to it; run the same command again to start anew"
    )


def refuse_if_held(output: str) -> None:
    """Raise OutputLocked while a driver works on the output. Writes nothing, and waits up to LEASE_SECONDS."""
    Lock(output).wait_until_free()


class Lock:
    """A context that holds the output directory for one driver, with a heartbeat every HEARTBEAT_SECONDS.

    An abandoned lock is taken over at once if its process ran on this machine and has ended. Otherwise it is taken over
    after LEASE_SECONDS without a heartbeat, by the clock of the waiting driver: clocks of two machines are never
    compared. Entering raises OutputLocked while another driver holds the lock, and OutputRefused if the output cannot
    be written.

    lost: set when another driver has taken the lock, or the output was deleted. deleted: set only if it was deleted.
    slow: set when a heartbeat took so long that another driver may have held the lock in between.
    beat_at: time of the last heartbeat, in seconds since the epoch.
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self.uri = uris.join(output, LOCK)
        self.owner = {
            "id": uuid.uuid4().hex,
            "host": _machine(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
        }
        self.lost, self.deleted, self.slow = threading.Event(), threading.Event(), threading.Event()
        self.beat_at = time.time()
        self._has_run = False  # this driver has seen `_run.json`
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)

    def __enter__(self) -> "Lock":
        try:
            self._acquire()
        except OSError as error:
            if not isinstance(error, PermissionError | NotADirectoryError) and error.errno not in UNWRITABLE:
                raise
            remedy = (
                "use another directory or a bucket" if error.errno in UNWRITABLE else "use one with write permission"
            )
            raise OutputRefused(f"--output {self.output} cannot be written: {error}; {remedy}") from error
        self.beat_at = time.time()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=1)  # do not wait longer for a store that does not answer
        with contextlib.suppress(OSError, StorageRefused):
            if not self.lost.is_set() and self._read().get("id") == self.owner["id"]:
                access.delete(self.uri)

    def _acquire(self) -> None:
        beat = self._content(0)
        while True:
            with contextlib.suppress(FileExistsError):
                access.create(self.uri, beat)
                return
            if self.wait_until_free():
                access.write(self.uri, beat)
                return

    def check(self) -> None:
        """Raise OutputLocked if another driver has taken over.

        Trusts this process's own heartbeat if it is recent, else reads the lock.
        """
        if abs(time.time() - self.beat_at) > LEASE_SECONDS / 2 and not self._may_be_mine(self._read()):
            self.lost.set()
        if self.deleted.is_set():
            raise deleted(self.output)
        if self.lost.is_set():
            raise taken_over(self.output)

    def _beat(self) -> None:
        for number in range(1, 1 << 62):
            if self._stop.wait(HEARTBEAT_SECONDS):
                return
            began = time.time()
            with contextlib.suppress(OSError, StorageRefused):  # the next beat makes up for it
                content = self._read()
                if not self._may_be_mine(content):
                    self.lost.set()
                    return
                if self._is_deleted(bool(content)):
                    self.deleted.set()
                    self.lost.set()
                    return
                (access.write if content else access.create)(self.uri, self._content(number))
                self.beat_at = time.time()
            if abs(time.time() - began) > LEASE_SECONDS / 2:
                self.slow.set()

    def _is_deleted(self, has_lock: bool) -> bool:
        """True if the lock and a `_run.json` that existed are gone."""
        if has_lock and self._has_run:
            return False
        try:
            access.head(uris.join(self.output, RUN))
        except FileNotFoundError:
            return self._has_run and not has_lock
        self._has_run = True
        return False

    def wait_until_free(self) -> bool:
        """Wait until a lock that exists is abandoned; return False if it was removed. Raises OutputLocked."""
        first = self._read()
        deadline = time.monotonic() + LEASE_SECONDS
        while not self._owner_is_gone(first) and time.monotonic() < deadline:
            time.sleep(min(1.0, LEASE_SECONDS / 4))
            content = self._read()
            if not content:
                return False
            if content != first:
                host = str(content.get("host", "?")).partition("/")[0]
                raise OutputLocked(
                    f"{self.output} is in use by process {content.get('pid')} on {host}; wait until it ends, or stop it"
                )
        return True

    def _may_be_mine(self, content: dict[str, Any]) -> bool:
        """True if the lock is this driver's, or is missing or half written.

        A missing lock counts as lost after LEASE_SECONDS: another driver had the time to take it, work and release it.
        """
        if not content:
            return abs(time.time() - self.beat_at) <= LEASE_SECONDS
        return bool(content.get("id") == self.owner["id"])

    def _owner_is_gone(self, owner: dict[str, Any]) -> bool:
        if not owner:
            return True
        return bool(owner["host"] == self.owner["host"] and _process_start(owner["pid"]) != owner["process_start"])

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(access.read(self.uri)))
        except (FileNotFoundError, ValueError):
            return {}

    def _content(self, beat: int) -> bytes:
        return json.dumps({**self.owner, "beat": beat}).encode()


def _machine() -> str:
    """Host name, boot id and process namespace. Process ids can be compared only if all three are equal."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            ids = f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        ids = ""
    return f"{socket.gethostname()}/{ids}"


def _process_start(pid: int) -> str:
    """Start time of a process of this machine, in clock ticks since boot; "" if it has ended or /proc is missing."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""
