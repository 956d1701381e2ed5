"""Prove from the files alone that every planned image is exactly one row, of the results or of `_errors/`."""

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import coverage, schema
from pipeline.config import parse_keep
from pipeline.errors import InputRefused, counted, first_line, message_line
from pipeline.output import ledger as ledgers
from pipeline.output import parts
from pipeline.output.commit import ERRORS, RESULTS, Commit
from pipeline.output.directory import RUN, SUCCESS, is_finished
from pipeline.output.ledger import Ledger
from pipeline.output.lock import Lock
from pipeline.output.planned import differences
from pipeline.planning import left_out
from pipeline.planning import plan as plans
from pipeline.planning.plan import Plan
from pipeline.storage import access, uris
from pipeline.threads import ordered_map

THREADS = 4
MAX_PROBLEMS_SHOWN = 20
NO_ROWS = pa.schema([(name, schema.IDENTITY.field(name).type) for name in ("image_id", "shard", "row")]).empty_table()


@dataclass
class Verification:
    """The result of `verify` and `repair`.

    planned: number of planned images; None while some shards are uncounted. uncounted_shards: how many those are.
    rows, errors: number of rows in the results and in `_errors/`. empty: number of images without data, which are in
    neither. parts, commits: how many. problems: one sentence each.
    bad_commits: commits that are damaged, do not match their files, or cover rows that another commit covers. `repair`
    removes them.
    left_out: numbers of files of the archive that are not read, by suffix. empty_shards: number of tars and zips
    without an image. unended_tars: number of tars without an end mark.
    """

    output: str
    planned: int | None = None
    uncounted_shards: int = 0
    rows: int = 0
    errors: int = 0
    parts: int = 0
    commits: int = 0
    problems: list[str] = field(default_factory=list)
    bad_commits: list[Commit] = field(default_factory=list)
    left_out: Mapping[str, int] = field(default_factory=dict)
    empty_shards: int = 0
    empty: int = 0
    unended_tars: int = 0

    @property
    def is_whole(self) -> bool:
        """True if every planned image is exactly one row and the run has finished."""
        return not self.problems

    def lines(self) -> Iterator[str]:
        """Describe the result in lines of text, with up to MAX_PROBLEMS_SHOWN problems."""
        empty = f" + {self.empty:,} empty" if self.empty else ""
        done = f"{self.rows:,} rows + {self.errors:,} errors{empty}, in {counted(self.parts, 'part')}"
        if self.planned is not None:
            yield f"{self.output}: planned {self.planned:,} = {done}"
        elif self.uncounted_shards:
            yield f"{self.output}: the images of {self.uncounted_shards:,} shards are not counted yet; so far {done}"
        else:
            yield f"{self.output}: not planned yet"
        if self.left_out:
            yield f"  left out: {left_out.describe(self.left_out)}"
        if self.empty_shards:
            yield f"  empty: {left_out.describe_empty(self.empty_shards)}"
        if self.unended_tars:
            yield f"  tars: {left_out.describe_unended(self.unended_tars)}"
        for problem in self.problems[:MAX_PROBLEMS_SHOWN]:
            yield f"  not whole: {problem}"
        if len(self.problems) > MAX_PROBLEMS_SHOWN:
            yield f"  … and {len(self.problems) - MAX_PROBLEMS_SHOWN:,} more"
        if self.is_whole:
            exception = ", except for those without data" if self.empty else ""
            yield f"  whole: every planned image is exactly one row{exception}"


def verify(output: str) -> Verification:
    """Check an output directory against its own plan and commits. Reads every file and changes none.

    Does not lock the output: during a run it reports the progress so far. Raises InputRefused if the directory is not
    an output of Nightshift, and OutputRefused if one of its records is damaged.
    """
    output = uris.normalize(output)
    run = _read_run(output)
    result = Verification(output)
    plan = plans.load(output)
    if plan is None:
        result.problems.append("the plan was never finished; run the same command again")
        return result
    result.left_out = plan.left_out
    part_uris = [info.uri for info in ledgers.parts(output)]  # before the commits: a part is older than its commit
    ledger, commits = _check_ledger(result, plan)
    _check_parts(result, commits, run, plan)
    _check_names(result, commits, part_uris)
    result.planned = plan.images(ledger.coverage.totals)
    result.empty_shards = plan.empty_shards(ledger.coverage.totals)
    result.unended_tars = ledger.unended
    result.uncounted_shards = plan.uncounted(ledger.coverage.totals)
    if not result.problems and not is_finished(output):
        result.problems.append(f"{SUCCESS} is missing; run the same command again")
    return result


