"""The network at work: on its device, in its number format, folded and compiled where that pays."""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional

from pipeline.config import Transform
from pipeline.models import ModelSpec, Network, build
from pipeline.weights import cache_folder

log = logging.getLogger(__name__)

COMPILE_PAYS_SECONDS = 100.0
"""With so much work left, uncompiled, compiling pays: it takes 10–35 s and saves a seventh of the time at least."""

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as Pillow's convert("L")."""


class Runner:
    """A network on this process's GPU, or on the CPU with so many threads.

    compile: on (at once), off, or auto: once it is known how fast the network runs without, if the `images` that are to
    come make it worth while. A compiled network takes batches of `batch_size`, to which short ones are padded.
    """

    def __init__(
        self, spec: ModelSpec, precision: str, compile: str, batch_size: int, threads: int | None, images: int | None
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = _dtype(precision, self.device)
        if dtype is torch.float32:
            torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 bits of a float32's 23
        self.transform, self.batch_size = spec.transform, batch_size
        self.images = images if compile == "auto" else None
        self.fixed_size: int | None = None
        self.state = f"{self.device}, {str(dtype).removeprefix('torch.')}"
        network = _FromPixels(_folded(build(spec), spec), spec, dtype)
        self.forward: Callable[[Tensor], tuple[Tensor, Tensor | None]] = network.to(self.device)
        self.staging = torch.empty(0, dtype=torch.uint8)
        self.batches = 0
        if compile == "on":
            self._compile()

    def __call__(self, pixels: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """uint8 [N, crop, crop, 3] or tiles of less, N ≥ 1 → float32 [N, embedding_dim], [N, num_classes] or None, on
        the device."""
        if self.images is None:
            return self._run(pixels)
        started = time.perf_counter()
        found = self._run(pixels)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._consider(len(pixels), time.perf_counter() - started)
        return found

    def _consider(self, images: int, seconds: float) -> None:
        """Compile if that pays: decided once, after the first whole batch that did not have to warm up."""
        assert self.images is not None
        self.images -= images
        self.batches += 1
        if self.batches > 1 and images == self.batch_size:
            left_seconds, self.images = self.images * seconds / images, None
            if left_seconds > COMPILE_PAYS_SECONDS:
                self._compile()

    def _run(self, pixels: np.ndarray) -> tuple[Tensor, Tensor | None]:
        size = self.fixed_size or len(pixels)
        batches = [self._batch(pixels[start : start + size], size) for start in range(0, len(pixels), size)]
        logits = [found for _, found in batches if found is not None]
        return torch.cat([features for features, _ in batches]), torch.cat(logits) if logits else None

    def shrink(self, size: int) -> None:
        """Give back what the batch that did not fit has taken; a compiled network is compiled again for this size."""
        self.batch_size = min(self.batch_size, size)
        self.fixed_size = self.fixed_size and self.batch_size
        self.staging = torch.empty(0, dtype=torch.uint8)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _batch(self, pixels: np.ndarray, size: int) -> tuple[Tensor, Tensor | None]:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.current_stream().synchronize()  # the last copy out of the staging memory is over
        if self.staging.shape[1:] != pixels.shape[1:] or len(self.staging) < size:
            self.staging = torch.zeros((size, *pixels.shape[1:]), dtype=torch.uint8, pin_memory=on_gpu)
        np.copyto(self.staging[: len(pixels)].numpy(), pixels)
        with torch.no_grad():
            on_device = self.staging[:size].to(self.device, non_blocking=True)
            if on_device.shape[1] != self.transform.crop:
                on_device = _enlarged(on_device, self.transform)
            features, logits = self.forward(on_device)
        return features[: len(pixels)], None if logits is None else logits[: len(pixels)]

    def _compile(self) -> None:
        eager, size = self.forward, self.batch_size
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("compiled")))
        options: dict[str, Any] | None = {"freezing": True} if self.device.type == "cpu" else None
        try:
            self.forward = torch.compile(eager, dynamic=False, options=options)
            self._batch(np.zeros((size, self.transform.crop, self.transform.crop, 3), np.uint8), size)
            self.fixed_size, self.state = size, f"{self.state}, compiled"
        except Exception as error:  # no C++ compiler, or a network that the compiler cannot take
            reason = " ".join(str(error).splitlines()[:2])
            log.warning("torch.compile failed, so the network runs uncompiled: %s", reason)
            self.forward, self.state = eager, f"{self.state}, not compiled: {reason}"


def _enlarged(tiles: Tensor, transform: Transform) -> Tensor:
    """uint8 [N, side, side, 3] → [N, crop, crop, 3], as `decode` would: enlarging needs no antialiasing."""
    x = tiles.permute(0, 3, 1, 2).float()
    x = functional.interpolate(x, size=(transform.resize, transform.resize), mode="bilinear", align_corners=False)
    start = round((transform.resize - transform.crop) / 2)
    stop = start + transform.crop
    return x[..., start:stop, start:stop].round_().to(torch.uint8).permute(0, 2, 3, 1)


class _FromPixels(nn.Module):
    """uint8 [N, H, W, 3] on the device → float32 embedding and logits. The scale in float32, the network in `dtype`."""

    mean: Tensor
    std: Tensor
    luma: Tensor

    def __init__(self, network: Network, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype, self.one_channel = dtype, spec.in_channels == 1
        for name, values in {"mean": spec.transform.mean, "std": spec.transform.std, "luma": LUMA}.items():
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        x = pixels.permute(0, 3, 1, 2).float()
        if self.one_channel:
            x = (x * self.luma).sum(1, keepdim=True)
        x = x.div_(255).sub_(self.mean).div_(self.std)
        features, logits = self.network(x.to(self.dtype))
        return features.float(), None if logits is None else logits.float()


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 on a CPU pays only where it computes in it: AVX512-BF16 or AMX."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
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
