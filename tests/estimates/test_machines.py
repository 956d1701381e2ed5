"""Machines, prices and shapes of clusters, from the price file that users edit."""

from pathlib import Path

import pytest

from pipeline.errors import SettingRefused
from pipeline.estimates import machines
from pipeline.estimates.machines import LOCAL, Machine, Prices

ONE = "machines: {a: {vcpus: 4}}\n"


@pytest.fixture(scope="module")
def prices() -> Prices:
    return Prices.load()


def test_the_price_file_of_the_package_is_complete(prices: Prices) -> None:
    for machine in prices.machines.values():
        assert machine.usd_per_hour, machine.name
        assert machine.spot_usd_per_hour == pytest.approx(0.4 * machine.usd_per_hour)
        assert machine.network_gbit, machine.name
        assert not machine.gpus or machine.gpu in prices.gpus, machine.name
    assert all(rate.source.startswith(("published: ", "scaled: ")) for rate in prices.gpus.values())


def test_scaled_rates_follow_from_the_bandwidths_in_their_source(prices: Prices) -> None:
    scaled = [rate for rate in prices.gpus.values() if rate.source.startswith("scaled: ")]
    assert scaled
    for rate in scaled:
        reference, _, figures = rate.source.removeprefix("scaled: ").partition(" by memory, ")
        bandwidth, reference_bandwidth = map(float, figures.removesuffix(" GB/s").split(" / "))
        for model, images_per_second in rate.images_per_second.items():
            expected = prices.gpus[reference].images_per_second[model] * bandwidth / reference_bandwidth
            assert images_per_second == pytest.approx(expected, rel=0.01)


def test_a_shape_is_a_sum_of_machines(prices: Prices) -> None:
    cluster = prices.cluster("4xg6.2xlarge + 2xc7i.4xlarge")
    assert str(cluster) == "4xg6.2xlarge+2xc7i.4xlarge"
    assert (cluster.machines, cluster.vcpus, cluster.cores, cluster.gpus) == (6, 64, 32, 4)
    assert cluster.usd_per_hour == pytest.approx(4 * 0.9776 + 2 * 0.714)
    assert str(prices.cluster("g6.xlarge")) == "1xg6.xlarge"


def test_the_local_machine_has_no_price(prices: Prices) -> None:
    cluster = prices.cluster(LOCAL)
    assert cluster.is_local
    assert cluster.vcpus == Machine.local().vcpus >= 1
    assert cluster.usd_per_hour is None
    assert prices.cluster("local+1xg6.xlarge").usd_per_hour is None
    assert prices.cluster(LOCAL, Machine(LOCAL, 64, gpus=2, gpu="T4")).gpus == 2


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "broken"}, None),
    ],
)
def test_the_cpus_of_a_container_are_limited_by_its_quota(
    files: dict[str, str], cpus: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machines._cpu_quota(tmp_path) == cpus
    monkeypatch.setattr(machines, "CGROUP", tmp_path)
    monkeypatch.setattr(machines.os, "sched_getaffinity", lambda _: set(range(64)))
    assert machines.cpus_here() == int(cpus or 64)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("8xg6.2xlrge", r"has no machine 'g6\.2xlrge'\. Similar: .*g6\.2xlarge"),
        ("0xg6.xlarge", "it must be counts and names of machines"),
        ("8x", "it must be counts and names of machines"),
        ("", "it must be counts and names of machines"),
        ("2xg6.xlarge+", "it must be counts and names of machines"),
    ],
)
def test_a_bad_shape_is_refused(prices: Prices, shape: str, message: str) -> None:
    with pytest.raises(SettingRefused, match=message):
        prices.cluster(shape)


def test_a_price_file_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(
        "machines:\n  desk: {vcpus: 12, vcpus_per_core: 1, usd_per_hour: 0.1, spot_usd_per_hour: 0.02}\n"
        "  shed: {vcpus: 4}\n"
    )
    cluster = Prices.load(str(file)).cluster("3xdesk")
    assert (cluster.cores, cluster.usd_per_hour, cluster.spot_usd_per_hour) == (36, pytest.approx(0.3), 0.06)
    assert Prices.load(str(file)).cluster("desk+shed").usd_per_hour is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("machines: {a: {vcpus: 0}}", "machine a: vcpus is 0; it must be at least 1"),
        ("machines: {a: {vcpus: four}}", "machine a"),
        ("machines: {a: {cpus: 4}}", r"machine a.*cpus"),
        ("machines: {a: {vcpus: 4, usd_per_hour: -1}}", "usd_per_hour is -1"),
        ("machines: {a: {vcpus: 4, gpus: 1}}", "gpus without gpu; add the name"),
        (f"{ONE}gpus: {{T9: {{images_per_second: {{resnet50: 0}}, source: x}}}}", "GPU T9: images_per_second is"),
        (f"{ONE}gpus: {{T9: {{images_per_second: {{resnet18: 9}}, source: x}}}}", "GPU T9.*lacks resnet50"),
        (f"{ONE}gpus: {{T9: {{images_per_second: 9, source: x}}}}", "GPU T9"),
        ("machines: {a: {vcpus: 4, network_gbit: 0}}", "machine a: network_gbit is 0"),
        (f"{ONE}gpus: [L4]", "`gpus:` must have GPUs by name"),
        ("- 1", "no `machines:`"),
        ("a: [", "cannot be read"),
        ("machines: {a: {cores: 1, cores: 2}}", "line 1: the key cores is given twice"),
    ],
)
def test_a_bad_price_file_is_refused_with_the_fault(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    with pytest.raises(SettingRefused, match=message):
        Prices.load(str(file))
    with pytest.raises(SettingRefused, match=r"none\.yaml cannot be read"):
        Prices.load(str(tmp_path / "none.yaml"))
