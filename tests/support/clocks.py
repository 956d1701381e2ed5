"""CPU time for tests, on machines whose counters may be coarse or may not count at all."""

import time
from collections.abc import Callable

import pytest

MAX_WALL_SECONDS = 60.0


def burn(seconds: float, clock: Callable[[], float] = time.process_time) -> None:
    """Use this much CPU time by a clock. Skips the test if the clock hardly moves, as in some sandboxes."""
    until, deadline = clock() + seconds, time.monotonic() + MAX_WALL_SECONDS
    while clock() < until:
        if time.monotonic() > deadline:
            pytest.skip(f"{clock.__name__} counted less than {seconds:g} s in {MAX_WALL_SECONDS:g} s")
