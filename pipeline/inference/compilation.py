"""torch.compile for inference: decide whether it pays, and compile a network."""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.models.download import cache_folder

log = logging.getLogger(__name__)

MIN_REMAINING_SECONDS = {"cpu": 600.0, "cuda": 300.0}
"""Compile if more seconds of uncompiled work than this remain.

On two cores with AMX compiling takes 7 to 20 s. It saves 25 % of ResNet-18's time and 5 % of ResNet-50's. Not measured
on a GPU.
"""

WARM_UP_BATCHES = {"cpu": 1, "cuda": 3}
"""Batches of each lane before the decision: in the first ones cuDNN tries its kernels, and the other lanes wait."""

Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""uint8 pixels [N, H, W, 3] → embedding [N, embedding_dim], and logits [N, num_classes] or None."""


class CompileDecision:
    """Decides once, from the remaining images and the fastest batch so far, whether to compile. Not thread-safe."""

    def __init__(self, images: int | None, device: torch.device, lanes: int) -> None:
        """images: number of images to expect; None never compiles. lanes: number of batches computed at a time."""
        self.images_left, self.device, self.lanes = images, device, lanes
        self.batches, self.seconds_per_image = 0, math.inf

    def is_open(self) -> bool:
        """Whether more batches have to be timed."""
        return self.images_left is not None

    def should_compile(self, images: int, seconds: float, batch_size: int) -> bool:
        """Record the time of a batch of `images`; return True if the network is to be compiled now.

        seconds: measured while every lane computed a batch. Batches of less than half of batch_size are ignored.
        """
        if self.images_left is None:
            return False
        self.images_left -= images
        if images < batch_size // 2:
            return False
        self.batches += 1
        self.seconds_per_image = min(self.seconds_per_image, seconds / images / self.lanes)
        if self.batches <= WARM_UP_BATCHES[self.device.type] * self.lanes:
            return False
        remaining_seconds, self.images_left = self.images_left * self.seconds_per_image, None
        return remaining_seconds > MIN_REMAINING_SECONDS[self.device.type]


@dataclass(frozen=True, slots=True)
class Compiled:
    """Result of `compile_network`.

    forward: the compiled network, or the eager one if compiling failed.
    state: "compiled", or "not compiled" with the reason; for the report.
    is_whole: the network is one graph, without graph breaks.
    """

    forward: Forward
    state: str
    is_whole: bool


def compile_network(eager: Forward, images: Tensor, *, single_threaded: bool) -> Compiled:
    """Compile a network for batches of the shape of `images`; if that fails, log a warning and keep the eager network.

    images: uint8 [N, crop, crop, 3] on the network's device.
    single_threaded: generate code for worker threads in which torch uses one thread.
    Raises WeightsRefused if the cache folder cannot be created.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled")))
    options: dict[str, Any] | None = {"freezing": True} if images.device.type == "cpu" else None
    with _num_threads(1 if single_threaded else torch.get_num_threads()):
        try:
            forward = torch.compile(eager, dynamic=False, options=options)
            breaks = _graph_breaks()
            with torch.no_grad():
                forward(images)
            return Compiled(forward, "compiled", _graph_breaks() == breaks)
        except Exception as error:  # no C++ compiler, or code of the network that torch.compile does not support
            reason = " ".join(str(error).splitlines()[:2])
            log.warning("torch.compile failed, so the network runs uncompiled: %s", reason)
            return Compiled(eager, f"not compiled: {reason}", True)


@contextmanager
def _num_threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def _graph_breaks() -> int:
    """Number of graph breaks of torch.compile in this process so far."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())
