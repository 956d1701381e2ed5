"""The network at work: on its device, in its number format, folded and compiled where that pays."""

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional

from pipeline.config import Transform
from pipeline.cpu import keep_freed_memory, lone_threads
from pipeline.fetch import cache_folder
from pipeline.gpu import choose_device, evenly, images_that_fit, refused_by_gpu, rounded_up
from pipeline.head import Network
from pipeline.lane import Forward, Lane, Outputs, finish
from pipeline.models import ModelSpec, build
from pipeline.packed import packed

log = logging.getLogger(__name__)

COMPILE_PAYS_SECONDS = {"cpu": 600.0, "cuda": 300.0}
"""With so much work left, uncompiled, compiling pays. On two cores with AMX it takes 7 to 20 s and saves a quarter of a
packed ResNet-18's time, a twentieth of a ResNet-50's; on a GPU this was not measured."""

CPU_BATCH_SIZE = 8
"""Images that a CPU computes at once: what lies between two layers of more does not stay in its caches. Against 64,
ResNet-50 runs 1.2–1.3 times as fast, ResNet-18 1.1 times (two cores, AVX2); 4 and 16 are no faster with AMX."""

WARM_UPS = {"cpu": 1, "cuda": 3}
"""Batches of a lane before it is known how fast the network runs: cuDNN tries its kernels out in each thread, and what
the other lane starts waits meanwhile."""

PROBE_IMAGES = 8
LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as Pillow's convert("L")."""


