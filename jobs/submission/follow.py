"""Follow a submitted job to its end, through lost connections."""

import asyncio
import contextlib
import queue
import threading
import time
from dataclasses import dataclass, field

from ray.job_submission import JobDetails, JobStatus

from jobs.submission.client import Client
from pipeline import cli
from pipeline.errors import NightshiftError

POLL_SECONDS = 5.0
IDLE_TIMEOUT_SECONDS = 120.0
"""A log stream without data is opened again after this time, because routers drop idle connections silently."""

RETRY_SECONDS = 2.0


class LogStream(threading.Thread):
    """Reads the log of a job from its first character, on a daemon thread, which does not delay the end of the process.

    chunks: the text in pieces, then None when the stream has ended, with or without an error.
    position: number of characters taken from `chunks`. heard_at: monotonic time of the last piece.
    """

    def __init__(self, client: Client, submission_id: str) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.submission_id = submission_id
        self.chunks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.position = 0
        self.heard_at = time.monotonic()
        self.loop = asyncio.new_event_loop()
        self.tail = self.loop.create_task(self._tail())
        self.start()

    def run(self) -> None:
        # Ignore every error of the stream: `Follower` asks for the job's state separately.
        with contextlib.closing(self.loop), contextlib.suppress(Exception, asyncio.CancelledError):
            self.loop.run_until_complete(self.tail)
        self.chunks.put(None)

    def stop(self) -> None:
        """Close the connection."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.tail.cancel)

    async def _tail(self) -> None:
        async for text in self.client.tail_job_logs(self.submission_id):
            self.chunks.put(text)


@dataclass
class Follower:
    """Prints a job's log on standard output, each character once, until the job has ended.

    reconnect_seconds: how long the cluster may be unreachable. attach_command: shown after a longer time.
    """

    client: Client
    submission_id: str
    reconnect_seconds: float
    attach_command: str
    printed: int = 0
    _logged: set[str] = field(default_factory=set)

    def follow(self) -> JobDetails:
        """Return the job's last state. Raises NightshiftError if the cluster stays unreachable or has lost the job."""
        stream = LogStream(self.client, self.submission_id)
        try:
            while True:
                has_ended = self._print_stream(stream, POLL_SECONDS)
                details, was_lost = self._get_details()
                if details.status.is_terminal():
                    self._print_rest(stream)
                    return details
                if details.status == JobStatus.PENDING:
                    self._log_once(f"not started yet: {details.message}")
                if has_ended and not was_lost:
                    cli.log("the connection was lost; connecting again")
                    time.sleep(RETRY_SECONDS)
                if has_ended or was_lost or time.monotonic() - stream.heard_at > IDLE_TIMEOUT_SECONDS:
                    stream.stop()
                    stream = LogStream(self.client, self.submission_id)
        finally:
            stream.stop()

    def _print_stream(self, stream: LogStream, timeout_seconds: float) -> bool:
        """Print the log until no text comes for the timeout. Returns True if the stream has ended."""
        while True:
            try:
                text = stream.chunks.get(timeout=timeout_seconds)
            except queue.Empty:
                return False
            if text is None:
                return True
            stream.heard_at = time.monotonic()
            stream.position += len(text)
            self._print(text, stream.position)

    def _print(self, text: str, end: int) -> None:
        """Print the new characters of a text. end: position of its last character in the log."""
        if end > self.printed:
            print(text[-(end - self.printed) :], end="", flush=True)
            self.printed = end

    def _print_rest(self, stream: LogStream) -> None:
        self._print_stream(stream, timeout_seconds=0.1)
        try:
            log = self.client.get_job_logs(self.submission_id)
        except (OSError, RuntimeError) as error:
            cli.log(f"the end of the log could not be read: {error}")
        else:
            self._print(log, len(log))

    def _get_details(self) -> tuple[JobDetails, bool]:
        """Return the job's state, and whether the cluster was unreachable for a time."""
        lost_at = None
        while True:
            try:
                details = self.client.get_job_info(self.submission_id)
            except (OSError, RuntimeError) as error:
                if f"{self.submission_id} does not exist" in str(error):
                    raise NightshiftError(
                        f"the cluster has no job {self.submission_id}; if the cluster has restarted, submit the job "
                        "again, which continues the run"
                    ) from error
                lost_at = self._wait(lost_at, error)
            else:
                if lost_at is not None:
                    cli.log(f"connected again after {time.monotonic() - lost_at:.0f} seconds")
                return details, lost_at is not None

    def _wait(self, lost_at: float | None, error: Exception) -> float:
        """Sleep before the next try. Returns the monotonic time since when the cluster is unreachable."""
        now = time.monotonic()
        if lost_at is None:
            cli.log(
                f"the cluster is unreachable ({error}); trying for {self.reconnect_seconds / 60:g} minutes, while the "
                "job continues"
            )
        elif now - lost_at > self.reconnect_seconds:
            raise NightshiftError(
                f"the cluster was unreachable for {self.reconnect_seconds / 60:g} minutes, and the job may still run; "
                f"follow it again with: {self.attach_command}"
            )
        time.sleep(RETRY_SECONDS)
        return now if lost_at is None else lost_at

    def _log_once(self, message: str) -> None:
        if message not in self._logged:
            self._logged.add(message)
            cli.log(message)


def exit_code(details: JobDetails) -> int:
    """The exit code of an ended job: 143 if it was stopped, 128 + the signal that killed it, 1 if Ray has none."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 143
    code = details.driver_exit_code
    if code is None:
        return 1
    return int(code) if code >= 0 else 128 - int(code)
