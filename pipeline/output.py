"""An output directory as a run finds it and leaves it: `_run.json`, the plan, `_SUCCESS`."""

import itertools
import json
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import pipeline
from pipeline import ledger as ledgers
from pipeline import plan as plans
from pipeline import schema, storage
from pipeline.config import RunConfig, fingerprint
from pipeline.errors import OutputRefused, SettingRefused
from pipeline.lock import LOCK
from pipeline.plan import Plan
from pipeline.predictors import Predictor
from pipeline.sources.discover import Archive
from pipeline.update import Change

RUN, SUCCESS, ATTEMPTS = "_run.json", "_SUCCESS", f"{ledgers.ATTEMPTS}/"
PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "pillow", "numpy")


def settings(config: RunConfig, predictor: Predictor) -> dict[str, Any]:
    """Everything that changes results. Its fingerprint is the run's."""
    found = {**config.result_settings(), **predictor.settings()}
    return dict(json.loads(json.dumps(found)))  # as it reads back from a file


def prepare(config: RunConfig, predictor: Predictor, archive: Archive) -> tuple[Plan, Change | None]:
    """Make the output ready for the next attempt: the plan it has or a new one, and what an update found."""
    wanted = settings(config, predictor)
    _check_keep(config, predictor)
    if config.overwrite:
        _remove_all(config.output)
    found = _read_run(config.output)
    if found is None:
        _refuse_foreign(config.output)
        record = {
            "fingerprint": fingerprint(wanted),
            "settings": wanted,
            "provenance": predictor.provenance(),
            "config": {**asdict(config), **config.result_settings()},
            "versions": _versions(),
        }
        storage.write(_run_uri(config.output), json.dumps(record, indent=1).encode())
    elif found["settings"] != wanted:
        raise OutputRefused(_difference(config.output, found["settings"], wanted))
    plan = plans.load(config.output)
    if plan is None:
        return plans.make(config.output, archive.shards(), archive.keep_types), None
    return _update(plan, archive) if config.update else (plan, None)


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


def _versions() -> dict[str, str]:
    """This package's is the code's own: a job may run from a checkout on machines that have another one, or none."""
    found = {"nightshift": pipeline.__version__, "python": platform.python_version()}
    return found | {name: version(name) for name in PACKAGES}


def _update(plan: Plan, archive: Archive) -> tuple[Plan, Change]:
    """Add to the plan what is new; the output is unfinished from then on until that is done."""
    change = Change(plan)
    shards = archive.new_shards(change)
    first = next(shards, None)
    if first is None:
        return plan, change
    storage.delete(storage.join(plan.output, SUCCESS))
    return plans.extend(plan, itertools.chain([first], shards), archive.keep_types, change.retired), change


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


def _read_run(output: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(storage.read(_run_uri(output))))
    except FileNotFoundError:
        return None


def _run_uri(output: str) -> str:
    return storage.join(output, RUN)


def _refuse_foreign(output: str) -> None:
    """Never mix results into a directory of something else."""
    for info in storage.list_objects(output):
        if info.uri != storage.join(output, LOCK) and not info.uri.startswith(storage.join(output, ATTEMPTS)):
            raise OutputRefused(
                f"{output} holds {info.uri} and is no earlier run of Nightshift; name an empty directory"
            )


def _difference(output: str, found: dict[str, Any], wanted: dict[str, Any]) -> str:
    names = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    parts = [f"{name} was {json.dumps(found.get(name))} and is {json.dumps(wanted.get(name))}" for name in names]
    return (
        f"{output} belongs to a run with other settings: {'; '.join(parts)}. Name another --output, or --overwrite it"
    )


def _remove_all(output: str) -> None:
    """Remove an earlier run, its `_run.json` last; refuse to touch what is not one."""
    if _read_run(output) is None:
        return
    storage.delete(storage.join(output, SUCCESS))  # before what it stands for counts no more
    keep = {_run_uri(output), storage.join(output, LOCK), ledgers.void(output)}
    for info in storage.list_objects(output):
        name = info.uri[len(output) + 1 :]
        if info.uri not in keep and name.startswith(("part-", "_")):
            storage.delete(info.uri)
    storage.delete(_run_uri(output))
