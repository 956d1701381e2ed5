"""One batch's way over the device: pinned memory, a stream of its own, and the network's kernels as one CUDA graph.

While one lane computes, another brings its pixels in and takes its results out. On a CPU there is nothing to bring.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import is_out_of_memory, message_line

log = logging.getLogger(__name__)

# Pixels are often read-only memory of Arrow's, of which torch warns. Nothing here writes to them.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)

GRAPH_WARM_UPS = 2
"""Calls before a network is recorded: libraries choose their algorithms in the first ones, and allocate."""

Outputs = tuple[Tensor, Tensor | None]
Forward = Callable[[Tensor], Outputs]


def finish(device: torch.device) -> None:
    """Wait until the device has done what this thread has started on its stream. A thread that waited otherwise would
    spin, on a core that should decode."""
    if device.type == "cuda":
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(device))
        done.synchronize()


def to_host(tensor: Tensor) -> np.ndarray:
    """The same in this process's memory."""
    if tensor.device.type == "cpu":
        return tensor.numpy()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    finish(tensor.device)
    return host.numpy()


class Lane:
    """For one thread at a time, inside of `entered()`; what it returns is good until the lane is entered again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.copied = torch.cuda.Event(blocking=True) if self.stream else None  # type: ignore[no-untyped-call]
        self.staging = torch.empty(0, dtype=torch.uint8)
        self.graph: _Graph | None = None
        self.records, self.starved = self.stream is not None, False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread starts on the device goes to the lane's stream, behind what it has started before."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def upload(self, pixels: np.ndarray | Tensor, rows: int) -> Tensor:
        """uint8 [N, H, W, 3] → the same on the device, with N filled up to `rows`; what fills it up is of no account.

        A tensor is there already, and so is an array, without a copy, if the device is the CPU.
        """
        if isinstance(pixels, np.ndarray) and self.stream is None:
            pixels = torch.from_numpy(pixels)
        if isinstance(pixels, Tensor):
            if self.stream:
                pixels.record_stream(self.stream)
            missing = rows - len(pixels)
            return torch.cat([pixels, pixels.new_zeros((missing, *pixels.shape[1:]))]) if missing else pixels
        assert self.copied  # a CPU's arrays have left above
        self.copied.synchronize()  # the last copy out of the staging memory is over
        staging = self.staging  # which another thread may give back meanwhile
        if staging.shape[1:] != pixels.shape[1:] or len(staging) < rows:
            shape = (rows, *pixels.shape[1:])
            staging = self.staging = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        np.copyto(staging[: len(pixels)].numpy(), pixels)
        on_device = staging[:rows].to(self.device, non_blocking=True)
        self.copied.record(self.stream)
        return on_device

    def run(self, forward: Forward, pixels: Tensor, record: bool) -> Outputs:
        """record: batches of this size and with this network will come again, so it is worth recording a graph."""
        if not (record and self.records):
            return forward(pixels)
        if self.graph is None or not self.graph.is_of(forward, pixels):
            self.graph = self._recorded(forward, pixels)
        return (self.graph or forward)(pixels)  # outside of the handler: the error holds on to the recording's memory

    def _recorded(self, forward: Forward, pixels: Tensor) -> "_Graph | None":
        try:
            return _Graph(forward, pixels)
        except RuntimeError as error:  # a network that looks at its own numbers, or a GPU without the memory
            log.warning("no CUDA graph of the network, so it runs without: %s", message_line(error))
            self.records, self.starved = False, is_out_of_memory(error)
            return None

    def free(self) -> None:
        """Give back the memory; what runs meanwhile keeps its own until it ends."""
        self.staging, self.graph = torch.empty(0, dtype=torch.uint8), None
        self.records, self.starved = self.records or self.starved, False


class _Graph:
    """A network's kernels for one size of batch, launched together instead of one by one from Python."""

    def __init__(self, forward: Forward, pixels: Tensor) -> None:
        self.forward, self.pixels = forward, pixels.clone()
        for _ in range(GRAPH_WARM_UPS):
            forward(self.pixels)
        self.graph = torch.cuda.CUDAGraph()
        # Other lanes go on with copies meanwhile, which is no business of this recording.
        with torch.cuda.graph(
            self.graph, stream=torch.cuda.current_stream(pixels.device), capture_error_mode="thread_local"
        ):
            self.outputs = forward(self.pixels)

    def is_of(self, forward: Forward, pixels: Tensor) -> bool:
        return self.forward is forward and self.pixels.shape == pixels.shape

    def __call__(self, pixels: Tensor) -> Outputs:
        self.pixels.copy_(pixels)
        self.graph.replay()
        features, logits = self.outputs
        return features.clone(), None if logits is None else logits.clone()
