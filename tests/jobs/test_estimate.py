"""jobs/estimate.py as a user starts it: its output, and the settings that it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from whole import TINY, jpeg, write_folder, write_tar

from jobs import estimate
from pipeline.estimates import forecast as forecasts
from pipeline.estimates import sample
from pipeline.estimates.machines import PRICES, Prices, cpus_here
from pipeline.inference import gpu


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
    """The JSON output of an estimate with these flags."""
    assert estimate.main([*map(str, arguments), *TINY, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_prints_hours_dollars_bottleneck_and_a_better_cluster(tars: Path, capsys: pytest.CaptureFixture) -> None:
    (tars / "notes.npy").write_bytes(b"")
    assert estimate.main(["--input", str(tars), *TINY, "--cluster", "2xg6.xlarge"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"left out +1 \.npy \(not read\)", printed)
    assert "60 images in 3 shards" in printed
    assert "2xg6.xlarge: 8 vCPUs, counted as 4 cores, 2 GPUs" in printed
    for word in (
        "time ",
        "cost ",
        "on demand",
        "spot",
        "bottleneck",
        "better ",
        "scaled: RTX 4090 by memory",
    ):
        assert word in printed, word
    assert len(printed.splitlines()) <= 25
    assert list(tars.parent.iterdir()) == [tars], "nothing is written"


def test_json_has_all_figures_and_they_agree(tars: Path, capsys: pytest.CaptureFixture) -> None:
    (tars / "notes.npy").write_bytes(b"")
    result = figures(capsys, "--input", tars, "--cluster", "4xg6.2xlarge+2xc7i.4xlarge")
    assert result["left_out"] == {".npy": 1}
    estimate = result["estimate"]
    assert (estimate["vcpus"], estimate["cores"], estimate["gpus"], estimate["images"]) == (64, 32, 4, 60)
    assert estimate["images_per_second"] == min(estimate["limits_images_per_second"].values())
    assert estimate["limits_images_per_second"][estimate["bottleneck"]] == estimate["images_per_second"]
    seconds = estimate["startup_seconds"] + 60 / estimate["images_per_second"]
    assert estimate["hours"] == pytest.approx(seconds / 3600)
    assert estimate["usd"] == pytest.approx((4 * 0.9776 + 2 * 0.714) * seconds / 3600)
    assert result["parallelism"]["read_tasks"] == 3, "no more than shards"
    assert result["sample"]["costs"]["flops"] > 0
    assert result["assumed"] == [
        "cores of the cluster are as fast as the cores here, and the store is as fast as from here"
    ]


def test_the_local_machine_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_folder(tmp_path / "photos", 10)
    result = figures(capsys, "--input", folder)
    assert result["estimate"]["cluster"] == "local"
    assert result["estimate"]["usd"] is None
    assert result["better"]["cluster"].startswith("1x")
    assert result["assumed"] == []
    costs, parallelism = result["sample"]["costs"], result["parallelism"]
    actors = result["estimate"]["limits_images_per_second"]["actors"]
    cores = parallelism["actors"] * parallelism["actor_threads"] * result["estimate"]["cores"] / cpus_here()
    assert actors == pytest.approx(cores / (costs["predict_seconds"] * costs["predict_cores"]))


def test_the_price_file_of_the_user_is_used(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(PRICES.read_text().replace("usd_per_hour: 0.8048", "usd_per_hour: 80.48"))
    dollars = []
    for more in ([], ["--prices", mine]):
        estimate = figures(capsys, "--input", tars, "--cluster", "g6.xlarge", *more)["estimate"]
        dollars.append(estimate["usd"] / estimate["hours"])
    assert dollars == [pytest.approx(0.8048), pytest.approx(80.48)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cluster", "8xg6.2xlrge"), "g6.2xlarge"),
        (("--cluster", "0xg6.xlarge"), "it must be counts and names of machines"),
        (("--prices", "none.yaml"), "none.yaml cannot be read"),
        (("--input", "none"), "none does not exist"),
        (("--actors", "2"), "--actors is 2: an estimate compares clusters"),
        (("--gpus-per-actor", "0.5"), "--gpus-per-actor is 0.5: an estimate compares clusters"),
        (("--decoder", "gpu", "--cluster", "c7i.2xlarge"), "the network has none"),
    ],
)
def test_bad_settings_end_with_one_line_before_anything_is_measured(
    tars: Path, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "measure", lambda *_: pytest.fail("a sample was measured"))
    inputs = () if "--input" in arguments else ("--input", str(tars))
    assert estimate.main([*inputs, *TINY, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("nightshift: ")
    assert message in printed.err
    assert printed.out == ""


def test_decoding_on_gpus_that_are_not_here_is_not_measured(tars: Path, capsys: pytest.CaptureFixture) -> None:
    result = figures(capsys, "--input", tars, "--decoder", "gpu", "--cluster", "g6.xlarge")
    assert result["assumed"][1].startswith("the CPUs decode, as with --decoder fast")
    assert result["sample"]["costs"]["pixel_bytes"] == 32 * 32 * 3


def test_decoding_on_a_gpu_that_is_here_is_measured(
    tars: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU is a fake: the network and torchvision's decoder run on the CPU."""
    monkeypatch.setattr(gpu, "gpus_here", lambda: (1, "NVIDIA L4"))
    result = figures(capsys, "--input", tars, "--decoder", "gpu")
    assert list(result["sample"]["costs"]["gpu_seconds"]) == ["L4"]
    assert result["sample"]["costs"]["pixel_bytes"] == result["sample"]["costs"]["encoded_bytes"]
    assert result["assumed"] == []
    assert result["better"] is None or result["better"]["cluster"].startswith("1xg6.")


def test_for_a_cluster_of_cpus_the_network_is_measured_on_the_cpu(
    tars: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpus_here", lambda: (1, "NVIDIA L4"))
    result = figures(capsys, "--input", tars, "--cluster", "2xc7i.2xlarge")
    assert result["sample"]["costs"]["gpu_seconds"] == {}
    assert result["sample"]["network"].startswith("cpu")


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
def test_a_variant_of_a_gpu_is_not_the_gpu_in_the_price_file(name: str, known: str) -> None:
    assert forecasts.known_gpu(name, Prices.load().gpus) == known


@pytest.mark.parametrize(
    ("hours", "text"),
    [(20 / 3600, "20 s"), (0.5, "30 minutes"), (3, "3.0 hours"), (100, "4.2 days")],
)
def test_durations_have_a_suitable_unit(hours: float, text: str) -> None:
    assert forecasts.duration(hours) == text
