"""The arithmetic of an estimate, computed again by hand."""

from dataclasses import replace

import pytest

from pipeline.errors import SettingRefused
from pipeline.estimates import costs
from pipeline.estimates.costs import RESNET50_FLOPS, STARTUP_SECONDS, Costs, Parallelism, Workload
from pipeline.estimates.machines import Machine, Prices

PRICES = Prices.load()
L4 = PRICES.gpus["L4"].images_per_second["resnet50"]
PHOTO = Costs(
    read=0.0002, decode=0.003, write=0.00005, predict=0.05, read_seconds=0.0002, load_seconds=0.0033,
    predict_seconds=0.025, predict_cores=2, encoded_bytes=110_000, pixel_bytes=150_528, result_bytes=2_100,
    flops=RESNET50_FLOPS,
)  # fmt: skip


def every_core(vcpus: int, gpus: int) -> Parallelism:
    return Parallelism(read_tasks=vcpus, threads=1, actors=max(1, gpus), actor_threads=vcpus)


def workload(costs: Costs = PHOTO, images: int = 1_000_000, model: str = "resnet50") -> Workload:
    return Workload(model, images, costs, PRICES, every_core)


def test_decoding_is_the_bottleneck_of_a_gpu_with_few_cores() -> None:
    estimate = workload().on(PRICES.cluster("8xg6.2xlarge"))
    assert estimate.bottleneck == costs.CPU
    core_seconds = 0.0002 + 0.003 + 0.00005 + PHOTO.ray
    assert estimate.images_per_second == pytest.approx(8 * 8 / 2 / core_seconds)
    assert estimate.limits[costs.GPU] == pytest.approx(8 * L4)
    seconds = STARTUP_SECONDS + 1_000_000 / estimate.images_per_second
    assert estimate.hours == pytest.approx(seconds / 3600)
    assert estimate.usd == pytest.approx(8 * 0.9776 * seconds / 3600)
    assert estimate.spot_usd == pytest.approx(0.4 * 8 * 0.9776 * seconds / 3600)
    assert estimate.usd_per_million == pytest.approx(8 * 0.9776 / 3600 / estimate.images_per_second * 1e6)
    assert estimate.busy[costs.CPU] == 1


def test_without_a_gpu_the_network_runs_on_the_cpus() -> None:
    estimate = workload().on(PRICES.cluster("2xc7i.4xlarge"))
    assert costs.GPU not in estimate.limits
    assert estimate.limits[costs.CPU] == pytest.approx(16 / (0.05325 + PHOTO.ray))
    assert estimate.limits[costs.ACTORS] == pytest.approx(16 / 0.05), "two cores took 0.025 s"
    assert estimate.bottleneck == costs.CPU


@pytest.mark.parametrize(("actors", "actor_threads"), [(8, 4), (4, 8), (2, 16)])
@pytest.mark.parametrize(("vcpus_per_core", "cores"), [(1, 32), (2, 16)])
def test_actors_are_as_fast_as_their_cores(actors: int, actor_threads: int, vcpus_per_core: int, cores: int) -> None:
    """The number of actors does not matter. If two vCPUs share a core, they are half as fast."""
    desk = Machine("local", 32, vcpus_per_core)
    cluster = PRICES.cluster("local", desk)
    shared = Workload("resnet50", 1000, PHOTO, PRICES, lambda vcpus, gpus: Parallelism(32, 1, actors, actor_threads))
    assert shared.on(cluster).limits[costs.ACTORS] == pytest.approx(cores / 0.05)


def test_a_large_network_keeps_the_gpus_busy() -> None:
    estimate = workload(replace(PHOTO, flops=10 * RESNET50_FLOPS), model="resnet500").on(PRICES.cluster("8xg6.2xlarge"))
    assert estimate.bottleneck == costs.GPU
    assert estimate.images_per_second == pytest.approx(8 * L4 / 10)
    assert "from ResNet-50 by floating-point operations" in estimate.gpu_source


def test_a_network_in_the_price_file_has_its_own_rate() -> None:
    rates = PRICES.gpus["L4"].images_per_second
    assert workload(model="resnet18").gpu_rate("L4") == rates["resnet18"] > rates["resnet50"]
    assert workload(model="resnet18").gpu_rate("T4") == PRICES.gpus["T4"].images_per_second["resnet50"]


def test_more_decode_threads_shorten_only_the_decoding() -> None:
    assert PHOTO.loading(1) == pytest.approx(0.0033)
    assert PHOTO.loading(4) == pytest.approx(0.0033 * (0.0002 + 0.003 / 4) / 0.0032)


