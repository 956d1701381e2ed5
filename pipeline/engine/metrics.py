"""Metrics of a run for Prometheus. Ray's agent on each node exports them as `ray_nightshift_…`.

The cluster that a local job starts exports nothing; there the calls below only add to a number. Names follow
https://prometheus.io/docs/practices/naming/; infra/observability/README.md lists them.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray.util import metrics

from pipeline.config import RunConfig
from pipeline.output.ledger import Ledger
from pipeline.output.run_record import RunRecord
from pipeline.planning.plan import Plan

REPEAT_SECONDS = 1  # below the shortest interval at which Ray reports


class RunMetrics:
    """Metrics of the driver, from the ledger and the plan. Counters are of this attempt, gauges of the run."""

    def __init__(self, config: RunConfig, plan: Plan, ledger: Ledger, labels: Mapping[str, str]) -> None:
        self.plan, self.ledger = plan, ledger
        self.uncounted_shards, self.commits_before = plan.uncounted_shards, len(ledger.names)
        self.images = _Total("images_total", "Images that are done, including bad ones", labels)
        self.errors = _Total("errors_total", "Bad images, by stage and kind", labels, "stage", "error_type")
        self.bytes_read = _Total("bytes_read_total", "Bytes of encoded images", labels)
        self.seconds = _Total("stage_seconds_total", "Worker seconds, by stage", labels, "stage")
        self.commits = _Total("commits_total", "Parts written and committed", labels)
        self.active = _Level("run_active", "1 while the driver works, 0 once it has ended", labels)
        self.done_images = _Level("done_images", "Images that are done, by all attempts", labels)
        self.done_errors = _Level("done_errors", "Bad images, by all attempts", labels)
        self.planned_images = _Level("planned_images", "Images of the plan, once they are all counted", labels)
        self.done_bytes = _Level("done_bytes", "Bytes of encoded images read, by all attempts", labels)
        self.planned_bytes = _Level("planned_bytes", "Bytes of the plan's shards as they are stored", labels)
        self.last_commit = _Level("last_commit_timestamp_seconds", "Unix time of the last commit, or the start", labels)
        self.max_error_ratio = _Level("max_error_ratio", "Ratio of bad images that ends the run", labels)
        self.active.set(1)
        self.max_error_ratio.set(config.max_error_rate)
        self.update()

    def update(self) -> None:
        """Export the state of the ledger; called once per commit."""
        now, earlier = self.ledger.current, self.ledger.earlier
        self.images.reach(now.rows + now.errors + now.empty)
        for kind, images in now.errors_by_type.items():
            stage, _, error_type = kind.partition("/")
            self.errors.reach(images, stage=stage, error_type=error_type)
        self.bytes_read.reach(now.bytes_read)
        for stage, seconds in now.seconds.items():
            self.seconds.reach(seconds, stage=stage)
        self.commits.reach(len(self.ledger.names) - self.commits_before)
        self.done_images.set(self.ledger.rows + self.ledger.errors + self.ledger.empty)
        self.done_errors.set(self.ledger.errors)
        totals = self.ledger.coverage.totals
        self.planned_images.set(self.plan.images(totals) if len(totals) >= self.uncounted_shards else None)
        self.done_bytes.set(earlier.bytes_read + now.bytes_read)
        self.planned_bytes.set(self.plan.size_bytes)
        self.last_commit.set(time.time())

    def repeat(self) -> None:
        """Set every gauge again: Ray drops one that was not set for two report intervals."""
        for level in vars(self).values():
            if isinstance(level, _Level):
                level.repeat()


@contextmanager
def exported(config: RunConfig, record: RunRecord, plan: Plan, ledger: Ledger) -> Iterator[RunMetrics]:
    """Export the metrics of a run while it works."""
    run, ended = RunMetrics(config, plan, ledger, record.labels), threading.Event()

    def keep_alive() -> None:
        while not ended.wait(REPEAT_SECONDS):
            run.repeat()

    heart = threading.Thread(target=keep_alive, name="metrics", daemon=True)
    heart.start()
    try:
        yield run
    finally:
        ended.set()
        heart.join()
        run.active.set(0)


class ActorMetrics:
    """Metrics of one model actor, which the driver does not see."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.images = _counter("batch_images_total", "Images in the batches of the model actors", labels)
        self.capacity = _counter("batch_capacity_images_total", "Images that full batches would hold", labels)
        self.gpu_memory = _gauge("gpu_memory_bytes", "GPU memory that a model actor holds", labels)

    def add(self, images: int, batch_size: int, gpu_memory_bytes: int | None) -> None:
        """Count one batch. images: 0 if the row that ends a shard comes alone. gpu_memory_bytes: None without a GPU."""
        if images:
            self.images.inc(images)
            self.capacity.inc(batch_size)
        self.gpu_memory.set(gpu_memory_bytes)


class _Total:
    """A counter that is set to a total, for each value of its extra labels."""

    def __init__(self, name: str, description: str, labels: Mapping[str, str], *keys: str) -> None:
        self.counter = _counter(name, description, labels, *keys)
        self.reached: Counter[tuple[str, ...]] = Counter()

    def reach(self, total: float, **tags: str) -> None:
        key = tuple(tags.values())
        if total > self.reached[key]:
            self.counter.inc(total - self.reached[key], tags)
            self.reached[key] = total  # type: ignore[assignment]  # seconds are no whole numbers


class _Level:
    """A gauge that remembers its value."""

    def __init__(self, name: str, description: str, labels: Mapping[str, str]) -> None:
        self.gauge = _gauge(name, description, labels)
        self.value: float | None = None

    def set(self, value: float | None) -> None:
        self.value = value
        self.repeat()

    def repeat(self) -> None:
        if self.value is not None:
            self.gauge.set(self.value)


def _counter(name: str, description: str, labels: Mapping[str, str], *keys: str) -> metrics.Counter:
    counter = metrics.Counter(f"nightshift_{name}", description, (*labels, *keys))
    counter.set_default_tags(dict(labels))
    return counter


def _gauge(name: str, description: str, labels: Mapping[str, str]) -> metrics.Gauge:
    gauge = metrics.Gauge(f"nightshift_{name}", description, tuple(labels))
    gauge.set_default_tags(dict(labels))
    return gauge
