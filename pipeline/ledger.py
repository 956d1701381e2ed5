"""What of a run is done: commits and attempts.

A commit is a small JSON record, written after its part and only if there is none of its name. It counts if the newest
attempt wrote it, or if it stands in the list that the newest attempt began with; any other came from a driver that had
been replaced (paused and woken, cut off) and does not exist for anybody. Correctness rests on that alone, and not on
the lock (lock.py).
"""

import json
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from pipeline import storage
from pipeline.coverage import Coverage, Ranges
from pipeline.errors import NightshiftError, OutputLocked, OutputRefused, first_line
from pipeline.lock import taken_over
from pipeline.prefetch import ordered_map

COMMITS, ATTEMPTS = "_commits", "_attempts"
READ_THREADS = 16


@dataclass(frozen=True, slots=True)
class Commit:
    """One part that exists. Named `part-<attempt>-<shard>-<row>` after the first row that it covers.

    part, errors_part: file names in the output and in `_errors/`, None where there were no such rows.
    ranges: rows covered, by shard. totals: number of rows of the shards whose end was seen.
    seconds: wall time by stage, summed over images. errors_by_type: `<stage>/<error_type>` → images.
    networks: how the network ran (device, number format) → images.
    core_seconds: CPU time of the worker processes. gpu_seconds: in which a GPU had a batch under way, times its share.
    bytes_read: of encoded images. bytes_written: of the part and its errors.
    """

    name: str
    attempt: int
    part: str | None
    errors_part: str | None
    ranges: dict[int, Ranges]
    totals: dict[int, int]
    rows: int
    errors: int
    errors_by_type: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    networks: dict[str, int] = field(default_factory=dict)
    core_seconds: float = 0.0
    gpu_seconds: float = 0.0
    bytes_written: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes) -> "Commit":
        record = json.loads(text)
        ranges = {int(shard): tuple((a, b) for a, b in pairs) for shard, pairs in record.pop("ranges").items()}
        totals = {int(shard): rows for shard, rows in record.pop("totals").items()}
        return Commit(ranges=ranges, totals=totals, **record)


@dataclass
class Tally:
    """Sums over commits."""

    rows: int = 0
    errors: int = 0
    parts: int = 0
    bytes_read: int = 0
    errors_by_type: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    networks: Counter[str] = field(default_factory=Counter)
    core_seconds: float = 0.0
    gpu_seconds: float = 0.0
    bytes_written: int = 0

    def add(self, commit: Commit) -> None:
        self.rows += commit.rows
        self.errors += commit.errors
        self.parts += commit.part is not None
        self.bytes_read += commit.bytes_read
        self.errors_by_type.update(commit.errors_by_type)
        self.seconds.update(commit.seconds)
        self.networks.update(commit.networks)
        self.core_seconds += commit.core_seconds
        self.gpu_seconds += commit.gpu_seconds
        self.bytes_written += commit.bytes_written


class Ledger:
    """The accepted commits of an output directory: what they cover and what they add up to.

    earlier: sums over what this attempt found; current: sums over what it added.
    """

    def __init__(self, output: str, attempt: int) -> None:
        self.output = output
        self.attempt = attempt
        self.coverage = Coverage()
        self.names: set[str] = set()
        self.earlier = Tally()
        self.current = Tally()

    def accept(self, commit: Commit, tally: Tally | None = None) -> bool:
        """Count a commit in, unless one of its rows is covered already."""
        if commit.name in self.names:
            return False
        if any(self.coverage.overlaps(shard, ranges) for shard, ranges in commit.ranges.items()):
            return False
        for shard, ranges in commit.ranges.items():
            self.coverage.add(shard, ranges)
        self.coverage.totals.update(commit.totals)
        self.names.add(commit.name)
        (tally or (self.current if commit.attempt == self.attempt else self.earlier)).add(commit)
        return True

    @property
    def rows(self) -> int:
        return self.earlier.rows + self.current.rows

    @property
    def errors(self) -> int:
        return self.earlier.errors + self.current.errors


def begin(output: str, revise: Callable[[Commit, int], Commit | None] | None = None) -> Ledger:
    """Start the next attempt: accept what is there and fix the list of it, so that nothing older can be added later.

    revise: what becomes of a commit, given the new attempt's number: itself, one that stands in its place (written
    before the attempt exists, so that both change over in one step), or None.
    """
    last = last_attempt(output)
    ledger = Ledger(output, last + 1)
    for commit in valid_commits(output, last):
        revised = revise(commit, ledger.attempt) if revise else commit
        if revised:
            ledger.accept(revised, ledger.earlier)
    _create_attempt(output, ledger.attempt, sorted(ledger.names))
    return ledger


def _create_attempt(output: str, number: int, accepts: list[str], **more: str) -> None:
    record = {
        "attempt": number,
        "id": uuid.uuid4().hex,  # no two drivers ever write the same record: a store tells them apart by the bytes
        "began": _now(),
        "host": socket.gethostname(),
        "accepts": accepts,
        **more,
    }
    try:
        storage.create(_attempt_uri(output, number), json.dumps(record).encode())
    except FileExistsError as error:
        raise OutputLocked(f"another driver started on {output} in this moment; let it work, or try again") from error


