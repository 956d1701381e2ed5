"""A whole run on one screen: settings → plan → work → report."""

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import printable
from pipeline.estimates.machines import Cluster, Prices
from pipeline.explore.vector_archive import VectorArchive
from pipeline.output import directory, parts
from pipeline.output import ledger as ledgers
from pipeline.output.lock import Lock, refuse_if_held
from pipeline.output.run_record import RunRecord
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan
from pipeline.predictors.base import Predictor
from pipeline.report import messages
from pipeline.report.failures import show_first_failure
from pipeline.report.progress import meter
from pipeline.report.report import Report, reported
from pipeline.stages import value_sample
from pipeline.stages.load import check_settings, harmonize_of
from pipeline.threads import in_background


def preview(config: RunConfig, predictor: Predictor) -> dict[str, Any]:
    """Totals of the plan, result columns and settings, as JSON. Refuses what `run` would refuse.

    Leaves no file: in a bucket it creates an object and deletes it, because only that shows whether it may. Connects
    to Ray only for settings that may not fit the cluster.
    """
    _machines(config)
    archive = _archive(config, predictor)
    predictor.check()
    directory.check(config, archive)
    refuse_if_held(config.output)
    directory.check_writable(config.output)
    config = directory.with_recorded_scale(config)
    predictor.prepare()
    check_settings(config, predictor)
    _use_for(archive, predictor)
    record = RunRecord.of(config, predictor)
    predictor.check_space(record.embedding_space)
    directory.check_settings(config, record)
    if config.actor_range() or config.gpu_share() or config.decoder == "gpu":
        from pipeline.engine import cluster

        cluster.connect()
        cluster.allocate(config)
    return directory.preview(archive, record, predictor.columns.names, _Settled.of(config, predictor, archive))


def _archive(config: RunConfig, predictor: Predictor) -> Archive:
    """The images of --input, or the vectors of --from. The bands of an input specification are known already."""
    if config.vectors:
        return VectorArchive(config)
    archive = Archive(config)
    if predictor.specification:
        archive.use_bands(predictor.specification.bands, harmonize_of(config, predictor))
    return archive


def _use_for(archive: Archive, predictor: Predictor) -> None:
    archive.use_for(predictor.pixel_format.bands, takes_8_bits=predictor.pixel_format.dtype == "uint8")


@dataclass
class _Settled:
    """Settles the settings that depend on the images, once there is a plan. config, record: the settled ones."""

    config: RunConfig
    predictor: Predictor
    archive: Archive
    record: RunRecord | None = None

    @staticmethod
    def of(config: RunConfig, predictor: Predictor, archive: Archive) -> "_Settled | None":
        """None if no setting depends on the images."""
        return _Settled(config, predictor, archive) if value_sample.is_needed(config, predictor) else None

    def __call__(self, plan: Plan) -> RunRecord:
        self.config, notes = value_sample.settle(self.config, self.predictor, self.archive.options(), plan)
        for note in notes:
            messages.say(printable(note))
        self.record = RunRecord.of(self.config, self.predictor)
        self.predictor.check_space(self.record.embedding_space)  # again: a measured --scale is part of it
        return self.record


def _machines(config: RunConfig) -> Cluster | None:
    """The machines of --cluster, for the cost. Raises SettingRefused."""
    return Prices.load(config.prices).cluster(config.cluster) if config.cluster else None


def run(config: RunConfig, predictor: Predictor) -> Report:
    """Run a predictor over an archive, or resume an earlier attempt.

    Returns the report of the run; if the output is finished already, that of its last attempt. Raises NightshiftError
    and its subclasses (`pipeline.errors`). Committed parts stay, and the same call continues from them.
    """
    machines = _machines(config)
    archive = _archive(config, predictor)
    predictor.check()
    directory.check(config, archive)  # before weights are downloaded, and before Ray and torch are imported
    wait_until_prepared = in_background(predictor.prepare)
    from pipeline.engine import cluster, metrics  # takes seconds, as `prepare` does
    from pipeline.engine.attempt import Attempt
    from pipeline.engine.interrupts import interruptible
    from pipeline.engine.native_stderr import filtered_native_stderr

    with interruptible(), directory.without_leftovers(config.output), Lock(config.output) as lock:
        if config.overwrite or not directory.is_finished(config.output):
            cluster.connect()
            cluster.allocate(config)  # refuses settings that do not fit the cluster, before any file is written
        wait_until_prepared()
        check_settings(config, predictor)
        messages.detail(f"settings {json.dumps(predictor.settings())}")
        config = directory.with_recorded_scale(config)
        _use_for(archive, predictor)
        record = RunRecord.of(config, predictor)
        predictor.check_space(record.embedding_space)
        settled = _Settled.of(config, predictor, archive)
        lock.check()  # this driver may have been paused and replaced
        plan, change = directory.prepare(config, record, archive, lock.check, settled)
        if settled and settled.record:
            config, record = settled.config, settled.record
        for line in archive.notices.lines():
            messages.say(line)
        if directory.is_finished(config.output):
            messages.say("already done, nothing new" + ("" if config.update else "; --update looks for new images"))
            return Report.load(config.output).already_done(change)

        messages.detail(
            f"plan: {plan.shards} shards, {plan.rows} images and {plan.uncounted_shards} shards to be counted"
        )
        cluster.connect()
        lock.check()
        ledger = ledgers.begin(config.output, partial(parts.drop_rows, config.output, plan.dropped))
        ledgers.sweep(ledger)
        with (
            filtered_native_stderr(),
            reported(config, record, plan, ledger, change, machines),
            meter(plan, ledger) as progress,
        ):
            with metrics.exported(config, record, plan, ledger) as exported:
                attempt = Attempt(
                    config, predictor, record, archive, plan, ledger, lock, show_first_failure(config.output)
                )
                attempt.work([progress, exported])
            ledgers.sweep(ledger)
        ledgers.check_newest(ledger)
        directory.finish(config.output)
        return Report.load(config.output)
