"""Follow a submitted job to its end, whatever happens to the connection meanwhile."""

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

POLL_S = 5.0
QUIET_S = 120.0
"""A stream that brings nothing for so long is opened anew: routers drop idle connections without a word."""

RETRY_S = 2.0


class LogStream(threading.Thread):
    """The log of a job from its first character. `chunks` gets its text, then None, however the stream ended.

    On a daemon thread, so that one that hangs after all is left behind.
    """

    def __init__(self, client: Client, submission_id: str) -> None:
        super().__init__(daemon=True)
        self.client = client
        self.submission_id = submission_id
        self.chunks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.position = 0  # characters that were taken from `chunks`
        self.heard_at = time.monotonic()
        self.loop = asyncio.new_event_loop()
        self.tail = self.loop.create_task(self._tail())
        self.start()

    def run(self) -> None:
        # Whatever breaks the stream: the job's state is asked for elsewhere.
        with contextlib.closing(self.loop), contextlib.suppress(Exception, asyncio.CancelledError):
            self.loop.run_until_complete(self.tail)
        self.chunks.put(None)

    def stop(self) -> None:
        """Let go of its connection."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self.loop.call_soon_threadsafe(self.tail.cancel)

    async def _tail(self) -> None:
        async for text in self.client.tail_job_logs(self.submission_id):
            self.chunks.put(text)


@dataclass
class Follower:
    """Prints a job's log to standard output, no character of it twice, until the job has ended.

    patience_s: how long the cluster may be out of reach. how_to_attach: the command to say when it was longer.
    """

    client: Client
    submission_id: str
    patience_s: float
    how_to_attach: str
    printed: int = 0
    _told: set[str] = field(default_factory=set)

    def follow(self) -> JobDetails:
        """The job's last state. Raises NightshiftError when the cluster stays out of reach or forgot the job."""
        stream = LogStream(self.client, self.submission_id)
        try:
            while True:
                has_ended = self._show(stream, POLL_S)
                details, was_lost = self._ask()
                if details.status.is_terminal():
                    self._show_the_rest(stream)
                    return details
                if details.status == JobStatus.PENDING:
                    self._tell_once(f"not started yet: {details.message}")
                if has_ended and not was_lost:
                    cli.tell("the connection broke off; reading on")
                    time.sleep(RETRY_S)
                if has_ended or was_lost or time.monotonic() - stream.heard_at > QUIET_S:
                    stream.stop()
                    stream = LogStream(self.client, self.submission_id)
        finally:
            stream.stop()

    def _show(self, stream: LogStream, timeout_s: float) -> bool:
        """Print what comes until nothing does for a while; True when the stream has ended."""
        while True:
            try:
                text = stream.chunks.get(timeout=timeout_s)
            except queue.Empty:
                return False
            if text is None:
                return True
            stream.heard_at = time.monotonic()
            stream.position += len(text)
            self._print(text, stream.position)

    def _print(self, text: str, end: int) -> None:
        """Print what is new of a text that ends at this character of the log."""
        if end > self.printed:
            print(text[-(end - self.printed) :], end="", flush=True)
            self.printed = end

    def _show_the_rest(self, stream: LogStream) -> None:
        self._show(stream, timeout_s=0.1)
        try:
            log = self.client.get_job_logs(self.submission_id)
        except (OSError, RuntimeError) as error:
            cli.tell(f"the end of the log could not be had: {error}")
        else:
            self._print(log, len(log))

    def _ask(self) -> tuple[JobDetails, bool]:
        """The job's state, and whether the cluster was out of reach meanwhile."""
        lost_at = None
        while True:
            try:
                details = self.client.get_job_info(self.submission_id)
            except (OSError, RuntimeError) as error:
                if f"{self.submission_id} does not exist" in str(error):
                    raise NightshiftError(
                        f"the cluster knows no job {self.submission_id}; if it was started anew since, so must be the "
                        "job: submit it again, it goes on where it was"
                    ) from error
                lost_at = self._wait(lost_at, error)
            else:
                if lost_at is not None:
                    cli.tell(f"connected again after {time.monotonic() - lost_at:.0f} seconds")
                return details, lost_at is not None

    def _wait(self, lost_at: float | None, error: Exception) -> float:
        """Sleep before the next try. Returns since when the cluster is out of reach."""
        now = time.monotonic()
        if lost_at is None:
            cli.tell(
                f"the cluster is out of reach ({error}); trying for {self.patience_s / 60:g} minutes, the job goes on"
            )
        elif now - lost_at > self.patience_s:
            raise NightshiftError(
                f"the cluster was out of reach for {self.patience_s / 60:g} minutes, and the job may still go on; "
                f"follow it again with: {self.how_to_attach}"
            )
        time.sleep(RETRY_S)
        return now if lost_at is None else lost_at

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            cli.tell(message)


def exit_code(details: JobDetails) -> int:
    """The job's own; 143 if it was stopped, 128 + the signal if that killed it, 1 if Ray does not know."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 143
    code = details.driver_exit_code
    if code is None:
        return 1
    return int(code) if code >= 0 else 128 - int(code)
