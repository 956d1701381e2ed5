"""Calls of a function as Ray tasks, for work outside of a run."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray

from pipeline.engine import cluster

AHEAD = 2
"""Tasks per CPU of the cluster that are submitted at a time."""


def run_all(work: Callable[[int], int], numbers: Iterable[int]) -> Iterator[int]:
    """Call a function with each number on the cluster of RAY_ADDRESS; yield the results in the order of their ends.

    The function is sent with each task, so it must be small.
    """
    cluster.connect()
    remote = ray.remote(work)
    limit = max(1, int(AHEAD * ray.cluster_resources().get("CPU", 1)))
    waiting: list[Any] = []
    for number in numbers:
        if len(waiting) >= limit:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
        waiting.append(remote.remote(number))
    while waiting:
        done, waiting = ray.wait(waiting)
        yield from ray.get(done)