def repair(output: str) -> Verification:
    """Verify, and remove the bad commits and their files, so that the same job computes these rows again.

    Locks the output from start to end. Keeps parts without a commit, because a task of a dead driver may still commit
    them; the next run of the job removes the others. Raises the errors of `verify`, and OutputLocked while a driver
    works on the output.
    """
    output = uris.normalize(output)
    _read_run(output)  # before the lock, which would create the directory
    with Lock(output) as lock:
        result = verify(output)
        lock.check()
        if result.problems:
            access.delete(uris.join(output, SUCCESS))
        for commit in result.bad_commits:
            lock.check()
            parts.remove(output, commit)
    return result


def _read_run(output: str) -> dict[str, Any]:
    try:
        return access.read_record(uris.join(output, RUN))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputRefused(f"{output} is not an output of Nightshift: it has no {RUN}") from error


def _check_ledger(result: Verification, plan: Plan) -> tuple[Ledger, list[Commit]]:
    """Check that the commits cover the whole plan without overlap. Returns the ledger and its accepted commits."""
    last = ledgers.last_attempt(result.output)
    ledger = Ledger(result.output, last)
    accepted: list[Commit] = []
    damaged: list[str] = []
    for commit in ledgers.valid_commits(result.output, last, damaged=damaged):
        if ledger.accept(commit):
            accepted.append(commit)
        else:
            result.problems.append(f"commit {commit.name} covers rows that another commit covers")
            result.bad_commits.append(commit)
    result.problems += [f"commit {name} is damaged" for name in damaged]
    result.bad_commits += [Commit(name, 0, None, None, {}, {}, 0, 0) for name in damaged]
    for shard, left in plan.remaining(ledger.coverage):
        ranges = ", ".join(f"{a}–{'?' if b == coverage.END else b}" for a, b in left[:3])
        where = f" ({plan.load(shard).uri})" if len(result.problems) < MAX_PROBLEMS_SHOWN else ""  # one request per URI
        result.problems.append(f"shard {shard}{where}: rows {ranges} are missing")
    for shard, covered in ledger.coverage:
        if beyond := coverage.subtract(covered, plan.planned(shard)):
            result.problems.append(f"shard {shard}: rows {beyond} are not in the plan")
            result.bad_commits += [c for c in accepted if coverage.intersect(c.ranges.get(shard, ()), beyond)]
    return ledger, accepted


def _check_parts(result: Verification, commits: list[Commit], run: Mapping[str, Any], plan: Plan) -> None:
    """Check that every file matches its commit, that all have one schema, and that no image_id occurs twice."""
    result.commits = len(commits)
    kept = set(parse_keep(run["settings"].get("keep", ())).values())
    check = partial(_check_commit, plan, run["fingerprint"], kept)
    schemas: dict[str, pa.Schema] = {}
    hashes: list[NDArray[np.uint64]] = []
    for commit, checked in zip(commits, ordered_map(check, commits, THREADS, 2 * THREADS), strict=True):
        result.rows += checked.rows
        result.errors += checked.errors
        result.empty += commit.empty
        result.parts += commit.part is not None
        result.problems += checked.problems
        if checked.problems:
            result.bad_commits.append(commit)
        hashes.append(checked.id_hashes)
        for kind, file_schema in checked.schemas.items():
            if not schemas.setdefault(kind, file_schema).equals(file_schema):
                result.problems.append(f"{kind} {commit.name}: its schema differs from the first one's")
                result.bad_commits.append(commit)
    _check_ids(result, commits, hashes)


def _check_names(result: Verification, commits: list[Commit], part_uris: list[str]) -> None:
    """Check that every part has a commit, and that readers find no foreign files."""
    named = {path for commit in commits for path in commit.files}
    start = len(result.output) + 1
    result.problems += [f"{uri} belongs to no commit" for uri in part_uris if uri[start:] not in named]
    for info in access.list_objects(result.output):
        path = info.uri[start:]
        if not path.startswith("_") and not ledgers.PART.fullmatch(path):
            result.problems.append(
                f"{info.uri} is not a file of this run, but readers would read it with the results; remove it"
            )