class NetworkRunner:
    """A network on this process's GPU, or on the CPU with so many threads.

    compile: on (at once), off, or auto: once it is known how fast the network runs without, if the `images` that are to
    come make it worth while. A compiled network takes batches of one size; half of one, and less, goes without it.
    batch_size: images at once at most; fewer on a CPU, and where the GPU's memory does not hold so many.
    lanes: batches under way at once, each from a thread of its own; a GPU's network is started by one at a time.
    gpu_share: of a GPU, what this process was given, none with 0; its batches are made so small that they fit into that
    share of the memory. With None it takes the whole GPU where there is one.
    Raises SettingRefused for a GPU that it was given and that torch cannot use.
    """

    def __init__(
        self,
        spec: ModelSpec,
        precision: str,
        compile: str,
        batch_size: int,
        *,
        threads: int | None = None,
        images: int | None = None,
        lanes: int = 1,
        gpu_share: float | None = None,
    ) -> None:
        self.device = choose_device(gpu_share)
        self.workers: ThreadPoolExecutor | None = None
        if self.device.type == "cpu":
            keep_freed_memory()
            # Each thread has images of its own: threads that share a layer wait for the one whose core decodes.
            self.workers = lone_threads(threads or torch.get_num_threads())
        dtype = _dtype(precision, self.device)
        torch.backends.cudnn.benchmark = True  # batches are of few sizes: choose the fastest kernels for each, once
        if dtype is torch.float32:
            torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 bits of a float32's 23
        self.transform = spec.transform
        self.batch_size = min(batch_size, CPU_BATCH_SIZE) if self.device.type == "cpu" else batch_size
        self.images = images if compile == "auto" else None
        self.fixed_size: int | None = None
        self.state = f"{self.device}, {str(dtype).removeprefix('torch.')}"
        network = _FromPixels(_folded(build(spec), spec), spec, dtype)
        self.batches, self.pace = 0, math.inf  # seconds an image, uncompiled
        self.starting = threading.RLock()
        self.all_lanes = [Lane(self.device) for _ in range(lanes)]
        self.free_lanes: SimpleQueue[Lane] = SimpleQueue()
        for lane in self.all_lanes:
            self.free_lanes.put(lane)
        with refused_by_gpu(self.device):
            self.forward: Forward = network.to(self.device)
            self.eager: Forward = self.forward
            if self.device.type == "cuda":
                self.batch_size = evenly(self.batch_size, self._fitting(gpu_share or 1.0))
        if self.workers:
            noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, self._blank(1).shape, np.uint8))
            self.forward = self.workers.submit(packed, network, noise, dtype, self.batch_size).result()
            self.eager = self.forward
        self.largest = self.batch_size
        if compile == "on":
            self._compile()

    @contextmanager
    def lane(self) -> Iterator[Callable[[np.ndarray | Tensor], Outputs]]:
        """A function for this thread: uint8 [N, crop, crop, 3] or tiles of less, N ≥ 1 → float32 [N, embedding_dim] and
        [N, num_classes] or None, on the device. They are to be taken from there before the context ends."""
        lane = self.free_lanes.get()
        try:
            with lane.entered():
                yield partial(self._run, lane)
        finally:
            self.free_lanes.put(lane)

    def join(self, pixels: Sequence[np.ndarray | Tensor]) -> Tensor:
        """Batches of any sides, each uint8 [N, side, side, 3] → one of all, [N, crop, crop, 3], on the device."""
        on_device = (torch.as_tensor(np.array(each) if isinstance(each, np.ndarray) else each) for each in pixels)
        return torch.cat([self._at_crop(each.to(self.device)) for each in on_device])

    def _at_crop(self, pixels: Tensor) -> Tensor:
        return pixels if pixels.shape[1] == self.transform.crop else _enlarged(pixels, self.transform)

    def _run(self, lane: Lane, pixels: np.ndarray | Tensor) -> Outputs:
        started = time.perf_counter()
        pieces = [pixels[first : first + self.batch_size] for first in range(0, len(pixels), self.batch_size)]
        rows = [self._rows(len(piece)) for piece in pieces]
        run_all = self.workers.map if self.workers else map
        found = list(run_all(partial(self._batch, lane), pieces, rows))
        if self.images is not None:
            finish(self.device)
            self._consider(len(pixels), time.perf_counter() - started)
        if len(found) == 1:
            return found[0]
        logits = [each for _, each in found if each is not None]
        return torch.cat([features for features, _ in found]), torch.cat(logits) if logits else None

    def _rows(self, images: int) -> int:
        """What a batch of so many is filled up to."""
        if self.fixed_size and self.fixed_size // 2 < images <= self.fixed_size:
            return self.fixed_size
        return rounded_up(images, self.batch_size) if self.device.type == "cuda" else images

    def _batch(self, lane: Lane, pixels: np.ndarray | Tensor, rows: int) -> Outputs:
        with torch.no_grad():
            on_device = self._at_crop(lane.upload(pixels, rows))
            with nullcontext() if self.workers else self.starting:
                is_fixed = rows == self.fixed_size
                features, logits = lane.run(self.forward if is_fixed else self.eager, on_device, is_fixed)
        return features[: len(pixels)], None if logits is None else logits[: len(pixels)]

    def _consider(self, images: int, seconds: float) -> None:
        """Compile if that pays: decided once, by the fastest batch, when there was one that did not have to warm up.

        seconds: of a batch while each lane had one.
        """
        with self.starting:
            if self.images is None:
                return
            self.images -= images
            if images < self.batch_size // 2:
                return
            self.batches += 1
            self.pace = min(self.pace, seconds / images / len(self.all_lanes))
            if self.batches > WARM_UPS[self.device.type] * len(self.all_lanes):
                left_seconds, self.images = self.images * self.pace, None
                if left_seconds > COMPILE_PAYS_SECONDS[self.device.type]:
                    self._compile()

    def limit_batch(self, size: int) -> None:
        """Give back what batches have taken, and take no larger ones, nor any larger than it began with. A compiled
        network is compiled again for that size."""
        with self.starting:
            self.batch_size = evenly(self.largest, min(size, self.largest))
            self.fixed_size = self.fixed_size and self.batch_size
            for lane in self.all_lanes:
                lane.free()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _fitting(self, share: float) -> int:
        """How many images all lanes may hold at once, from what a few take of the GPU's free memory."""
        lane = self.all_lanes[0]
        with lane.entered():
            for _ in range(2):  # the second counts: in the first, libraries try out what takes more
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                self._batch(lane, self._blank(PROBE_IMAGES), PROBE_IMAGES)
                torch.cuda.synchronize()
        image_bytes = (torch.cuda.max_memory_allocated() - before) / PROBE_IMAGES
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return images_that_fit(min(free, total * share), image_bytes, len(self.all_lanes))

    def _blank(self, images: int) -> np.ndarray:
        return np.zeros((images, self.transform.crop, self.transform.crop, 3), np.uint8)

    def _compile(self) -> None:
        eager, size = self.forward, self.batch_size
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled")))
        options: dict[str, Any] | None = {"freezing": True} if self.device.type == "cpu" else None
        threads = torch.get_num_threads()
        if self.workers:
            torch.set_num_threads(1)  # as where it will run: what is compiled goes by it
        try:
            compiled = torch.compile(eager, dynamic=False, options=options)
            before = _graph_breaks()
            with torch.no_grad():
                compiled(torch.from_numpy(self._blank(size)).to(self.device))
            if _graph_breaks() > before:  # it looks at its own numbers: recording it fails, and harms torch's allocator
                for lane in self.all_lanes:
                    lane.records = False
            self.forward, self.fixed_size, self.state = compiled, size, f"{self.state}, compiled"
        except Exception as error:  # no C++ compiler, or a network that the compiler cannot take
            reason = " ".join(str(error).splitlines()[:2])
            log.warning("torch.compile failed, so the network runs uncompiled: %s", reason)
            self.state = f"{self.state}, not compiled: {reason}"
        finally:
            torch.set_num_threads(threads)


