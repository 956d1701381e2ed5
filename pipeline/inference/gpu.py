"""GPU settings for inference: which device to use, and batch sizes that fit its memory."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.errors import SettingRefused, is_out_of_memory, message_line

MAX_DISTINCT_SIZES = 8
"""Largest number of different batch sizes on a GPU: cuDNN tries its kernels for each size, in each thread."""

MEMORY_SHARE = 0.8
"""Share of a GPU's free memory for batches. Compiled networks and CUDA graphs need more than the trial batch."""

DRIVER_FILE = "/dev/nvidiactl"
"""Exists if NVIDIA's driver is loaded, even if the driver is too old for torch."""


def gpus_here() -> tuple[int, str]:
    """Number of GPUs of this machine, and the name of the first one; (0, "") without a GPU."""
    count = torch.cuda.device_count()
    return count, torch.cuda.get_device_name(0) if count else ""


def choose_device(gpu_share: float | None) -> torch.device:
    """Choose the device of this process.

    gpu_share: GPUs of this process; may be a fraction, and 0 for the CPU. None: a GPU if torch can use one.
    Raises SettingRefused if gpu_share asks for a GPU, the driver is loaded and torch cannot use it.
    """
    if gpu_share != 0 and torch.cuda.is_available():
        return torch.device("cuda")
    if gpu_share and os.path.exists(DRIVER_FILE):
        raise SettingRefused(
            f"--gpus-per-actor is {gpu_share:g}, but torch {torch.__version__} for CUDA {torch.version.cuda} cannot "
            f"use the GPU of {socket.gethostname()}: the driver is too old, libcuda is missing, or this torch is built "
            "without CUDA; correct that, or use --gpus-per-actor 0 to compute on the CPU"
        )
    return torch.device("cpu")


@contextmanager
def refused_by_gpu(device: torch.device) -> Iterator[None]:
    """Turn out-of-memory and missing-kernel errors of a GPU into SettingRefused."""
    try:
        yield
    except RuntimeError as error:
        if device.type != "cuda" or not (is_out_of_memory(error) or "no kernel image" in str(error)):
            raise
        free, total = torch.cuda.mem_get_info()
        name = f"{torch.cuda.get_device_name()}, {free >> 20} of {total >> 20} MiB free"
        raise SettingRefused(
            f"the GPU of {socket.gethostname()} ({name}) cannot run this network: {message_line(error)}; "
            "end other processes that use its memory, or use another GPU"
        ) from error


def images_that_fit(free_bytes: float, image_bytes: float, lanes: int) -> int:
    """Images per batch, at least 1, if each of `lanes` lanes computes a batch at the same time."""
    return max(1, int(free_bytes * MEMORY_SHARE / lanes / max(image_bytes, 1)))


def even_batch_size(images: int, max_size: int) -> int:
    """Batch size, at most max_size, that splits a batch of `images` into pieces of nearly equal size."""
    return -(-images // -(-images // max_size))


def padded_batch_size(images: int, batch_size: int) -> int:
    """Round `images` up to one of MAX_DISTINCT_SIZES sizes, the largest of which is batch_size."""
    step = -(-batch_size // MAX_DISTINCT_SIZES)
    return max(images, min(batch_size, -(-images // step) * step))
