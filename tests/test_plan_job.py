"""The plan's job as a user starts it: what it prints, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from whole import TINY, jpeg, write_folder, write_tar

from jobs import plan
from pipeline import forecast, gpu, sample
from pipeline.machines import PRICES, Prices, cpus_here


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "PREDICT_SECONDS", 0.1)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number}.tar", {f"{i}.jpg": jpeg(i) for i in range(20)})
    return folder


def figures(capsys: pytest.CaptureFixture, *arguments: object) -> dict[str, Any]:
    """What a plan with these flags prints as JSON."""
    assert plan.main([*map(str, arguments), *TINY, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_says_hours_dollars_bottleneck_and_a_better_shape(tars: Path, capsys: pytest.CaptureFixture) -> None:
    assert plan.main(["--input", str(tars), *TINY, "--cluster", "2xg6.xlarge"]) == 0
    printed = capsys.readouterr().out
    assert "60 images in 3 shards" in printed
    assert "2xg6.xlarge: 8 vCPUs taken as 4 cores, 2 GPUs" in printed
    for word in (
        "time ",
        "cost ",
        "on demand",
        "spot",
        "held up by",
        "better ",
        "scaled: RTX 4090 by memory",
    ):
        assert word in printed, word
    assert len(printed.splitlines()) <= 25
    assert list(tars.parent.iterdir()) == [tars], "nothing is written"


def test_json_holds_every_figure_and_they_agree(tars: Path, capsys: pytest.CaptureFixture) -> None:
    found = figures(capsys, "--input", tars, "--cluster", "4xg6.2xlarge+2xc7i.4xlarge")
    estimate = found["estimate"]
    assert (estimate["vcpus"], estimate["cores"], estimate["gpus"], estimate["images"]) == (64, 32, 4, 60)
    assert estimate["images_per_second"] == min(estimate["limits_images_per_second"].values())
    assert estimate["limits_images_per_second"][estimate["bottleneck"]] == estimate["images_per_second"]
    seconds = estimate["startup_seconds"] + 60 / estimate["images_per_second"]
    assert estimate["hours"] == pytest.approx(seconds / 3600)
    assert estimate["usd"] == pytest.approx((4 * 0.9776 + 2 * 0.714) * seconds / 3600)
    assert found["parallelism"]["read_tasks"] == 3, "no more than shards"
    assert found["sample"]["costs"]["flops"] > 0
    assert found["assumed"] == ["cores there are as fast as here, and the store answers as it does here"]


def test_the_machine_at_hand_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_folder(tmp_path / "photos", 10)
    found = figures(capsys, "--input", folder)
    assert found["estimate"]["cluster"] == "local"
    assert found["estimate"]["usd"] is None
    assert found["better"]["cluster"].startswith("1x")
    assert found["assumed"] == []
    costs, parallelism = found["sample"]["costs"], found["parallelism"]
    actors = found["estimate"]["limits_images_per_second"]["actors"]
    cores = parallelism["actors"] * parallelism["actor_threads"] * found["estimate"]["cores"] / cpus_here()
    assert actors == pytest.approx(cores / (costs["predict_seconds"] * costs["predict_cores"]))


def test_prices_of_ones_own_count(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(PRICES.read_text().replace("usd_per_hour: 0.8048", "usd_per_hour: 80.48"))
    dollars = []
    for more in ([], ["--prices", mine]):
        estimate = figures(capsys, "--input", tars, "--cluster", "g6.xlarge", *more)["estimate"]
        dollars.append(estimate["usd"] / estimate["hours"])
    assert dollars == [pytest.approx(0.8048), pytest.approx(80.48)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cluster", "8xg6.2xlrge"), "g6.2xlarge"),
        (("--cluster", "0xg6.xlarge"), "write how many of which machine"),
        (("--prices", "none.yaml"), "none.yaml cannot be read"),
        (("--input", "none"), "none does not exist"),
        (("--actors", "2"), "--actors is 2: a plan compares clusters"),
        (("--gpus-per-actor", "0.5"), "--gpus-per-actor is 0.5: a plan compares clusters"),
        (("--decoder", "gpu", "--cluster", "c7i.2xlarge"), "the network has none"),
    ],
)
def test_bad_settings_end_with_a_sentence_before_anything_is_measured(
    tars: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "measure", lambda *_: pytest.fail("it was measured"))
    inputs = () if "--input" in arguments else ("--input", str(tars))
    assert plan.main([*inputs, *TINY, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("nightshift: ")
    assert said in printed.err
    assert printed.out == ""


def test_gpus_that_are_not_here_cannot_be_tried_at_decoding(tars: Path, capsys: pytest.CaptureFixture) -> None:
    found = figures(capsys, "--input", tars, "--decoder", "gpu", "--cluster", "g6.xlarge")
    assert found["assumed"][1].startswith("the CPUs decode, as with --decoder fast")
    assert found["sample"]["costs"]["pixel_bytes"] == 32 * 32 * 3


def test_a_gpu_that_is_here_decodes_in_the_sample(
    tars: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is an invented one: the network and torchvision's decoder run on the CPU for it."""
    monkeypatch.setattr(gpu, "gpus_here", lambda: (1, "NVIDIA L4"))
    found = figures(capsys, "--input", tars, "--decoder", "gpu")
    assert list(found["sample"]["costs"]["gpu_seconds"]) == ["L4"]
    assert found["sample"]["costs"]["pixel_bytes"] == found["sample"]["costs"]["encoded_bytes"]
    assert found["assumed"] == []
    assert found["better"] is None or found["better"]["cluster"].startswith("1xg6.")


def test_for_a_cluster_of_cpus_the_network_is_measured_on_the_cpu(
    tars: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpus_here", lambda: (1, "NVIDIA L4"))
    found = figures(capsys, "--input", tars, "--cluster", "2xc7i.2xlarge")
    assert found["sample"]["costs"]["gpu_seconds"] == {}
    assert found["sample"]["network"].startswith("cpu")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        *((name, name) for name in ("NVIDIA L40", "NVIDIA T400 4GB", "NVIDIA A100X", "NVIDIA H200")),
        *((f"NVIDIA GeForce RTX 3090{more}",) * 2 for more in (" Ti", " SUPER", " D", " Laptop GPU", "M")),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb",) * 2,
    ],
)
def test_a_gpu_is_one_of_the_prices_only_where_it_is_that_one(name: str, known: str) -> None:
    assert forecast.known_gpu(name, Prices.load().gpus) == known


@pytest.mark.parametrize(
    ("hours", "said"),
    [(20 / 3600, "20 s"), (0.5, "30 minutes"), (3, "3.0 hours"), (100, "4.2 days")],
)
def test_durations_are_in_the_unit_that_people_would_use(hours: float, said: str) -> None:
    assert forecast.duration(hours) == said
