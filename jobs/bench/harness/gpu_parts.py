"""The parts of a run on one GPU, each alone: the network, and decoding on the GPU."""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.images.decode import leave_encoded
from pipeline.images.pixels import Encoded
from pipeline.predictors.base import Allotment
from pipeline.predictors.embed import Embedder

WARM_UPS = 4
"""Calls per thread before the clock starts: torch chooses kernels and records graphs."""


def gpu_id() -> str | None:
    """The first GPU that this process may use, in the form of nvidia-smi's -i; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def gpu_name() -> str | None:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def embedder(model: str, batch_size: int, compile: str) -> Embedder:
    """A loaded predictor, as in an actor with a whole GPU."""
    predictor = Embedder(model=model, weights="random", compile=compile)
    predictor.prepare()
    predictor.load(Allotment(batch_size=batch_size, gpu_share=float(torch.cuda.is_available())))
    return predictor


def release_memory() -> None:
    """Free the GPU memory of a predictor that was deleted."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def concurrency(predictor: Embedder) -> int:
    """Batches that an actor has in progress."""
    return predictor.max_concurrency if torch.cuda.is_available() else 1


def predict_rate(predictor: Embedder, batch_size: int, seconds: float, on_device: bool) -> float:
    """images/s from pixels, on the device or in the memory of this process, to embeddings in its memory."""
    side = predictor.transform.crop
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, side, side, 3), np.uint8)
    batch = torch.from_numpy(pixels).to(predictor.session.device) if on_device else pixels

    def work() -> int:
        predictor.predict(batch)
        return batch_size

    return rate(work, seconds, concurrency(predictor))


def decode_rate(predictor: Embedder, files: Sequence[bytes], batch_size: int, seconds: float) -> float:
    """images/s from the bytes of JPEGs to pixels of the network's size on its device; the files repeat."""
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
    """images/s of so many threads that call `work` for so long. It returns the images that it has processed."""
    started = 0.0

    def start_clock() -> None:
        nonlocal started
        started = time.perf_counter()

    all_warm = threading.Barrier(threads, start_clock)

    def one_thread() -> int:
        try:
            for _ in range(WARM_UPS):
                work()
        except BaseException:
            all_warm.abort()
            raise
        all_warm.wait()
        images = 0
        while time.perf_counter() < started + seconds:
            images += work()
        return images

    with ThreadPoolExecutor(threads) as pool:
        images = sum(each.result() for each in [pool.submit(one_thread) for _ in range(threads)])
    return images / (time.perf_counter() - started)