def _check_ids(result: Verification, commits: list[Commit], hashes: list[NDArray[np.uint64]]) -> None:
    """Check that no image_id occurs twice. hashes: of the image_ids of each commit."""
    unique, counts = np.unique(np.concatenate([*hashes, np.empty(0, np.uint64)]), return_counts=True)
    repeated = unique[counts > 1]
    if len(repeated):
        result.problems.append(f"{len(repeated)} image_ids are in more than one row")
        result.bad_commits += [c for c, ids in zip(commits, hashes, strict=True) if np.isin(ids, repeated).any()]


@dataclass
class _Checked:
    rows: int = 0
    errors: int = 0
    problems: list[str] = field(default_factory=list)
    schemas: dict[str, pa.Schema] = field(default_factory=dict)
    id_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))


def _check_commit(plan: Plan, fingerprint: str, kept: Set[str], commit: Commit) -> _Checked:
    checked = _Checked(commit.rows, commit.errors)
    try:
        _check_files(plan, fingerprint, kept, commit, checked)
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:  # the file opens, but has other content
        checked.problems.append(f"the files of {commit.name} are damaged: {first_line(error)}")
    return checked


def _check_files(plan: Plan, fingerprint: str, kept: Set[str], commit: Commit, checked: _Checked) -> None:
    tables = []
    for kind, path, expected in ((RESULTS, commit.part, commit.rows), (ERRORS, commit.errors_part, commit.errors)):
        if path is None:
            continue
        table = _read(uris.join(plan.output, path), path, checked)
        if table is None:
            continue
        checked.schemas[kind] = table.schema.remove_metadata()
        footer = json.loads((table.schema.metadata or {}).get(b"nightshift", b"{}"))
        if footer.get("fingerprint") != fingerprint:
            checked.problems.append(f"{path} was written by another run (fingerprint {footer.get('fingerprint')})")
        if len(table) != expected:
            checked.problems.append(f"{path} has {len(table)} rows, but its commit says {expected}")
        checked.problems += [f"{path}: {problem}" for problem in _bad_vectors(table, kept)]
        if kind == RESULTS:
            checked.problems += [f"{path}: {problem}" for problem in differences(plan, table)]
        tables.append(table.select(["image_id", "shard", "row"]))
    if not checked.problems:
        both = pa.concat_tables([NO_ROWS, *tables])
        checked.id_hashes = np.array([hash(i) & 0xFFFFFFFFFFFFFFFF for i in both["image_id"].to_pylist()], np.uint64)
        if not _accounts_for(commit, both):
            checked.problems.append(f"{commit.name}: the rows in its files differ from those of its commit")


def _read(uri: str, name: str, checked: _Checked) -> pa.Table | None:
    try:
        return parts.read_part(uri)
    except FileNotFoundError:
        checked.problems.append(f"{name} is missing")
    except (OSError, pa.ArrowException) as error:
        checked.problems.append(f"{name} cannot be read: {message_line(error)}")
    return None


def _bad_vectors(table: pa.Table, kept: Set[str]) -> Iterator[str]:
    """Describe nulls, NaN and infinity in vectors. kept: columns of the archive, which may have them."""
    for column in table.schema:
        if schema.is_vector(column.type) and column.name not in kept:
            values = pc.list_flatten(table[column.name])
            if len(values) != len(table) * column.type.list_size:
                yield f"{column.name} has nulls"
            elif not np.isfinite(values.to_numpy()).all():
                yield f"{column.name} has NaN or infinity"


def _accounts_for(commit: Commit, rows: pa.Table) -> bool:
    """Whether the rows of its files and its empty images are the rows that a commit covers."""
    in_files = _rows_by_shard(rows)
    are_covered = all(not coverage.subtract(ranges, commit.ranges.get(shard, ())) for shard, ranges in in_files.items())
    covered = sum(map(coverage.count, commit.ranges.values()))
    is_unique = len(rows) == sum(map(coverage.count, in_files.values()))
    return are_covered and is_unique and len(rows) + commit.empty == covered


def _rows_by_shard(table: pa.Table) -> dict[int, coverage.Ranges]:
    rows: dict[int, list[int]] = {}
    for shard, row in zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True):
        rows.setdefault(shard, []).append(row)
    return {shard: coverage.from_rows(numbers) for shard, numbers in sorted(rows.items())}