def test_a_measured_gpu_needs_no_rate_in_the_price_file() -> None:
    desk = Machine("local", 16, 1, gpus=2, gpu="RTX 9000")
    estimate = workload(replace(PHOTO, gpu_seconds={"RTX 9000": 1 / 4000}, flops=None)).on(
        PRICES.cluster("local", desk)
    )
    assert estimate.limits[costs.GPU] == pytest.approx(8000)
    assert estimate.gpu_source == "RTX 9000, measured here"
    assert estimate.usd is None


def test_an_unknown_gpu_is_refused_with_the_known_ones() -> None:
    desk = Machine("local", 16, 1, gpus=1, gpu="RTX 9000")
    with pytest.raises(SettingRefused, match=r"GPU 'RTX 9000' is unknown: add it to `gpus:`.*L4"):
        workload().on(PRICES.cluster("local", desk))
    with pytest.raises(SettingRefused, match="cannot be counted"):
        workload(replace(PHOTO, flops=None), model="mine:net").on(PRICES.cluster("g6.xlarge"))


def test_few_shards_or_a_slow_store_limit_the_readers() -> None:
    few = Workload("resnet50", 1000, PHOTO, PRICES, lambda vcpus, gpus: Parallelism(2, 4, gpus))
    estimate = few.on(PRICES.cluster("8xg6.2xlarge"))
    assert estimate.bottleneck == costs.READERS
    slow = workload(replace(PHOTO, read_seconds=0.5)).on(PRICES.cluster("8xg6.2xlarge"))
    assert (slow.bottleneck, slow.images_per_second) == (costs.STORE, pytest.approx(64 / 0.5))


def test_network_cards_carry_images_and_pixels() -> None:
    """On one machine pixels are not sent. In a cluster they come from the machines that decode."""
    large = replace(PHOTO, encoded_bytes=4_000_000)
    alone = workload(large).on(PRICES.cluster("g6.2xlarge"))
    assert alone.limits[costs.NETWORK_CARDS] == pytest.approx(5e9 / 8 / 4_000_000)
    apart = workload().on(PRICES.cluster("g6.2xlarge+4xc7i.16xlarge"))
    share = 4 / (4 + 4 * 32)
    assert apart.limits[costs.NETWORK_CARDS] == pytest.approx(5e9 / 8 / (share * 110_000 + (1 - share) * 150_528))


def test_a_better_cluster_is_cheaper_and_no_slower() -> None:
    """With four cores an L4 waits for photos: more cores per GPU make the job cheaper."""
    given = workload().on(PRICES.cluster("8xg6.xlarge"))
    better = workload().better(given)
    assert better is not None
    assert given.usd is not None
    assert better.usd is not None
    assert better.hours <= given.hours * 1.001
    assert better.usd < 0.95 * given.usd
    again = workload().better(better)
    assert again is None or (again.usd or 0) < better.usd


def test_a_network_that_was_measured_on_a_gpu_is_not_estimated_on_cpus() -> None:
    """Its cost on a CPU is unknown."""
    desk = Machine("local", 8, 1, gpus=1, gpu="L4")
    measured = workload(replace(PHOTO, predict=1e-6, predict_seconds=1e-6, gpu_seconds={"L4": 1e-3}))
    better = measured.better(measured.on(PRICES.cluster("local", desk)))
    assert better is not None
    assert better.cluster.gpus
    unknown = replace(measured, prices=replace(PRICES, gpus={}))
    better = unknown.better(unknown.on(PRICES.cluster("local", desk)))
    assert better is not None
    assert {machine.gpu for _, machine in better.cluster.groups} == {"L4"}


def test_the_best_cluster_has_no_better_one() -> None:
    estimate = workload().on(PRICES.cluster("8xg6.xlarge"))
    for _ in range(20):
        better = workload().better(estimate)
        if better is None:
            return
        estimate = better
    pytest.fail("there was always a better cluster")


def test_for_the_local_machine_the_cheapest_machine_that_is_no_slower() -> None:
    given = workload().on(PRICES.cluster("local", Machine("local", 2, 1)))
    better = workload().better(given)
    assert better is not None
    assert better.cluster.machines == 1
    assert better.hours <= given.hours
    others = [workload().on(PRICES.cluster(name)) for name in PRICES.machines]
    assert better.usd == min(each.usd for each in others if each.hours <= given.hours and each.usd)
