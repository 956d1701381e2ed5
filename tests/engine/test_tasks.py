"""Functions as Ray tasks."""

import os

import pytest
from servers import RayCluster

from pipeline.engine.tasks import run_all

pytestmark = pytest.mark.slow


def square(number: int) -> int:
    return number * number


def fails(number: int) -> int:
    raise ValueError(f"no {number}")


def test_each_number_is_computed_once(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ray_cluster.environment.items():
        monkeypatch.setenv(name, value)
    import ray

    try:
        assert sorted(run_all(square, range(50))) == [number * number for number in range(50)]
        with pytest.raises(ValueError, match="no 3"):
            list(run_all(fails, [3]))
        assert os.environ["RAY_ADDRESS"] == ray_cluster.address
    finally:
        ray.shutdown()
