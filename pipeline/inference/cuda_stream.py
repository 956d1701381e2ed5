"""Lanes: batches in flight on one device, each with pinned memory, a CUDA stream and a CUDA graph.

While one lane computes, another copies its pixels to the GPU and its results back. On a CPU nothing is copied.
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

# torch warns of Arrow's read-only memory. Nothing here writes to it.
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)

GRAPH_WARM_UPS = 2
"""Calls of a network before its CUDA graph is recorded: in the first calls libraries allocate and choose algorithms."""

Outputs = tuple[Tensor, Tensor | None]
"""Embedding [N, embedding_dim], and logits [N, num_classes] or None."""
Forward = Callable[[Tensor], Outputs]


def synchronize(device: torch.device) -> None:
    """Wait for this thread's current stream. The thread sleeps meanwhile, so that its core can decode images."""
    if device.type == "cuda":
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(device))
        done.synchronize()


def to_host(tensor: Tensor) -> np.ndarray:
    """Copy a tensor to this process's memory. The array shares its memory with a tensor on the CPU."""
    if tensor.device.type == "cpu":
        return tensor.numpy()
    host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    synchronize(tensor.device)
    return host.numpy()


class Lane:
    """One batch at a time on a device. Not thread-safe. Results are valid until the lane is entered again.

    Call `upload` and `run` inside `entered()`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.copied = torch.cuda.Event(blocking=True) if self.stream else None  # type: ignore[no-untyped-call]
        self.staging = torch.empty(0, dtype=torch.uint8)
        self.graph: _Graph | None = None
        self.uses_graphs, self.lacked_memory = self.stream is not None, False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make the lane's stream current for this thread; it first waits for the stream that was current before."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield

    def upload(self, pixels: np.ndarray | Tensor, rows: int) -> Tensor:
        """Copy [N, H, W, bands] to the device and pad it to [rows, H, W, bands]; the padding rows are ignored.

        A tensor must be on the device. Tensors, and arrays on a CPU, are copied only if they have to be padded.
        """
        if isinstance(pixels, np.ndarray) and self.stream is None:
            pixels = torch.from_numpy(pixels)
        if isinstance(pixels, Tensor):
            if self.stream:
                pixels.record_stream(self.stream)
            missing = rows - len(pixels)
            return torch.cat([pixels, pixels.new_zeros((missing, *pixels.shape[1:]))]) if missing else pixels
        assert self.copied  # arrays on a CPU have returned above
        self.copied.synchronize()  # the previous copy still reads the staging memory
        staging = self.staging  # another thread may call free() meanwhile
        dtype = torch.from_numpy(np.empty(0, pixels.dtype)).dtype
        if staging.shape[1:] != pixels.shape[1:] or len(staging) < rows or staging.dtype != dtype:
            shape = (rows, *pixels.shape[1:])
            staging = self.staging = torch.zeros(shape, dtype=dtype, pin_memory=True)
        np.copyto(staging[: len(pixels)].numpy(), pixels)
        on_device = staging[:rows].to(self.device, non_blocking=True)
        self.copied.record(self.stream)
        return on_device

    def run(self, forward: Forward, pixels: Tensor, repeats: bool) -> Outputs:
        """Run a network, as a CUDA graph if possible.

        repeats: more batches of this size will run through this network, so it is worth recording a graph.
        """
        if not (repeats and self.uses_graphs):
            return forward(pixels)
        if self.graph is None or not self.graph.is_for(forward, pixels):
            self.graph = self._record(forward, pixels)
        return (self.graph or forward)(pixels)  # not in the handler, whose error keeps the recording's memory

    def _record(self, forward: Forward, pixels: Tensor) -> "_Graph | None":
        try:
            return _Graph(forward, pixels)
        except RuntimeError as error:  # data-dependent control flow, or not enough GPU memory
            log.warning("recording a CUDA graph failed, so the network runs without: %s", message_line(error))
            self.uses_graphs, self.lacked_memory = False, is_out_of_memory(error)
            return None

    def free(self) -> None:
        """Release the lane's memory; a batch in progress keeps its own until it ends.

        If a graph did not fit the memory, it is recorded again after this.
        """
        self.staging, self.graph = torch.empty(0, dtype=torch.uint8), None
        self.uses_graphs, self.lacked_memory = self.uses_graphs or self.lacked_memory, False


class _Graph:
    """A network's kernels for one batch shape, launched together instead of one by one from Python."""

    def __init__(self, forward: Forward, pixels: Tensor) -> None:
        self.forward, self.pixels = forward, pixels.clone()
        for _ in range(GRAPH_WARM_UPS):
            forward(self.pixels)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: other lanes may copy while this thread records.
        with torch.cuda.graph(
            self.graph, stream=torch.cuda.current_stream(pixels.device), capture_error_mode="thread_local"
        ):
            self.outputs = forward(self.pixels)

    def is_for(self, forward: Forward, pixels: Tensor) -> bool:
        return self.forward is forward and self.pixels.shape == pixels.shape

    def __call__(self, pixels: Tensor) -> Outputs:
        self.pixels.copy_(pixels)
        self.graph.replay()
        features, logits = self.outputs
        return features.clone(), None if logits is None else logits.clone()