def read(output: str) -> Ledger:
    """The accepted commits as they are, without starting an attempt."""
    last = last_attempt(output)
    ledger = Ledger(output, last)
    for commit in valid_commits(output, last):
        ledger.accept(commit)
    return ledger


def end(ledger: Ledger, status: str) -> None:
    """Note in the attempt's record how it ended: done, interrupted, or the error's class."""
    uri = _attempt_uri(ledger.output, ledger.attempt)
    record = storage.read_record(uri)
    storage.write(uri, json.dumps({**record, "ended": _now(), "status": status}).encode())


def valid_commits(
    output: str, last_attempt: int, *, with_errors: bool = False, damaged: list[str] | None = None
) -> Iterator[Commit]:
    """The commits that count, by name: those of the newest attempt, and those that it lists.

    with_errors: only those whose name a file of errors begins with; the others are not read.
    damaged: gets the names of those that cannot be read, which otherwise raise OutputRefused.
    """
    if not last_attempt:
        return
    accepted = set(storage.read_record(_attempt_uri(output, last_attempt))["accepts"])
    newest = f"part-{last_attempt:04d}-"
    uris = {
        name: info.uri
        for info in _list(output, COMMITS)
        if (name := _stem(info.uri)) in accepted or name.startswith(newest)
    }
    if with_errors:
        files = (_stem(info.uri) for info in _list(output, "_errors"))
        uris = {name: uris[name] for file in files if (name := "-".join(file.split("-")[:4])) in uris}
    found = ordered_map(storage.read, uris.values(), READ_THREADS, 8 * READ_THREADS)
    for (name, uri), text in zip(uris.items(), found, strict=True):
        try:
            commit = Commit.from_json(text)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if damaged is None:
                raise OutputRefused(
                    f"{uri} is damaged ({first_line(error)}): jobs/verify.py {output} --repair takes it back, and the "
                    "same command makes it anew"
                ) from error
            damaged.append(name)
        else:
            yield commit


def sweep(ledger: Ledger) -> int:
    """Remove commits that do not count, parts that no commit names, and half files; return how many of the first two.

    A driver that was replaced may be writing still: it fails, as it must. Raises OutputLocked in such a driver, which
    removes nothing of its successor's; NightshiftError where a file that counts is gone.
    """
    commits = {info.uri: _stem(info.uri) in ledger.names for info in _list(ledger.output, COMMITS)}
    kept = ordered_map(storage.read, [uri for uri, counts in commits.items() if counts], READ_THREADS, 8 * READ_THREADS)
    named = {commit_uri(ledger.output, name) for name in ledger.names}
    for commit in map(Commit.from_json, kept):
        files = commit.part, commit.errors_part and f"_errors/{commit.errors_part}"
        named.update(storage.join(ledger.output, file) for file in files if file)
    there = {*commits, *(info.uri for info in parts(ledger.output))}
    check_newest(ledger)  # a replaced driver's list may show its successor's files: they are no orphans
    if gone := named - there:
        raise NightshiftError(
            f"{len(gone)} files of finished work are gone, {min(gone)} among them; jobs/verify.py {ledger.output} "
            "--repair takes back what they held, then the same command makes it anew"
        )
    storage.remove_broken_writes(ledger.output)
    orphans = [uri for uri in there - named if _attempt_of(uri) <= ledger.attempt]
    for uri in orphans:
        storage.delete(uri)
    return len(orphans)


def check_newest(ledger: Ledger) -> None:
    """Raise OutputLocked if a later attempt has begun: what counts is its to say."""
    if last_attempt(ledger.output) != ledger.attempt:
        raise taken_over(ledger.output)


def void(output: str) -> str | None:
    """Before a run is removed: an attempt that accepts nothing, so that a task of that run which writes late writes for
    an attempt that is over. Return its record's URI, None if no attempt ever began."""
    last = last_attempt(output)
    if not last:
        return None
    _create_attempt(output, last + 1, [], status="overwritten")
    return _attempt_uri(output, last + 1)


def parts(output: str) -> Iterator[storage.ObjectInfo]:
    """Every Parquet file of results or errors, whether committed or not."""
    for info in _list(output, ""):
        name = info.uri[len(output) + 1 :]
        if name.removeprefix("_errors/").startswith("part-") and name.endswith(".parquet"):
            yield info


def commit_uri(output: str, name: str) -> str:
    return storage.join(output, f"{COMMITS}/{name}.json")


def _attempt_uri(output: str, number: int) -> str:
    return storage.join(output, f"{ATTEMPTS}/{number}.json")


def last_attempt(output: str) -> int:
    return max((int(_stem(info.uri)) for info in _list(output, ATTEMPTS)), default=0)


def _list(output: str, folder: str) -> list[storage.ObjectInfo]:
    try:
        return list(storage.list_objects(storage.join(output, folder).rstrip("/")))
    except FileNotFoundError:
        return []


def _attempt_of(uri: str) -> int:
    """The attempt that wrote a part or a commit, 0 where its name does not say."""
    named = re.fullmatch(r"part-(\d+)-\d+-\d+(-\w+)?", _stem(uri))
    return int(named[1]) if named else 0


def _stem(uri: str) -> str:
    return uri.rpartition("/")[2].partition(".")[0]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
