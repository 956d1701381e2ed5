"""Proof from the files alone: every planned image is exactly one row, of the results or of `_errors/`."""

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import coverage, storage
from pipeline import ledger as ledgers
from pipeline import plan as plans
from pipeline import sink as sinks
from pipeline.config import kept_as
from pipeline.errors import InputRefused, first_line, message_line
from pipeline.ledger import Commit, Ledger
from pipeline.lock import Lock
from pipeline.output import RUN, SUCCESS, is_finished
from pipeline.plan import Plan
from pipeline.prefetch import ordered_map

THREADS = 4
SHOWN = 20


@dataclass
class Verification:
    """What was found.

    planned: images, None while shards are left that nobody has counted. bad_commits: whose files are not what they
    say, or that cover what another covers; `repair` has taken them back.
    """

    output: str
    planned: int | None = None
    rows: int = 0
    errors: int = 0
    parts: int = 0
    commits: int = 0
    problems: list[str] = field(default_factory=list)
    bad_commits: list[Commit] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return not self.problems

    def lines(self) -> Iterator[str]:
        planned = "unknown" if self.planned is None else f"{self.planned:,}"
        yield f"{self.output}: planned {planned} = {self.rows:,} rows + {self.errors:,} errors, in {self.parts:,} parts"
        for problem in self.problems[:SHOWN]:
            yield f"  not whole: {problem}"
        if len(self.problems) > SHOWN:
            yield f"  … and {len(self.problems) - SHOWN:,} more"
        if self.is_whole:
            yield "  whole: every planned image is exactly one row"


def verify(output: str) -> Verification:
    """Check an output directory against its own plan and ledger; raises InputRefused if it holds no run.

    Of a run at work it tells how far that is: nobody is kept from writing meanwhile.
    """
    output = storage.normalize(output)
    run = _read_run(output)
    found = Verification(output)
    plan = plans.load(output)
    if plan is None:
        found.problems.append("the plan was never finished; run the same command again")
        return found
    parts = [info.uri for info in ledgers.parts(output)]  # before the commits: a part is there before its commit is
    ledger, commits = _check_ledger(found, plan)
    _check_parts(found, commits, run)
    _check_names(found, commits, parts)
    found.planned = plan.images(ledger.coverage.totals)
    if not found.problems and not is_finished(output):
        found.problems.append(f"{SUCCESS} is missing; run the same command again")
    return found


def repair(output: str) -> Verification:
    """Verify, and take back what is wrong, so that the same job goes on and computes just that anew.

    Nobody else works on the output from the first look on. A part without a commit stays until the job goes on: a task
    of a driver that died may commit it yet. Raises OutputLocked while a driver works on the output, and InputRefused.
    """
    output = storage.normalize(output)
    _read_run(output)  # a lock would make the folder
    with Lock(output) as lock:
        found = verify(output)
        lock.check()
        if found.problems:
            storage.delete(storage.join(output, SUCCESS))
        for commit in found.bad_commits:
            lock.check()
            sinks.remove(output, commit)
    return found


def _read_run(output: str) -> dict[str, Any]:
    try:
        return storage.read_record(storage.join(output, RUN))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputRefused(f"{output} holds no run of Nightshift: there is no {RUN}") from error


def _check_ledger(found: Verification, plan: Plan) -> tuple[Ledger, list[Commit]]:
    """Coverage is the whole plan, without overlap. Returns the ledger and the commits that it accepted."""
    last = ledgers.last_attempt(found.output)
    ledger = Ledger(found.output, last)
    accepted: list[Commit] = []
    damaged: list[str] = []
    for commit in ledgers.valid_commits(found.output, last, damaged=damaged):
        if ledger.accept(commit):
            accepted.append(commit)
        else:
            found.problems.append(f"commit {commit.name} covers rows that another commit covers")
            found.bad_commits.append(commit)
    found.problems += [f"commit {name} is damaged" for name in damaged]
    found.bad_commits += [Commit(name, 0, None, None, {}, {}, 0, 0) for name in damaged]
    for shard, left in plan.remaining(ledger.coverage):
        ranges = ", ".join(f"{a}–{'?' if b == coverage.END else b}" for a, b in left[:3])
        where = f" ({plan.load(shard).uri})" if len(found.problems) < SHOWN else ""  # a request to the store for each
        found.problems.append(f"shard {shard}{where}: rows {ranges} are missing")
    for shard, covered in ledger.coverage:
        if beyond := coverage.subtract(covered, plan.planned(shard)):
            found.problems.append(f"shard {shard}: rows {beyond} are not in the plan")
            found.bad_commits += [c for c in accepted if coverage.intersect(c.ranges.get(shard, ()), beyond)]
    return ledger, accepted


