"""The output directory at the start and at the end of a run: `_run.json`, the plan, `_SUCCESS`."""

import contextlib
import os
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import coverage, schema
from pipeline.config import RunConfig
from pipeline.coverage import Ranges
from pipeline.errors import OutputRefused, ReadError, Refused
from pipeline.output import ledger as ledgers
from pipeline.output import lock
from pipeline.output.commit import ERRORS
from pipeline.output.geoparquet import check_version
from pipeline.output.lock import LOCK, taken_over
from pipeline.output.parts import encode_errors, read_committed, write_part
from pipeline.output.results import RunResults
from pipeline.output.run_record import LAYOUT, RunRecord
from pipeline.planning import plan as plans
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan
from pipeline.planning.update import Change
from pipeline.sources.records import TRANSIENT
from pipeline.storage import access, uris

RUN, SUCCESS = lock.RUN, "_SUCCESS"
EARLY_FILES = (LOCK, f"{ledgers.ATTEMPTS}/", plans.FILES)
"""Prefixes of the files that a run may write before its `_run.json`."""

REMAINS = re.compile(
    r"(_report\.json|((results|_errors)/part-\d{4,}-\d+-\d+(-\w+)?\.parquet|_commits/part-\d{4,}-\d+-\d+\.json))"
)
"""Files that a driver and its workers may write after their output was deleted."""


def prepare(
    config: RunConfig,
    record: RunRecord,
    archive: Archive,
    check_lock: Callable[[], object] = lambda: None,
    settled: Callable[[Plan], RunRecord] | None = None,
) -> tuple[Plan, Change | None]:
    """Make the output ready for the next attempt. Returns its plan, new or old, and with `--update` also the changes.

    settled: called with a new plan before it is saved; returns the record with settings that depend on the images.
    check_lock: called before each step that removes or replaces files; raises OutputLocked in a driver that has been
    replaced. Raises OutputRefused for another run's output, InputRefused for the archive, SettingRefused for `--keep`;
    an earlier run is then unchanged.
    """
    earlier = _read_run(config.output, config.overwrite)
    if earlier is None:
        _remove_remains(config.output, check_lock)
        _refuse_foreign(config.output)
    elif not config.overwrite:
        plan = plans.load(config.output)
        _refuse_other_settings(config.output, record, earlier, plan)
        if plan:
            return _update(plan, archive, check_lock) if config.update else (plan, None)
    plan = plans.make(config.output, archive.shards(), archive.keep_types, archive.left_out.counts)
    record = settled(plan) if settled else record
    check_lock()
    if earlier and config.overwrite:
        _remove_all(plan, check_lock)
    if not earlier or config.overwrite or earlier["settings"] != record.settings:
        with _refuse_existing(config.output):
            (access.write if earlier else access.create)(_run_uri(config.output), record.to_json())
    _write_empty_errors(record)
    with _refuse_existing(config.output):
        plans.save(plan, is_first=True)
    _remove_unnamed(plan, check_lock)
    return plan, None


def _write_empty_errors(record: RunRecord) -> None:
    """Write a file of errors without rows, so that `_errors/` opens as a table also if there is no error."""
    no_errors = encode_errors(schema.ERRORS.empty_table(), record.footer)
    write_part(record.output, f"{ERRORS}/empty.parquet", no_errors)


def check(config: RunConfig, archive: Archive) -> None:
    """Refuse a directory that is no output of Nightshift, and an input without images. Takes no network.

    The next attempt at a planned run does not list its archive, so the input may be missing.
    """
    check_version(config.geoparquet)
    if uris.is_local(config.output):
        _refuse_read_only(Path(config.output))
    try:
        if _read_run(config.output, config.overwrite) is None:
            with contextlib.suppress(FileNotFoundError):  # a local directory that does not exist yet
                _refuse_foreign(config.output)
        is_planned = plans.is_saved(config.output)
    except PermissionError as error:
        raise OutputRefused(
            f"--output {config.output} cannot be read: {error}; use a directory or bucket with permission"
        ) from error
    if config.overwrite or config.update or not is_planned:
        archive.check()


def check_writable(output: str) -> None:
    """Raise OutputRefused if no object can be created in a store. `check` looks at the permissions of local folders.

    Creates an object and deletes it. If it cannot be deleted, the next run removes it as a plan file without a plan.
    """
    if uris.is_local(output):
        return
    probe = uris.join(output, f"{plans.FILES}write-test-{uuid.uuid4().hex[:12]}")
    try:
        access.write(probe, b"")
    except OSError as error:
        raise OutputRefused(
            f"--output {output} cannot be written: {error}; use a directory or bucket with write permission"
        ) from error
    with contextlib.suppress(OSError):
        access.delete(probe)