def _graph_breaks() -> int:
    """How often torch.compile had to cut a network in two, in this process."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())


def _enlarged(tiles: Tensor, transform: Transform) -> Tensor:
    """uint8 [N, side, side, 3] → [N, crop, crop, 3], as `decode` would: enlarging needs no antialiasing.

    A CPU does it on bytes, fourteen times as fast and with Pillow's own rounding; CUDA has no such kernel.
    """
    x = tiles.permute(0, 3, 1, 2)
    x = x if x.device.type == "cpu" else x.float()
    x = functional.interpolate(x, size=(transform.resize, transform.resize), mode="bilinear", align_corners=False)
    start = round((transform.resize - transform.crop) / 2)
    stop = start + transform.crop
    x = x[..., start:stop, start:stop]
    return (x if x.dtype is torch.uint8 else x.round_().to(torch.uint8)).permute(0, 2, 3, 1)


class _FromPixels(nn.Module):
    """uint8 [N, H, W, 3] on the device → float32 embedding and logits. The scale in float32, the network in `dtype`."""

    scale: Tensor
    shift: Tensor
    luma: Tensor

    def __init__(self, network: Network, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype, self.one_channel = dtype, spec.in_channels == 1
        mean, std = torch.tensor(spec.transform.mean), torch.tensor(spec.transform.std)
        # For a whole line of pixels: over three channels at a time the CPU takes twice as long.
        self.register_buffer("scale", (1 / (255 * std)).repeat(spec.transform.crop))
        self.register_buffer("shift", (-mean / std).repeat(spec.transform.crop))
        self.register_buffer("luma", torch.tensor(LUMA))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        images, height, width, _ = pixels.shape
        x = pixels.float()
        if self.one_channel:
            x = (x * self.luma).sum(3)
        x = torch.addcmul(self.shift, x.reshape(images, height, -1), self.scale)
        x = x.reshape(images, height, width, -1).permute(0, 3, 1, 2)
        features, logits = self.network(x.to(self.dtype))
        return features.float(), None if logits is None else logits.float()


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 on a CPU pays only where it computes in it: AVX512-BF16 or AMX."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _folded(network: Network, spec: ModelSpec) -> Network:
    """Each batch normalisation folded into the convolution before it, where the network can be traced.

    A trace is one way through the network's Python and may be another network, so one image is put through both.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    size = spec.transform.crop
    image = torch.randn(1, spec.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            folded = fuse(network.body)
            before, after = network.body(image), folded(image)
        except Exception as error:  # tracing runs the network's own Python
            log.debug("%s stays unfolded: %s", spec.model, error)
            return network
        if torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
            network.body = folded
    return network
