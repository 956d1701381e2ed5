"""An output directory as a run finds it and leaves it: `_run.json`, the plan, `_SUCCESS`."""

import json
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import pipeline
from pipeline import coverage, schema, storage
from pipeline import ledger as ledgers
from pipeline import plan as plans
from pipeline.config import RunConfig, fingerprint
from pipeline.coverage import Ranges
from pipeline.errors import OutputRefused, ReadError, SettingRefused
from pipeline.lock import LOCK, taken_over
from pipeline.plan import Plan
from pipeline.predictors import Predictor
from pipeline.sink import read_back
from pipeline.sources.discover import Archive
from pipeline.sources.records import PASSING
from pipeline.update import Change

RUN, SUCCESS = "_run.json", "_SUCCESS"
MOST_COLUMN_BYTES = (1 << 31) - 1
"""Of an Arrow column of bytes."""
OWN = (LOCK, f"{ledgers.ATTEMPTS}/", plans.FILES)
"""Beginnings of names that may lie in an output that has no `_run.json`."""
PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "pillow", "numpy")


def settings(config: RunConfig, predictor: Predictor) -> dict[str, Any]:
    """Everything that changes results. Its fingerprint is the run's."""
    found = {**config.result_settings(), **predictor.settings()}
    return dict(json.loads(json.dumps(found)))  # as it reads back from a file


def prepare(
    config: RunConfig, predictor: Predictor, archive: Archive, still_mine: Callable[[], object] = lambda: None
) -> tuple[Plan, Change | None]:
    """Make the output ready for the next attempt: the plan it has or a new one, and what an update found.

    What is refused leaves an earlier run as it was. still_mine: raises OutputLocked in a driver that was replaced.
    """
    wanted = settings(config, predictor)
    _check_keep(config, predictor)
    _check_batch(config, predictor)
    found = _read_run(config.output, config.overwrite)
    if found is None:
        _refuse_foreign(config.output)
    elif not config.overwrite:
        plan = plans.load(config.output)
        if found["settings"] != wanted and (plan or _has_commits(config.output)):
            raise OutputRefused(_difference(config.output, found["settings"], wanted))
        if plan:
            return _update(plan, archive, still_mine) if config.update else (plan, None)
    plan = plans.make(config.output, archive.shards(), archive.keep_types)
    still_mine()
    if found and config.overwrite:
        _remove_all(plan, still_mine)
    if not found or config.overwrite or found["settings"] != wanted:
        record = {
            "fingerprint": fingerprint(wanted),
            "settings": wanted,
            "provenance": predictor.provenance(),
            "config": {**asdict(config), **config.result_settings()},
            "versions": _versions(),
        }
        data = json.dumps(record, indent=1).encode()
        with _first_of_all(config.output):
            (storage.write if found else storage.create)(_run_uri(config.output), data)
    with _first_of_all(config.output):
        plans.save(plan, is_first=True)
    _remove_unnamed(plan, still_mine)
    return plan, None


@contextmanager
def _first_of_all(output: str) -> Iterator[None]:
    """What is created inside and there already is another driver's."""
    try:
        yield
    except FileExistsError as error:
        raise taken_over(output) from error


def _remove_unnamed(plan: Plan, still_mine: Callable[[], object]) -> None:
    """Remove the files of plannings that were refused or cut short."""
    keep = {storage.join(plan.output, name) for name in plan.files}
    for info in list(storage.list_objects(storage.join(plan.output, plans.FOLDER))):
        if info.uri not in keep and info.uri.startswith(storage.join(plan.output, plans.FILES)):
            still_mine()
            storage.delete(info.uri)


def _check_keep(config: RunConfig, predictor: Predictor) -> None:
    """Raise SettingRefused for a kept column that bears the name of another."""
    taken = {*schema.predicted(predictor.columns, {}).names, *schema.loaded({}).names}
    for name, alias in config.keep_names().items():
        if alias in taken:
            raise SettingRefused(
                f"--keep {name}: a column {alias!r} is there already; give it another name, "
                f"as in --keep {name}:own_{name}"
            )
        taken.add(alias)


def _check_batch(config: RunConfig, predictor: Predictor) -> None:
    most = MOST_COLUMN_BYTES // (3 * predictor.transform.crop**2)
    if config.batch_size is not None and config.batch_size > most:
        raise SettingRefused(f"--batch-size is {config.batch_size}: at this network's size it can be at most {most}")


def _versions() -> dict[str, str]:
    """This package's is the code's own: a job may run from a checkout on machines that have another one, or none."""
    found = {"nightshift": pipeline.__version__, "python": platform.python_version()}
    return found | {name: version(name) for name in PACKAGES}