def with_recorded_scale(config: RunConfig) -> RunConfig:
    """The settings with the range that an earlier attempt measured for the same percentiles of --scale."""
    percentiles = config.scale_percentiles()
    earlier = _read_run(config.output, config.overwrite) if percentiles and not config.overwrite else None
    settings = (earlier or {}).get("settings") or {}
    if percentiles and settings.get("scale_percentiles") == list(percentiles) and settings.get("scale"):
        return config.with_measured_scale(*settings["scale"])
    return config


def check_settings(config: RunConfig, record: RunRecord) -> None:
    """Refuse what `prepare` would refuse in an output that exists."""
    earlier = _read_run(config.output, config.overwrite)
    if earlier and not config.overwrite:
        _refuse_other_settings(config.output, record, earlier, plans.load(config.output))


def _refuse_read_only(output: Path) -> None:
    folder = next((path for path in (output, *output.parents) if os.path.exists(path)), Path("/"))
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise OutputRefused(f"--output {output} cannot be written: {folder} is no directory with write permission")


def _refuse_other_settings(output: str, record: RunRecord, earlier: dict[str, Any], plan: Plan | None) -> None:
    if earlier["settings"] != record.settings and (plan or _has_commits(output)):
        raise OutputRefused(
            f"{output} belongs to a run with other settings: {record.difference(earlier['settings'])}. "
            "Use another --output or add --overwrite"
        )


@contextmanager
def without_leftovers(output: str) -> Iterator[None]:
    """If the context is refused, remove the files and local folders that it made, unless a plan was saved."""
    missing = [path for path in (Path(output), *Path(output).parents) if uris.is_local(output) and not path.exists()]
    try:
        yield
    except Refused:
        with contextlib.suppress(OSError, Refused):
            if not plans.is_saved(output):
                for info in list(access.list_objects(uris.join(output, plans.FOLDER))):
                    access.delete(info.uri)
        with contextlib.suppress(OSError):
            for folder in (Path(output, plans.FOLDER), *missing) if missing else ():
                if folder.exists():
                    folder.rmdir()
        raise


@contextmanager
def _refuse_existing(output: str) -> Iterator[None]:
    """Raise OutputLocked if a file that is created in the context exists: another driver has created it."""
    try:
        yield
    except FileExistsError as error:
        raise taken_over(output) from error


def _remove_unnamed(plan: Plan, check_lock: Callable[[], object]) -> None:
    """Remove plan files that this plan does not name: planning was refused or interrupted after it wrote them."""
    keep = {uris.join(plan.output, name) for name in plan.files}
    for info in list(access.list_objects(uris.join(plan.output, plans.FOLDER))):
        if info.uri not in keep and info.uri.startswith(uris.join(plan.output, plans.FILES)):
            check_lock()
            access.delete(info.uri)


def _update(plan: Plan, archive: Archive, check_lock: Callable[[], object]) -> tuple[Plan, Change]:
    """Add new, replaced and unread objects to the plan. If there are any, the output is unfinished again."""
    change = Change(plan, _failed_reads(plan.output), results=RunResults(plan.output))
    left_out = archive.left_out.counts
    extended = plans.extend(plan, archive.new_shards(change), archive.keep_types, change.dropped, left_out)
    change.left_out = extended.left_out
    if extended.files == plan.files and extended.dropped == plan.dropped:
        same_shards = replace(plan, left_out=extended.left_out)
        if same_shards.left_out != plan.left_out:
            check_lock()
            plans.save(same_shards)
        return same_shards, change
    check_lock()
    access.delete(uris.join(plan.output, SUCCESS))
    plans.save(extended)
    _remove_unnamed(extended, check_lock)
    return extended, change


def _failed_reads(output: str) -> dict[int, Ranges]:
    """Rows of `_errors/`, by shard, whose bytes could not be read for a reason that may be gone now."""
    rows: dict[int, list[int]] = {}
    for commit in ledgers.valid_commits(output, ledgers.last_attempt(output), with_errors=True):
        if not any(f"{ReadError.stage}/{kind}" in commit.errors_by_type for kind in TRANSIENT):
            continue
        table = read_committed(output, str(commit.errors_part), ["shard", "row", "stage", "error_type"])
        for row in table.to_pylist():
            if row["stage"] == ReadError.stage and row["error_type"] in TRANSIENT:
                rows.setdefault(row["shard"], []).append(row["row"])
    return {shard: coverage.from_rows(failed) for shard, failed in rows.items()}