def _check_parts(found: Verification, commits: list[Commit], run: Mapping[str, Any]) -> None:
    """Every file is what its commit says, all of one schema; no image_id twice."""
    found.commits = len(commits)
    kept = set(kept_as(run["settings"].get("keep", ())).values())
    check = partial(_check_commit, found.output, run["fingerprint"], kept)
    schemas: dict[str, pa.Schema] = {}
    hashes: list[NDArray[np.uint64]] = []
    for commit, checked in zip(commits, ordered_map(check, commits, THREADS, 2 * THREADS), strict=True):
        found.rows += checked.rows
        found.errors += checked.errors
        found.parts += commit.part is not None
        found.problems += checked.problems
        if checked.problems:
            found.bad_commits.append(commit)
        hashes.append(checked.id_hashes)
        for kind, file_schema in checked.schemas.items():
            if not schemas.setdefault(kind, file_schema).equals(file_schema):
                found.problems.append(f"{kind} {commit.name}: its schema differs from the first one's")
                found.bad_commits.append(commit)
    _check_ids(found, commits, hashes)


def _check_names(found: Verification, commits: list[Commit], parts: list[str]) -> None:
    """No part without a commit, and nothing that is no part. parts: URIs."""
    named = {commit.part for commit in commits} | {f"_errors/{commit.errors_part}" for commit in commits}
    found.problems += [f"{uri} belongs to no commit" for uri in parts if uri[len(found.output) + 1 :] not in named]
    for info in storage.list_objects(found.output):
        name = info.uri[len(found.output) + 1 :]
        if not name.startswith(("_", "part-")):
            found.problems.append(
                f"{info.uri} is no file of this run, and readers of the directory would take it for one"
            )


def _check_ids(found: Verification, commits: list[Commit], hashes: list[NDArray[np.uint64]]) -> None:
    """No image_id twice; hashes: of the image_ids of each commit."""
    unique, counts = np.unique(np.concatenate([*hashes, np.empty(0, np.uint64)]), return_counts=True)
    twice = unique[counts > 1]
    if len(twice):
        found.problems.append(f"{len(twice)} image_ids stand in more than one row")
        found.bad_commits += [c for c, own in zip(commits, hashes, strict=True) if np.isin(own, twice).any()]


@dataclass
class _Checked:
    rows: int = 0
    errors: int = 0
    problems: list[str] = field(default_factory=list)
    schemas: dict[str, pa.Schema] = field(default_factory=dict)
    id_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))


def _check_commit(output: str, fingerprint: str, kept: Set[str], commit: Commit) -> _Checked:
    checked = _Checked(commit.rows, commit.errors)
    try:
        _check_files(output, fingerprint, kept, commit, checked)
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:  # of a file that opens, and is none of ours
        checked.problems.append(f"the files of {commit.name} are damaged: {first_line(error)}")
    return checked


def _check_files(output: str, fingerprint: str, kept: Set[str], commit: Commit, checked: _Checked) -> None:
    tables = []
    for kind, name, expected in (("part", commit.part, commit.rows), ("_errors", commit.errors_part, commit.errors)):
        if name is None:
            continue
        path = name if kind == "part" else f"_errors/{name}"
        table = _read(storage.join(output, path), path, checked)
        if table is None:
            continue
        checked.schemas[kind] = table.schema.remove_metadata()
        footer = json.loads((table.schema.metadata or {}).get(b"nightshift", b"{}"))
        if footer.get("fingerprint") != fingerprint:
            checked.problems.append(f"{path} was written by another run (fingerprint {footer.get('fingerprint')})")
        if len(table) != expected:
            checked.problems.append(f"{path} holds {len(table)} rows, its commit says {expected}")
        checked.problems += [f"{path}: {problem}" for problem in _bad_vectors(table, kept)]
        tables.append(table.select(["image_id", "shard", "row"]))
    if tables and not checked.problems:
        both = pa.concat_tables(tables)
        checked.id_hashes = np.array([hash(i) & 0xFFFFFFFFFFFFFFFF for i in both["image_id"].to_pylist()], np.uint64)
        if _rows_by_shard(both) != commit.ranges or len(both) != sum(map(coverage.count, commit.ranges.values())):
            checked.problems.append(f"{commit.name}: the rows in its files are not those of its commit")


def _read(uri: str, name: str, checked: _Checked) -> pa.Table | None:
    try:
        return sinks.read_part(uri)
    except FileNotFoundError:
        checked.problems.append(f"{name} is missing")
    except (OSError, pa.ArrowException) as error:
        checked.problems.append(f"{name} cannot be read: {message_line(error)}")
    return None


def _bad_vectors(table: pa.Table, kept: Set[str]) -> Iterator[str]:
    """What no network gives; what was kept is the archive's own."""
    for column in table.schema:
        if pa.types.is_fixed_size_list(column.type) and column.name not in kept:
            values = pc.list_flatten(table[column.name])
            if len(values) != len(table) * column.type.list_size:
                yield f"{column.name} has nulls"
            elif not np.isfinite(values.to_numpy()).all():
                yield f"{column.name} holds NaN or infinity"


def _rows_by_shard(table: pa.Table) -> dict[int, coverage.Ranges]:
    rows: dict[int, list[int]] = {}
    for shard, row in zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True):
        rows.setdefault(shard, []).append(row)
    return {shard: coverage.from_rows(found) for shard, found in sorted(rows.items())}
