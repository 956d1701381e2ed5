"""InferenceSession: a network on its device, in its number format, folded, packed or compiled."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from pipeline.images.pixels import RGB8
from pipeline.inference.compilation import CompileDecision, compile_network
from pipeline.inference.cpu import keep_freed_memory, single_threaded_pool
from pipeline.inference.cuda_stream import Forward, Lane, Outputs, synchronize
from pipeline.inference.gpu import choose_device, even_batch_size, images_that_fit, padded_batch_size, refused_by_gpu
from pipeline.inference.normalize import FromPixels, enlarge_tiles
from pipeline.inference.onednn import pack_convolutions
from pipeline.models.classifier import Network
from pipeline.models.spec import ModelSpec, build

log = logging.getLogger(__name__)

CPU_BATCH_SIZE = 8
"""Images that a CPU thread computes at a time: the activations of larger batches do not fit in cache. Against 64,
ResNet-50 is 1.2 to 1.3 times as fast and ResNet-18 1.1 times (two cores, AVX2). With AMX 4 and 16 are no faster."""

TRIAL_IMAGES = 8
"""Images of the batch that measures a network's GPU memory."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class InferenceSession:
    """A network on this process's GPU, or on the CPU.

    precision: float32, bfloat16, float16 or auto.
    compile: "on" compiles at once, "off" never, "auto" once the time per batch is known, if enough images remain. A
    compiled network takes batches of one size. Batches of at most half that size run uncompiled.
    batch_size: largest number of images computed at a time. It is reduced on a CPU, and to fit the GPU's memory.
    cores: CPU threads to compute with; None for all. images: number of images to expect; None if unknown.
    lanes: number of batches in flight, each from its own thread. Only one thread launches kernels at a time.
    gpu_share: GPUs of this process; may be a fraction, and 0 for the CPU. Batches fit into that share of the GPU's
    memory. None: the whole GPU if there is one, else the CPU.
    Raises SettingRefused for a GPU that torch cannot use or that cannot run the network, and WeightsRefused.

    device: the device in use. state: device, number format and result of compiling, for the report.
    launch_lock: held while kernels are launched and graphs recorded on a GPU.
    """

    def __init__(
        self,
        spec: ModelSpec,
        precision: str,
        compile: str,
        batch_size: int,
        *,
        cores: int | None = None,
        images: int | None = None,
        lanes: int = 1,
        gpu_share: float | None = None,
    ) -> None:
        self.device = choose_device(gpu_share)
        self.workers = _start_workers(cores) if self.device.type == "cpu" else None
        dtype = choose_dtype(precision, self.device)
        _configure_cudnn(dtype)
        self.state = f"{self.device}, {str(dtype).removeprefix('torch.')}"
        self.transform, self.pixel_format = spec.transform, spec.pixel_format
        self.decision = CompileDecision(images if compile == "auto" else None, self.device, lanes)
        self.launch_lock = threading.RLock()
        self.all_lanes = [Lane(self.device) for _ in range(lanes)]
        self.free_lanes: SimpleQueue[Lane] = SimpleQueue()
        for lane in self.all_lanes:
            self.free_lanes.put(lane)
        self.batch_size = min(batch_size, CPU_BATCH_SIZE) if self.workers else batch_size
        self.fixed_size: int | None = None  # batch size of the compiled network
        network = FromPixels(_fold(build(spec), spec), spec, dtype)
        self.eager: Forward = network
        if self.workers:
            self.eager = self._packed(network, dtype, self.workers)
        else:
            self._move_to_gpu(network, gpu_share or 1.0)
        self.forward = self.eager
        self.max_batch_size = self.batch_size
        if compile == "on":
            self._compile()

    @contextmanager
    def lane(self) -> Iterator[Callable[[np.ndarray | Tensor], Outputs]]:
        """Context manager that yields a function to run batches; blocks until a lane is free.

        The function maps [N, crop, crop, bands] of the spec's pixel format, or smaller square tiles of uint8 RGB,
        N ≥ 1, to float32 [N, embedding_dim] and [N, num_classes] or None, on the device. Use it in this thread. Copy
        the results before the context ends.
        """
        lane = self.free_lanes.get()
        try:
            with lane.entered():
                yield partial(self._run, lane)
        finally:
            self.free_lanes.put(lane)

    def join(self, pixels: Sequence[np.ndarray | Tensor]) -> Tensor:
        """Join batches of the spec's pixels, or of tiles of several sides, into one batch on the device."""
        tensors = (torch.as_tensor(np.array(each) if isinstance(each, np.ndarray) else each) for each in pixels)
        return torch.cat([self._at_crop(each.to(self.device)) for each in tensors])

    def limit_batch(self, size: int) -> None:
        """Free the memory of batches, and compute at most `size` images at a time from now on.

        The size never exceeds the initial one. A compiled network is compiled again for the new size.
        """
        with self.launch_lock:
            self.batch_size = even_batch_size(self.max_batch_size, min(size, self.max_batch_size))
            self.fixed_size = self.fixed_size and self.batch_size
            for lane in self.all_lanes:
                lane.free()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _packed(self, network: FromPixels, dtype: torch.dtype, workers: ThreadPoolExecutor) -> Forward:
        noise = np.random.default_rng(0).integers(0, 256, self._blank(1).shape).astype(self.pixel_format.dtype)
        return workers.submit(pack_convolutions, network, torch.from_numpy(noise), dtype, self.batch_size).result()

    def _move_to_gpu(self, network: FromPixels, share: float) -> None:
        with refused_by_gpu(self.device):
            self.eager = network.to(self.device)
            self.batch_size = even_batch_size(self.batch_size, self._max_images(share))

    def _max_images(self, share: float) -> int:
        """Images per batch that fit into a share of the GPU's memory, measured with a trial batch."""
        lane = self.all_lanes[0]
        with lane.entered():
            for _ in range(2):  # only the second counts: in the first one libraries try kernels that take more
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                self._run_piece(lane, self._blank(TRIAL_IMAGES), TRIAL_IMAGES)
                torch.cuda.synchronize()
        image_bytes = (torch.cuda.max_memory_allocated() - before) / TRIAL_IMAGES
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return images_that_fit(min(free, total * share), image_bytes, len(self.all_lanes))

    def _blank(self, images: int) -> np.ndarray:
        return np.zeros((images, *self.pixel_format.shape(self.transform)), self.pixel_format.dtype)

    def _run(self, lane: Lane, pixels: np.ndarray | Tensor) -> Outputs:
        started = time.perf_counter()
        pieces = [pixels[first : first + self.batch_size] for first in range(0, len(pixels), self.batch_size)]
        rows = [self._padded_size(len(piece)) for piece in pieces]
        run_all = self.workers.map if self.workers else map
        outputs = list(run_all(partial(self._run_piece, lane), pieces, rows))
        if self.decision.is_open():
            synchronize(self.device)
            self._compile_if_it_pays(len(pixels), time.perf_counter() - started)
        if len(outputs) == 1:
            return outputs[0]
        logits = [piece for _, piece in outputs if piece is not None]
        return torch.cat([features for features, _ in outputs]), torch.cat(logits) if logits else None

    def _padded_size(self, images: int) -> int:
        """Number of rows that a piece of `images` is padded to."""
        if self.fixed_size and self.fixed_size // 2 < images <= self.fixed_size:
            return self.fixed_size
        return padded_batch_size(images, self.batch_size) if self.device.type == "cuda" else images

    def _run_piece(self, lane: Lane, pixels: np.ndarray | Tensor, rows: int) -> Outputs:
        with torch.no_grad():
            on_device = self._at_crop(lane.upload(pixels, rows))
            with nullcontext() if self.workers else self.launch_lock:
                is_fixed = rows == self.fixed_size
                features, logits = lane.run(self.forward if is_fixed else self.eager, on_device, repeats=is_fixed)
        return features[: len(pixels)], None if logits is None else logits[: len(pixels)]

    def _at_crop(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1:] != self.pixel_format.shape(self.transform) and self.pixel_format != RGB8:
            raise ValueError(
                f"pixels of {list(pixels.shape[1:])}; the network takes {list(self.pixel_format.shape(self.transform))}"
            )
        return pixels if pixels.shape[1] == self.transform.crop else enlarge_tiles(pixels, self.transform)

    def _compile_if_it_pays(self, images: int, seconds: float) -> None:
        with self.launch_lock:
            if self.decision.should_compile(images, seconds, self.batch_size):
                self._compile()

    def _compile(self) -> None:
        eager, size = self.forward, self.batch_size
        images = torch.from_numpy(self._blank(size)).to(self.device)
        compiled = compile_network(eager, images, single_threaded=self.workers is not None)
        self.state = f"{self.state}, {compiled.state}"
        if compiled.forward is eager:
            return
        if not compiled.is_whole:  # data-dependent control flow: recording it would fail and harm torch's allocator
            for lane in self.all_lanes:
                lane.uses_graphs = False
        self.forward, self.fixed_size = compiled.forward, size


