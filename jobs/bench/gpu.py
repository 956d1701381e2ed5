"""The parts of a run on one GPU, each alone, and all of them together in one process without Ray."""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from jobs.bench.feed import Feed
from pipeline.decode import Encoded, leave_encoded
from pipeline.predict import Predict
from pipeline.predictors import Embedder
from pipeline.prefetch import ordered_map

WARM_UPS = 4
"""Calls a thread before the clock starts: kernels are chosen, graphs recorded."""

WARM_UP_SHARE = 0.2
"""Of the images of a whole pipeline, what passes before the clock starts: processes start, and queues fill."""


def gpu_id() -> str | None:
    """Of the first GPU that this process may use, as nvidia-smi's -i takes it; None where there is none."""
    if not torch.cuda.is_available():
        return None
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def gpu_name() -> str | None:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def embedder(model: str, batch_size: int, compile: str) -> Embedder:
    """Loaded, as an actor that has the GPU to itself has it."""
    found = Embedder(model=model, weights="random", compile=compile)
    found.prepare()
    found.batch_size, found.gpu_share = batch_size, float(torch.cuda.is_available())
    found.load()
    return found


def release_memory() -> None:
    """Give the GPU's memory to other processes, after the last predictor was let go."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def concurrency(predictor: Embedder) -> int:
    """Batches that an actor has under way."""
    return predictor.max_concurrency if torch.cuda.is_available() else 1


def predict_rate(predictor: Embedder, batch_size: int, seconds: float, on_device: bool) -> float:
    """images/s from pixels, on the device or in this process's memory, to embeddings in its memory."""
    side = predictor.transform.crop
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, side, side, 3), np.uint8)
    given = torch.from_numpy(pixels).to(predictor.runner.device) if on_device else pixels

    def work() -> int:
        predictor.predict(given)
        return batch_size

    return rate(work, seconds, concurrency(predictor))


def decode_rate(predictor: Embedder, files: Sequence[bytes], batch_size: int, seconds: float) -> float:
    """images/s from JPEG bytes to pixels of the network's size, on its device; `files` in turn."""
    jpegs = [jpeg for data in files if (jpeg := leave_encoded(data, predictor.transform))]
    if not jpegs:
        return 0.0
    batch: list[Encoded] = [jpegs[i % len(jpegs)] for i in range(batch_size)]

    def work() -> int:
        predictor.decode(batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return batch_size

    return rate(work, seconds, concurrency(predictor))


def rate(work: Callable[[], int], seconds: float, threads: int) -> float:
    """images/s; `work` returns how many it has done."""
    started = 0.0

    def start_clock() -> None:
        nonlocal started
        started = time.perf_counter()

    everyone_is_warm = threading.Barrier(threads, start_clock)

    def one_thread() -> int:
        try:
            for _ in range(WARM_UPS):
                work()
        except BaseException:
            everyone_is_warm.abort()
            raise
        everyone_is_warm.wait()
        done = 0
        while time.perf_counter() < started + seconds:
            done += work()
        return done

    with ThreadPoolExecutor(threads) as pool:
        images = sum(each.result() for each in [pool.submit(one_thread) for _ in range(threads)])
    return images / (time.perf_counter() - started)


@dataclass
class Progress:
    """What came out of a pipeline, and when. counts: images; times: seconds since the epoch."""

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, images: int) -> None:
        self.times.append(time.time())
        self.counts.append(images)

    @property
    def window(self) -> tuple[float, float]:
        """From the end of the warm-up to the last image."""
        return self.times[self._warm], self.times[-1]

    @property
    def images_per_second(self) -> float | None:
        """In that window; None where it holds nothing."""
        start, stop = self.window
        return sum(self.counts[self._warm + 1 :]) / (stop - start) if stop > start else None

    @property
    def _warm(self) -> int:
        """The place of the first batch that ends the warm-up."""
        return int(np.searchsorted(np.cumsum(self.counts), WARM_UP_SHARE * sum(self.counts)))


def run_feed(feed: Feed) -> Progress:
    """Read and decode alone."""
    progress = Progress()
    for images in feed.images():
        progress.add(images)
    return progress


def run_pipeline(feed: Feed, predictor: Embedder) -> Progress:
    """Files in, embeddings out: loader processes, then the network in this process, as an actor runs it."""
    predict = Predict(predictor, {})
    threads = concurrency(predictor)
    progress = Progress()
    for table in ordered_map(predict, feed.tables(), threads, 2 * threads):
        progress.add(table["embedding"].length() - table["embedding"].null_count)
    return progress
