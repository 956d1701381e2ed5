"""A whole run on one screen: settings → plan → work → report."""

from functools import partial

from pipeline.config import RunConfig
from pipeline.estimates.machines import Prices
from pipeline.output import directory, parts
from pipeline.output import ledger as ledgers
from pipeline.output.lock import Lock
from pipeline.output.run_record import RunRecord
from pipeline.planning.archive import Archive
from pipeline.predictors.base import Predictor
from pipeline.report.progress import meter
from pipeline.report.report import Report, reported
from pipeline.stages.load import check_settings
from pipeline.threads import in_background


def run(config: RunConfig, predictor: Predictor) -> Report:
    """Run a predictor over an archive, or resume an earlier attempt.

    Returns the report of the run; if the output is finished already, that of its last attempt. Raises NightshiftError
    and its subclasses (`pipeline.errors`). Committed parts stay, and the same call continues from them.
    """
    machines = Prices.load(config.prices).cluster(config.cluster) if config.cluster else None
    wait_until_prepared = in_background(predictor.prepare)
    from pipeline.engine import cluster, metrics  # takes seconds, as `prepare` does
    from pipeline.engine.attempt import Attempt
    from pipeline.engine.interrupts import interruptible

    with interruptible(), Lock(config.output) as lock:
        if config.overwrite or not directory.is_finished(config.output):
            cluster.connect()
            cluster.allocate(config)  # refuses settings that do not fit the cluster, before any file is written
        wait_until_prepared()
        check_settings(config, predictor)
        record, archive = RunRecord.of(config, predictor), Archive(config)
        lock.check()  # this driver may have been paused and replaced
        plan, change = directory.prepare(config, record, archive, lock.check)
        if directory.is_finished(config.output):
            return Report.load(config.output).with_change(change)

        lock.check()
        ledger = ledgers.begin(config.output, partial(parts.drop_rows, config.output, plan.dropped))
        ledgers.sweep(ledger)
        with reported(config, record, plan, ledger, change, machines), meter(plan, ledger) as progress:
            cluster.connect()
            with metrics.exported(config, record, plan, ledger) as exported:
                Attempt(config, predictor, record, archive, plan, ledger, lock).work([progress, exported])
            ledgers.sweep(ledger)
        ledgers.check_newest(ledger)
        directory.finish(config.output)
        return Report.load(config.output)
