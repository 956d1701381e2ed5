"""The whole product on one screen: config → plan → read, decode, predict, write, commit → report."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from pipeline import ledger as ledgers
from pipeline import output, report
from pipeline import sink as sinks
from pipeline.config import RunConfig
from pipeline.errors import Interrupted, NightshiftError, OutputLocked, StorageRefused, TooManyErrors
from pipeline.ledger import Commit, Ledger
from pipeline.lock import Lock
from pipeline.machines import Cluster, Prices
from pipeline.plan import Plan
from pipeline.predictors import Predictor
from pipeline.prefetch import beside
from pipeline.report import Meter, Report
from pipeline.sources.discover import Archive
from pipeline.update import Change

if TYPE_CHECKING:
    from pipeline.datasource import Unit
    from pipeline.metrics import RunMetrics


def run(config: RunConfig, predictor: Predictor) -> Report:
    """Run a predictor over an archive, or go on where an earlier attempt stopped.

    Raises the errors of `pipeline.errors`; what was committed before stays, and the same call goes on from there.
    """
    cluster = Prices.load(config.prices).cluster(config.cluster) if config.cluster else None
    prepared = beside(predictor.prepare)
    from pipeline import engine, metrics  # Ray; like torch, which the predictor imports meanwhile, it takes its time

    archive = Archive(config)
    with _interruptible() as catch_signals, Lock(config.output) as lock:
        if config.overwrite or not output.is_finished(config.output):
            engine.connect()
            catch_signals()  # Ray has put its own handlers in place
            engine.layout_here(config)  # what does not fit is refused before anything is written
        prepared()
        lock.check()  # a driver that stood still may have been replaced meanwhile
        plan, change = output.prepare(config, predictor, archive, lock.check)
        if output.is_finished(config.output):
            return Report.load(config.output).with_change(change)
        lock.check()
        ledger = ledgers.begin(config.output, partial(sinks.retire, config.output, plan.retired))
        ledgers.sweep(ledger)
        with _reported(config, predictor, plan, ledger, change, cluster), report.meter(plan, ledger) as meter:
            engine.connect()
            catch_signals()
            with metrics.exported(config, predictor, plan, ledger) as exported:
                while units := list(plan.remaining(ledger.coverage)):
                    _work(config, predictor, archive, plan, ledger, lock, (meter, exported), units)
            ledgers.sweep(ledger)
        ledgers.check_newest(ledger)
        output.finish(config.output)
        return Report.load(config.output)


def _work(
    config: RunConfig,
    predictor: Predictor,
    archive: Archive,
    plan: Plan,
    ledger: Ledger,
    lock: Lock,
    watchers: "Sequence[Meter | RunMetrics]",
    units: "list[Unit]",
) -> None:
    """One pass over what remains. Whatever a pass leaves uncovered, the next one does."""
    from pipeline import engine

    commits_before = len(ledger.names)
    flow = engine.Flow.of(config, predictor, archive, plan, ledger.attempt, units)
    for commit in flow.commits():
        lock.check()
        if lock.slow.is_set():
            lock.slow.clear()
            ledgers.check_newest(ledger)
        _accept(ledger, commit)
        for watcher in watchers:
            watcher.update()
        if not plan.uncounted_shards:
            _check_errors(config, plan, ledger)
    if len(ledger.names) == commits_before:
        raise NightshiftError(
            f"no image was committed in a whole pass over {len(units)} shards of {config.output}; run the same command "
            "again, and if it ends so again, look at Ray's logs of the 'Write part' tasks"
        )


def _accept(ledger: Ledger, commit: Commit) -> None:
    """Count a commit in, or take it back. A name that counts already is that commit again: a later try found it."""
    if not ledger.accept(commit) and commit.name not in ledger.names:
        sinks.remove(ledger.output, commit)


def _check_errors(config: RunConfig, plan: Plan, ledger: Ledger) -> None:
    planned = plan.images(ledger.coverage.totals)
    if planned is not None and ledger.errors > config.max_error_rate * planned:
        kinds = (ledger.earlier.errors_by_type + ledger.current.errors_by_type).most_common(3)
        raise TooManyErrors(
            f"{ledger.errors} of {planned} images are bad ({', '.join(f'{count} × {kind}' for kind, count in kinds)}), "
            f"more than --max-error-rate {config.max_error_rate:g} allows; see {config.output}/_errors"
        )


@contextmanager
def _reported(
    config: RunConfig,
    predictor: Predictor,
    plan: Plan,
    ledger: Ledger,
    change: Change | None,
    cluster: Cluster | None,
) -> Iterator[None]:
    """However the work ends, `_report.json` and the attempt's record say so; unless another driver has the output."""
    started = time.monotonic()
    status = "failed"
    try:
        yield
        _check_errors(config, plan, ledger)
        status = "done"
    except NightshiftError as error:
        status = type(error).__name__
        raise
    except KeyboardInterrupt:
        status = Interrupted.__name__
        raise
    finally:
        if status != OutputLocked.__name__:
            model = str(predictor.settings().get("model", ""))
            made = Report.of(plan, ledger, model, status, time.monotonic() - started, change, cluster)
            # Where the work failed since nothing can be written, that is what the user must be told.
            suppressed = () if status == "done" else (OSError, StorageRefused, OutputLocked)
            with contextlib.suppress(*suppressed):
                ledgers.check_newest(ledger)
                made.save()
                ledgers.end(ledger, status)


@contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM end the work with `Interrupted`, wherever it stands; yields what catches them anew.

    Until it gets here it is a KeyboardInterrupt: what tries again after other exceptions, here or in Ray, lets it pass.
    """
    stopped_by = signal.SIGINT

    def stop(number: int, _: object) -> None:
        nonlocal stopped_by
        stopped_by = signal.Signals(number)
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # one is enough: what follows takes less than three seconds
        raise KeyboardInterrupt

    def catch() -> None:
        for number in before:
            signal.signal(number, stop)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    catch()
    try:
        yield catch
    except KeyboardInterrupt:
        raise Interrupted(stopped_by) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