def _update(plan: Plan, archive: Archive, still_mine: Callable[[], object]) -> tuple[Plan, Change]:
    """Add to the plan what is new; the output is unfinished from then on until that is done."""
    change = Change(plan, _failed_reads(plan.output))
    extended = plans.extend(plan, archive.new_shards(change), archive.keep_types, change.retired)
    if extended.files == plan.files:
        return plan, change
    still_mine()
    storage.delete(storage.join(plan.output, SUCCESS))
    plans.save(extended)
    _remove_unnamed(extended, still_mine)
    return extended, change


def _failed_reads(output: str) -> dict[int, Ranges]:
    """Rows in `_errors/` whose bytes could not be had, which may have passed since; by shard."""
    rows: dict[int, list[int]] = {}
    for commit in ledgers.valid_commits(output, ledgers.last_attempt(output), with_errors=True):
        if not any(f"{ReadError.stage}/{kind}" in commit.errors_by_type for kind in PASSING):
            continue
        table = read_back(output, f"_errors/{commit.errors_part}", ["shard", "row", "stage", "error_type"])
        for row in table.to_pylist():
            if row["stage"] == ReadError.stage and row["error_type"] in PASSING:
                rows.setdefault(row["shard"], []).append(row["row"])
    return {shard: coverage.from_rows(found) for shard, found in rows.items()}


def footer(config: RunConfig, predictor: Predictor) -> str:
    """What every part bears under the key `nightshift`."""
    wanted = settings(config, predictor)
    return json.dumps({"fingerprint": fingerprint(wanted), **predictor.provenance()})


def finish(output: str) -> None:
    storage.write(storage.join(output, SUCCESS), b"")


def is_finished(output: str) -> bool:
    try:
        storage.head(storage.join(output, SUCCESS))
    except FileNotFoundError:
        return False
    return True


@contextmanager
def draft(archive: Archive) -> Iterator[Plan]:
    """The plan of a run that has not begun, in a temporary folder as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        yield plans.make(folder, archive.shards(), archive.keep_types)


def preview(config: RunConfig, predictor: Predictor) -> dict[str, Any]:
    """The plan's totals and the settings, without writing to the output."""
    _check_keep(config, predictor)
    _check_batch(config, predictor)
    with draft(Archive(config)) as plan:
        kinds = dict(Counter(shard.kind for shard in plans.read_shards(plan)))
    return {
        "shards": plan.shards,
        "shards_by_kind": kinds,
        "images": plan.rows,
        "shards_to_be_counted": plan.uncounted_shards,
        "size_bytes": plan.size_bytes,
        "columns": predictor.columns.names,
        "settings": settings(config, predictor),
    }


def _read_run(output: str, overwrite: bool) -> dict[str, Any] | None:
    """None where there is none. overwrite: a damaged one will do as well."""
    try:
        return storage.read_record(_run_uri(output))
    except FileNotFoundError:
        return None
    except OutputRefused:
        if not overwrite:
            raise
        return {"settings": None}


def _run_uri(output: str) -> str:
    return storage.join(output, RUN)


def _refuse_foreign(output: str) -> None:
    """Never mix results into a directory of something else. A run that got no further left nothing but `OWN`."""
    own = tuple(storage.join(output, name) for name in OWN)
    for info in storage.list_objects(output):
        if not info.uri.startswith(own):
            raise OutputRefused(
                f"{output} holds {info.uri} and is no earlier run of Nightshift; name an empty directory"
            )


def _difference(output: str, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    parts = [f"{name} was {json.dumps(found.get(name))} and is {json.dumps(wanted.get(name))}" for name in names]
    return (
        f"{output} belongs to a run with other settings: {'; '.join(parts)}. Name another --output, or --overwrite it"
    )


def _has_commits(output: str) -> bool:
    return next(ledgers.valid_commits(output, ledgers.last_attempt(output)), None) is not None


def _remove_all(plan: Plan, still_mine: Callable[[], object]) -> None:
    """Remove the run that is there for that of this plan, which does not count yet. `_run.json` stays to be replaced:
    until then the output is seen to be a run's."""
    output = plan.output
    storage.delete(storage.join(output, SUCCESS))  # before what it stands for counts no more
    names = {RUN, LOCK, *plan.files}
    keep = {ledgers.void(output), *(storage.join(output, name) for name in names)}
    for info in list(storage.list_objects(output)):  # whole: a list that goes on may show what a later driver wrote
        if info.uri not in keep and info.uri[len(output) + 1 :].startswith(("part-", "_")):
            still_mine()
            storage.delete(info.uri)
