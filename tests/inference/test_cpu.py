"""keep_freed_memory: freed memory stays in the process for the next batch."""

import sys

import pytest
from small_run import run_python

LAYERS_MIB = 6 * 24

FREED = """
import sys
import psutil
import torch
from pipeline.inference.cpu import keep_freed_memory, single_threaded_pool

def rss():
    return psutil.Process().memory_info().rss >> 20

def returned_mib():
    layers = [torch.ones(24 << 20, dtype=torch.uint8) for _ in range(6)]
    before = rss()
    del layers
    return before - rss()

if sys.argv[1] == "keep":
    keep_freed_memory()
print(single_threaded_pool(1).submit(returned_mib).result())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sets options of glibc's malloc")
def test_freed_memory_stays_in_the_process() -> None:
    default_mib, kept_mib = (int(run_python("-c", FREED, mode)) for mode in ("default", "keep"))
    assert default_mib > LAYERS_MIB * 0.9, "malloc keeps freed memory by default, so keep_freed_memory is not needed"
    assert kept_mib < LAYERS_MIB * 0.1
