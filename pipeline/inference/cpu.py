"""CPU settings for inference: single-threaded torch workers, and a malloc that keeps freed memory."""

import ctypes
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

MALLOC_SETTINGS = {"M_MMAP_THRESHOLD": (-3, 32 << 20), "M_TRIM_THRESHOLD": (-1, 1 << 30), "M_TOP_PAD": (-2, 128 << 20)}
"""Parameter of glibc's mallopt(3) → the number of the parameter, and its value in bytes.

A thread's heap has 64 MiB, and blocks of more than 32 MiB waste much of it. A padding of two heaps keeps glibc from
returning whole heaps to the kernel.
"""


def keep_freed_memory() -> None:
    """Let malloc keep up to 1 GiB of freed memory, so that each batch reuses the memory of the previous one.

    Otherwise malloc returns the memory to the kernel, which clears each page before it is used again. With ResNet-18
    these are 500 pages per image, and 1 of 18 core-ms. Does nothing without glibc.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    for number, value in MALLOC_SETTINGS.values():
        libc.mallopt(number, value)


def single_threaded_pool(count: int) -> ThreadPoolExecutor:
    """Return a pool of `count` running threads; torch uses one thread in each of them.

    torch keeps a separate number of threads for each thread. A new thread starts with the number that was set last.
    """
    previous, all_started = torch.get_num_threads(), threading.Barrier(count)

    def start(_: int) -> None:
        torch.get_num_threads()  # initialises the number; a later initialisation would undo the next line
        torch.set_num_threads(1)
        all_started.wait()

    threads = ThreadPoolExecutor(count, "network")
    list(threads.map(start, range(count)))
    torch.set_num_threads(previous)
    return threads
