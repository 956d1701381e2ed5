"""The commits and attempts of a run: which parts count.

A commit is a small JSON record. It is written after its part, and only if no commit of its name exists. It counts if
the newest attempt wrote it, or if it is in the list of commits that the newest attempt accepted at its start. Any other
commit came from a driver that has been replaced, for example after a pause, and is ignored. Correctness rests on this
rule alone, not on the lock (lock.py).
"""

import json
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator

from pipeline.coverage import Coverage
from pipeline.errors import NightshiftError, OutputLocked, OutputRefused, TooManyErrors, first_line
from pipeline.output.commit import ERRORS, RESULTS, Commit, Tally
from pipeline.output.lock import deleted, taken_over
from pipeline.planning.plan import Plan
from pipeline.sources.suffixes import NO_END_MARK
from pipeline.storage import access, base, uris
from pipeline.threads import ordered_map

COMMITS, ATTEMPTS = "_commits", "_attempts"
READ_THREADS = 16

PART = re.compile(rf"(({RESULTS}|{ERRORS})/)?part-[^/]*\.parquet")
"""Paths of parts in an output. Earlier versions wrote results without a folder."""


class Ledger:
    """The accepted commits of an output directory: their names, the rows that they cover, and sums over them.

    earlier: sums over the commits of earlier attempts. current: sums over the commits of this attempt.
    left_out: numbers of members that are not read, by suffix. unended: number of tars without an end mark. Each shard
    counts once, however often its end was read.
    """

    def __init__(self, output: str, attempt: int) -> None:
        self.output = output
        self.attempt = attempt
        self.coverage = Coverage()
        self.names: set[str] = set()
        self.earlier = Tally()
        self.current = Tally()
        self.left_out: Counter[str] = Counter()
        self.unended = 0

    def accept(self, commit: Commit, tally: Tally | None = None) -> bool:
        """Accept a commit and add it to the sums. Returns False if it or one of its rows was accepted before."""
        if commit.name in self.names:
            return False
        if any(self.coverage.overlaps(shard, ranges) for shard, ranges in commit.ranges.items()):
            return False
        for shard, ranges in commit.ranges.items():
            self.coverage.add(shard, ranges)
        for shard, counts in commit.left_out.items():
            if shard not in self.coverage.totals:
                self.left_out.update({name: count for name, count in counts.items() if name != NO_END_MARK})
                self.unended += counts.get(NO_END_MARK, 0)
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

    @property
    def empty(self) -> int:
        return self.earlier.empty + self.current.empty


