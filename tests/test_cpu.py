"""A network's process keeps the memory that a batch frees for the next one."""

import sys

import pytest
from small_run import run_python

LAYERS_MIB = 6 * 24

FREED = """
import sys
import psutil
import torch
from pipeline.cpu import keep_freed_memory, lone_threads

def rss():
    return psutil.Process().memory_info().rss >> 20

def freed():
    layers = [torch.ones(24 << 20, dtype=torch.uint8) for _ in range(6)]
    before = rss()
    del layers
    return before - rss()

if sys.argv[1] == "keep":
    keep_freed_memory()
print(lone_threads(1).submit(freed).result())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what is set")
def test_what_a_batch_frees_stays_for_the_next_one() -> None:
    """In MiB, what the kernel has back."""
    usual, kept = (int(run_python("-c", FREED, how)) for how in ("usual", "keep"))
    assert usual > LAYERS_MIB * 0.9, "it stays without being told to: nothing is left to do"
    assert kept < LAYERS_MIB * 0.1
