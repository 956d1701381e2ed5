"""A CPU as a network wants it: threads that work alone, and memory that stays."""

import ctypes
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

MALLOC_SETTINGS = {"M_MMAP_THRESHOLD": (-3, 32 << 20), "M_TRIM_THRESHOLD": (-1, 1 << 30), "M_TOP_PAD": (-2, 128 << 20)}
"""Of glibc's mallopt(3), by their numbers. 32 MiB is the most that a thread's own heap of 64 MiB takes well; a padding
of twice a heap keeps its heaps from being given back whole."""


def keep_freed_memory() -> None:
    """Let this process reuse what one batch's layers free for the next one's, instead of giving it back to the kernel,
    which clears each page anew: 500 pages and 1 of 18 core-ms for an image of ResNet-18. Up to 1 GiB may stay so.

    Does nothing without glibc.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    for number, value in MALLOC_SETTINGS.values():
        libc.mallopt(number, value)


def lone_threads(count: int) -> ThreadPoolExecutor:
    """Threads in which torch starts no others. It goes by a number of each thread, at first the last that was set."""
    usual, all_started = torch.get_num_threads(), threading.Barrier(count)

    def start(_: int) -> None:
        torch.get_num_threads()  # takes over that first number: later, that would undo the next line
        torch.set_num_threads(1)
        all_started.wait()

    threads = ThreadPoolExecutor(count, "network")
    list(threads.map(start, range(count)))
    torch.set_num_threads(usual)
    return threads