def begin(output: str, revise: Callable[[Commit, int], Commit | None] | None = None) -> Ledger:
    """Start the next attempt: accept the valid commits and record their names. No other old commit counts afterwards.

    revise: maps a commit and the new attempt's number to the commit to accept: the same one, a replacement, or None. A
    replacement is written before the attempt exists, so the old commit and its replacement never both count.
    Raises OutputLocked if another driver starts the same attempt.
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
        "id": uuid.uuid4().hex,  # makes the record unique: a store compares bytes to tell which driver created it
        "began": _now(),
        "host": socket.gethostname(),
        "accepts": accepts,
        **more,
    }
    try:
        access.create(_attempt_uri(output, number), json.dumps(record).encode())
    except FileExistsError as error:
        raise OutputLocked(
            f"another driver started on {output} at the same moment; wait until it ends, or stop it"
        ) from error


def read(output: str) -> Ledger:
    """Read the accepted commits without starting an attempt."""
    last = last_attempt(output)
    ledger = Ledger(output, last)
    for commit in valid_commits(output, last):
        ledger.accept(commit)
    return ledger


def end(ledger: Ledger, status: str) -> None:
    """Write to the attempt's record how it ended: "done", "failed", or the name of the error's class."""
    uri = _attempt_uri(ledger.output, ledger.attempt)
    record = access.read_record(uri)
    access.write(uri, json.dumps({**record, "ended": _now(), "status": status}).encode())


def valid_commits(
    output: str, last_attempt: int, *, with_errors: bool = False, damaged: list[str] | None = None
) -> Iterator[Commit]:
    """Yield the commits that count, sorted by name: those of the newest attempt, and those that it accepted.

    with_errors: read and yield only those that have a file of errors.
    damaged: a list to which the names of damaged commits are added. Without it, a damaged commit raises OutputRefused.
    """
    if not last_attempt:
        return
    accepted = set(access.read_record(_attempt_uri(output, last_attempt))["accepts"])
    newest = f"part-{last_attempt:04d}-"
    uris = {
        name: info.uri
        for info in _list(output, COMMITS)
        if (name := _stem(info.uri)) in accepted or name.startswith(newest)
    }
    if with_errors:
        files = (_stem(info.uri) for info in _list(output, ERRORS))
        uris = {name: uris[name] for file in files if (name := "-".join(file.split("-")[:4])) in uris}
    texts = ordered_map(access.read, uris.values(), READ_THREADS, 8 * READ_THREADS)
    for (name, uri), text in zip(uris.items(), texts, strict=True):
        try:
            commit = Commit.from_json(text)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if damaged is None:
                raise OutputRefused(
                    f"{uri} is damaged ({first_line(error)}); run jobs/verify.py {output} --repair, which removes it, "
                    "and then the same command, which computes it again"
                ) from error
            damaged.append(name)
        else:
            yield commit


def sweep(ledger: Ledger) -> int:
    """Remove commits that do not count, parts that no commit names, and temporary files.

    Returns the number of removed commits and parts. If a driver that was replaced is still writing, its writes fail.
    Raises OutputLocked in a driver that was replaced, before it removes anything; NightshiftError if a file that counts
    is missing.
    """
    commits = {info.uri: _stem(info.uri) in ledger.names for info in _list(ledger.output, COMMITS)}
    accepted = [uri for uri, counts in commits.items() if counts]
    texts = ordered_map(access.read, accepted, READ_THREADS, 8 * READ_THREADS)
    named = {commit_uri(ledger.output, name) for name in ledger.names}
    for commit in map(Commit.from_json, texts):
        named.update(uris.join(ledger.output, path) for path in commit.files)
    existing = {*commits, *(info.uri for info in parts(ledger.output))}
    check_newest(ledger)  # otherwise files of the next attempt would look like orphans
    if missing := named - existing:
        raise NightshiftError(
            f"{len(missing)} files of finished work are missing, one is {min(missing)}; run jobs/verify.py "
            f"{ledger.output} --repair, which removes the other files of the same commits, and then the same command, "
            "which computes the rows again"
        )
    access.remove_broken_writes(ledger.output)
    orphans = [uri for uri in existing - named if _attempt_of(uri) <= ledger.attempt]
    for uri in orphans:
        access.delete(uri)
    return len(orphans)


def check_newest(ledger: Ledger) -> None:
    """Raise OutputLocked if a later attempt has begun, which then decides which commits count.

    Raises OutputRefused if this attempt is gone: the output was deleted.
    """
    newest = last_attempt(ledger.output)
    if newest < ledger.attempt:
        raise deleted(ledger.output)
    if newest > ledger.attempt:
        raise taken_over(ledger.output)


def close_attempts(output: str) -> str | None:
    """Start an attempt that accepts nothing, so that no commit of an earlier attempt counts any more.

    Called before a run is removed: its tasks may still write. Returns the URI of the new attempt's record, or None if
    the output has no attempt.
    """
    last = last_attempt(output)
    if not last:
        return None
    _create_attempt(output, last + 1, [], status="overwritten")
    return _attempt_uri(output, last + 1)


def check_error_rate(ledger: Ledger, plan: Plan, max_error_rate: float) -> None:
    """Raise TooManyErrors if a larger share of the planned images is bad. Does nothing while shards are uncounted."""
    planned = plan.images(ledger.coverage.totals)
    if planned is not None and ledger.errors > max_error_rate * planned:
        kinds = (ledger.earlier.errors_by_type + ledger.current.errors_by_type).most_common()
        raise TooManyErrors(
            f"{ledger.errors} of {planned} images are bad ({', '.join(f'{count} × {kind}' for kind, count in kinds)}), "
            f"more than --max-error-rate {max_error_rate:g} allows; see {ledger.output}/_errors"
        )


def parts(output: str) -> Iterator[base.ObjectInfo]:
    """Yield every part of results or errors, committed or not, those of earlier versions included."""
    for info in _list(output, ""):
        if PART.fullmatch(info.uri[len(output) + 1 :]):
            yield info


def commit_uri(output: str, name: str) -> str:
    return uris.join(output, f"{COMMITS}/{name}.json")


def _attempt_uri(output: str, number: int) -> str:
    return uris.join(output, f"{ATTEMPTS}/{number}.json")


def last_attempt(output: str) -> int:
    """Number of the newest attempt, 0 if none has begun."""
    return max((int(_stem(info.uri)) for info in _list(output, ATTEMPTS)), default=0)


def _list(output: str, folder: str) -> list[base.ObjectInfo]:
    try:
        return list(access.list_objects(uris.join(output, folder).rstrip("/")))
    except FileNotFoundError:
        return []


def _attempt_of(uri: str) -> int:
    """Number of the attempt that wrote a part or a commit, 0 if its name has none."""
    match = re.fullmatch(r"part-(\d+)-\d+-\d+(-\w+)?", _stem(uri))
    return int(match[1]) if match else 0


def _stem(uri: str) -> str:
    return uri.rpartition("/")[2].partition(".")[0]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
