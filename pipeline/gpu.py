"""A GPU: whether torch can use it, and how large the batches may be that it is given."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.errors import SettingRefused, is_out_of_memory, message_line

GPU_SIZES = 8
"""Sizes of batches at most that a GPU is given: for each of them cuDNN tries its kernels out anew, in each thread."""

MEMORY_SHARE = 0.8
"""Of the free memory of a GPU, what batches may fill: compiled networks and graphs keep more than the trial shows."""

DRIVER_FILE = "/dev/nvidiactl"
"""There where NVIDIA's driver is loaded, also one that is too old for torch."""


def gpus_here() -> tuple[int, str]:
    """How many GPUs this machine has, and the first one's name; (0, "") without any."""
    count = torch.cuda.device_count()
    return count, torch.cuda.get_device_name(0) if count else ""


def choose_device(gpu_share: float | None) -> torch.device:
    """What this process computes on. gpu_share: of a GPU, what it was given; None: the whole, where there is one.

    Raises SettingRefused for a GPU that it was given and that torch cannot use.
    """
    if gpu_share != 0 and torch.cuda.is_available():
        return torch.device("cuda")
    if gpu_share and os.path.exists(DRIVER_FILE):
        raise SettingRefused(
            f"--gpus-per-actor is {gpu_share:g}, and on {socket.gethostname()} torch {torch.__version__} for CUDA "
            f"{torch.version.cuda} can use no GPU: the driver is too old for it, libcuda is not found, or this torch "
            "is built without CUDA; mend that, or take --gpus-per-actor 0, which computes on the CPU"
        )
    return torch.device("cpu")


@contextmanager
def refused_by_gpu(device: torch.device) -> Iterator[None]:
    """What a try on another GPU would meet as well, or only somebody else can mend, is a SettingRefused."""
    try:
        yield
    except RuntimeError as error:
        if device.type != "cuda" or not (is_out_of_memory(error) or "no kernel image" in str(error)):
            raise
        free, total = torch.cuda.mem_get_info()
        name = f"{torch.cuda.get_device_name()}, {free >> 20} of {total >> 20} MiB free"
        raise SettingRefused(
            f"the GPU of {socket.gethostname()} ({name}) cannot run this network: {message_line(error)}; "
            "end what else has taken its memory, or take another GPU"
        ) from error


def images_that_fit(free_bytes: float, image_bytes: float, lanes: int) -> int:
    """Images a batch, at least one, where each of several lanes has one under way."""
    return max(1, int(free_bytes * MEMORY_SHARE / lanes / max(image_bytes, 1)))


def evenly(images: int, most: int) -> int:
    """The size of pieces, at most so large, into which a batch is cut without a small rest."""
    return -(-images // -(-images // most))


def rounded_up(images: int, batch_size: int) -> int:
    """The next one of GPU_SIZES sizes of batches, of which the largest is batch_size."""
    step = -(-batch_size // GPU_SIZES)
    return max(images, min(batch_size, -(-images // step) * step))
