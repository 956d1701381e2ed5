"""What a run tells Prometheus as it works. Ray's agent on each node exports it, as `ray_nightshift_…`.

A cluster that a job starts for itself exports nothing; there the calls below only add to a number. Names follow
https://prometheus.io/docs/practices/naming/; infra/observability/README.md lists them.
"""

import re
import string
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from urllib.parse import quote

from ray.util import metrics

from pipeline import output, storage
from pipeline.config import RunConfig, fingerprint
from pipeline.ledger import Ledger
from pipeline.plan import Plan
from pipeline.predictors import Predictor

REPEAT_SECONDS = 1  # below the shortest interval at which Ray reports


def labels(config: RunConfig, predictor: Predictor) -> dict[str, str]:
    """The labels of every series of a run. In ASCII, since Ray takes no other.

    run: the output's last name and the start of the fingerprint, `embeddings-3f9a1c20`. output: its URI.
    """
    uri = storage.redact(config.output).rstrip("/")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", uri.rpartition("/")[2])
    settings = fingerprint(output.settings(config, predictor))
    return {"run": f"{name}-{settings[:8]}", "output": quote(uri, safe=string.printable)}


class RunMetrics:
    """The driver's part: what the ledger and the plan add up to. Counters are of this attempt, gauges of the run."""

    def __init__(self, config: RunConfig, plan: Plan, ledger: Ledger, labels: Mapping[str, str]) -> None:
        self.plan, self.ledger = plan, ledger
        self.uncounted_shards, self.commits_before = plan.uncounted_shards, len(ledger.names)
        self.images = _Total("images_total", "Images that are accounted for, bad ones among them", labels)
        self.errors = _Total("errors_total", "Bad images, by stage and kind", labels, "stage", "error_type")
        self.bytes_read = _Total("bytes_read_total", "Bytes of encoded images", labels)
        self.seconds = _Total("stage_seconds_total", "Seconds of workers' time, by stage", labels, "stage")
        self.commits = _Total("commits_total", "Parts that were written and committed", labels)
        self.active = _Level("run_active", "1 while the driver works, 0 once it has ended", labels)
        self.done_images = _Level("done_images", "Images that are accounted for, by all attempts", labels)
        self.done_errors = _Level("done_errors", "Bad images, by all attempts", labels)
        self.planned_images = _Level("planned_images", "Images of the plan, once they are all counted", labels)
        self.done_bytes = _Level("done_bytes", "Bytes of encoded images read, by all attempts", labels)
        self.planned_bytes = _Level("planned_bytes", "Bytes of the plan's shards as they are stored", labels)
        self.last_commit = _Level("last_commit_timestamp_seconds", "Unix time of the last commit, or the start", labels)
        self.max_error_ratio = _Level("max_error_ratio", "Share of bad images that ends the run", labels)
        self.active.set(1)
        self.max_error_ratio.set(config.max_error_rate)
        self.update()

    def update(self) -> None:
        """Tell what the ledger holds now; once a commit."""
        now, earlier = self.ledger.current, self.ledger.earlier
        self.images.reach(now.rows + now.errors)
        for kind, images in now.errors_by_type.items():
            stage, _, error_type = kind.partition("/")
            self.errors.reach(images, stage=stage, error_type=error_type)
        self.bytes_read.reach(now.bytes_read)
        for stage, seconds in now.seconds.items():
            self.seconds.reach(seconds, stage=stage)
        self.commits.reach(len(self.ledger.names) - self.commits_before)
        self.done_images.set(self.ledger.rows + self.ledger.errors)
        self.done_errors.set(self.ledger.errors)
        totals = self.ledger.coverage.totals
        self.planned_images.set(self.plan.images(totals) if len(totals) >= self.uncounted_shards else None)
        self.done_bytes.set(earlier.bytes_read + now.bytes_read)
        self.planned_bytes.set(self.plan.size_bytes)
        self.last_commit.set(time.time())

    def repeat(self) -> None:
        """Tell every gauge again: Ray forgets one that was not set for two of its report intervals."""
        for level in vars(self).values():
            if isinstance(level, _Level):
                level.repeat()


@contextmanager
def exported(config: RunConfig, predictor: Predictor, plan: Plan, ledger: Ledger) -> Iterator[RunMetrics]:
    """A run's metrics, as long as it works."""
    run, ended = RunMetrics(config, plan, ledger, labels(config, predictor)), threading.Event()

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
    """A model actor's part: what the driver does not see."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.images = _counter("batch_images_total", "Images that came in batches to the model actors", labels)
        self.capacity = _counter("batch_capacity_images_total", "Images that full batches would have held", labels)
        self.gpu_memory = _gauge("gpu_memory_bytes", "Memory of its GPU that a model actor holds", labels)

    def add(self, images: int, batch_size: int, gpu_memory_bytes: int | None) -> None:
        """Tell of one batch. gpu_memory_bytes: None without a GPU. The row that ends a shard may come alone."""
        if images:
            self.images.inc(images)
            self.capacity.inc(batch_size)
        self.gpu_memory.set(gpu_memory_bytes)


class _Total:
    """A counter that is told how far it has come, for each value of its own labels."""

    def __init__(self, name: str, description: str, labels: Mapping[str, str], *keys: str) -> None:
        self.counter = _counter(name, description, labels, *keys)
        self.told: Counter[tuple[str, ...]] = Counter()

    def reach(self, total: float, **tags: str) -> None:
        key = tuple(tags.values())
        if total > self.told[key]:
            self.counter.inc(total - self.told[key], tags)
            self.told[key] = total  # type: ignore[assignment]  # seconds are no whole numbers


class _Level:
    """A gauge that remembers what it was told."""

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
