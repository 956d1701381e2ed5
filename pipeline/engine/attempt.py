"""One attempt at a run: passes over what remains of the plan until it is covered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.config import RunConfig
from pipeline.engine.datasource import Unit
from pipeline.engine.flow import Flow
from pipeline.errors import NightshiftError
from pipeline.output import ledger as ledgers
from pipeline.output import parts
from pipeline.output.commit import Commit
from pipeline.output.ledger import Ledger
from pipeline.output.lock import Lock
from pipeline.output.run_record import RunRecord
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan
from pipeline.predictors.base import Predictor


class Watcher(Protocol):
    def update(self) -> None:
        """Called after each commit."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Everything that the work of one attempt needs."""

    config: RunConfig
    predictor: Predictor
    record: RunRecord
    archive: Archive
    plan: Plan
    ledger: Ledger
    lock: Lock
    on_commit: Callable[[Commit], object] = lambda commit: None

    def work(self, watchers: Sequence[Watcher]) -> None:
        """Compute every image that no commit covers. A later pass does what an earlier one left."""
        while units := list(self.plan.remaining(self.ledger.coverage)):
            self._pass(units, watchers)

    def _pass(self, units: list[Unit], watchers: Sequence[Watcher]) -> None:
        commits_before = len(self.ledger.names)
        flow = Flow.of(self.config, self.predictor, self.record, self.archive, self.plan, self.ledger.attempt, units)
        for commit in flow.commits():
            self.lock.check()
            if self.lock.slow.is_set():
                self.lock.slow.clear()
                ledgers.check_newest(self.ledger)
            self._accept(commit)
            self.on_commit(commit)
            for watcher in watchers:
                watcher.update()
            if not self.plan.uncounted_shards:
                ledgers.check_error_rate(self.ledger, self.plan, self.config.max_error_rate)
        if len(self.ledger.names) == commits_before:
            raise NightshiftError(
                f"no image was committed in a whole pass over {len(units)} shards of {self.config.output}; run the "
                "same command again, and if it ends so again, look at Ray's logs of the 'Write part' tasks"
            )

    def _accept(self, commit: Commit) -> None:
        """Count a commit, or remove it. A name that counts already is the same commit: a later try returned it."""
        if not self.ledger.accept(commit) and commit.name not in self.ledger.names:
            parts.remove(self.ledger.output, commit)