def finish(output: str) -> None:
    """Write `_SUCCESS`: every planned image is accounted for."""
    access.write(uris.join(output, SUCCESS), b"")


def is_finished(output: str) -> bool:
    try:
        access.head(uris.join(output, SUCCESS))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def draft(archive: Archive) -> Iterator[Plan]:
    """Plan a run without its output. The plan's files are in a temporary folder, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        yield plans.make(folder, archive.shards(), archive.keep_types, archive.left_out.counts)


def preview(
    archive: Archive, record: RunRecord, columns: list[str], settled: Callable[[Plan], RunRecord] | None = None
) -> dict[str, Any]:
    """Totals of the plan, result columns and settings, as JSON. Writes nothing to the output. settled: as above."""
    with draft(archive) as plan:
        kinds = dict(Counter(shard.kind for shard in plans.read_shards(plan)))
        record = settled(plan) if settled else record
    return {
        "shards": plan.shards,
        "shards_by_kind": kinds,
        "images": plan.rows,
        "shards_to_be_counted": plan.uncounted_shards,
        "size_bytes": plan.size_bytes,
        "left_out": plan.left_out,
        "columns": columns,
        "settings": record.settings,
        **({"notices": notices} if (notices := list(archive.notices.lines())) else {}),
    }


def _read_run(output: str, overwrite: bool) -> dict[str, Any] | None:
    """Read `_run.json`; None if it does not exist. overwrite: accept one that is damaged or of another version.

    Raises OutputRefused.
    """
    try:
        record = access.read_record(_run_uri(output))
    except FileNotFoundError:
        return None
    except OutputRefused:
        if not overwrite:
            raise
        return {"settings": None}
    if record.get("layout", 1) != LAYOUT and not overwrite:
        raise OutputRefused(
            f"{output} was written by another version of Nightshift: its layout is {record.get('layout', 1)}, this "
            f"version writes {LAYOUT}. Reading and `nightshift verify` work, a run cannot go on in it; use another "
            "--output, or --overwrite to compute everything again"
        )
    return record


def _run_uri(output: str) -> str:
    return uris.join(output, RUN)


def _refuse_foreign(output: str) -> None:
    """Raise OutputRefused if a directory without `_run.json` has any file but EARLY_FILES."""
    early_files = tuple(uris.join(output, name) for name in EARLY_FILES)
    for info in access.list_objects(output):
        if not info.uri.startswith(early_files):
            raise OutputRefused(
                f"{output} has the file {info.uri} but no {RUN}, so it is not an output of Nightshift; use an empty "
                "directory"
            )


def _remove_remains(output: str, check_lock: Callable[[], object]) -> None:
    """Remove what a run wrote after its output was deleted: parts and commits without a plan and without attempts.

    A directory with any other file, or with parts but no commits, is left alone: the parts may be a user's copy.
    """
    names = {info.uri[len(output) + 1 :]: info.uri for info in access.list_objects(output)}
    names.pop(LOCK, None)
    has_commits = any(name.startswith(f"{ledgers.COMMITS}/") for name in names)
    if has_commits and all(REMAINS.fullmatch(name) for name in names):
        for uri in names.values():
            check_lock()
            access.delete(uri)


def _has_commits(output: str) -> bool:
    return next(ledgers.valid_commits(output, ledgers.last_attempt(output)), None) is not None


def _remove_all(plan: Plan, check_lock: Callable[[], object]) -> None:
    """Remove an earlier run, but not the files of this new plan.

    `_run.json` stays until it is replaced, so that the output remains recognizable.
    """
    output = plan.output
    access.delete(uris.join(output, SUCCESS))  # first, since it stands for the files that are removed next
    names = {RUN, LOCK, *plan.files}
    keep = {ledgers.close_attempts(output), *(uris.join(output, name) for name in names)}
    for info in list(access.list_objects(output)):  # read at once: a stream could include files of a later driver
        path = info.uri[len(output) + 1 :]
        if info.uri not in keep and (path.startswith("_") or ledgers.PART.fullmatch(path)):
            check_lock()
            access.delete(info.uri)
