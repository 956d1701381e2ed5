"""How the stages share a cluster: no layout asks for more than there is, or leaves a stage without anything."""

import pytest

from pipeline.config import RunConfig
from pipeline.engine import Layout
from pipeline.errors import SettingRefused


def layout(cpus: float, gpus: float, **settings: str) -> Layout:
    return Layout.of(RunConfig(input="a", output="b", **settings), cpus, gpus)


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 16, 64, 1000])
def test_all_stages_run_side_by_side_on_cpus(cpus: int) -> None:
    found = layout(cpus, 0)
    used = found.read_cpus + found.actors[1] * found.actor_cpus
    assert used <= cpus
    assert min(found.read_cpus, found.actor_cpus) > 0
    assert found.read_cpus != found.actor_cpus, "Ray would fuse the stages and run them in turn"
    assert found.actor_threads is not None
    assert found.actor_threads * found.actors[1] <= max(cpus, 1)


def test_gpus_are_all_taken_and_leave_the_cpus_to_decoding() -> None:
    found = layout(64, 8)
    assert (found.actors, found.actor_gpus, found.actor_cpus) == ((8, 8), 1.0, 0.0)
    assert layout(64, 8, gpus_per_actor="0.5").actors == (16, 16)
    assert layout(64, 8, actors="2:4").actors == (2, 4)
    assert layout(64, 8, gpus_per_actor="0").actor_gpus == 0


@pytest.mark.parametrize(
    ("cpus", "gpus", "settings", "said"),
    [
        (2, 0, {"gpus_per_actor": "1"}, "the cluster has 0 GPUs"),
        (8, 1, {"gpus_per_actor": "2"}, "the cluster has 1 GPUs"),
        (2, 0, {"actors": "200"}, "--actors 200 does not fit: the cluster has 2 CPUs"),
    ],
)
def test_what_does_not_fit_is_refused(cpus: int, gpus: int, settings: dict[str, str], said: str) -> None:
    with pytest.raises(SettingRefused, match=said):
        layout(cpus, gpus, **settings)