def _start_workers(cores: int | None) -> ThreadPoolExecutor:
    """Threads for the CPU. Each computes whole images: threads that share a layer would wait for one whose core decodes
    at the same time."""
    keep_freed_memory()
    return single_threaded_pool(cores or torch.get_num_threads())


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Number format of the network. "auto": bfloat16 if the hardware computes in it, else float16 on a GPU and float32
    on a CPU. A CPU computes in bfloat16 with AVX512-BF16 or AMX."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _configure_cudnn(dtype: torch.dtype) -> None:
    torch.backends.cudnn.benchmark = True  # batches have few sizes: choose the fastest kernels for each size once
    if dtype is torch.float32:
        torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 of the 23 bits of a float32's mantissa


def _fold(network: Network, spec: ModelSpec) -> Network:
    """Fold each batch normalisation into the convolution before it, if the network can be traced.

    A trace follows one path through the network's Python code. One random image is put through both networks, and the
    trace is used only if the outputs agree.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    size = spec.transform.crop
    image = torch.randn(1, spec.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            folded = fuse(network.body)
            expected, output = network.body(image), folded(image)
        except Exception as error:  # tracing runs the network's own code
            log.debug("batch normalisation of %s is not folded: %s", spec.model, error)
            return network
        if torch.allclose(expected, output, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            network.body = folded
    return network
