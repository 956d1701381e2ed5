"""The plan's job as a user starts it: what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest
from whole import TINY, jpeg, write_folder, write_tar

from jobs import plan
from pipeline import forecast, sample
from pipeline.machines import PRICES


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
    assert plan.main(["--input", str(tars), *TINY, "--cluster", "4xg6.2xlarge+2xc7i.4xlarge", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    estimate = found["estimate"]
    assert (estimate["vcpus"], estimate["cores"], estimate["gpus"], estimate["images"]) == (64, 32, 4, 60)
    assert estimate["images_per_second"] == min(estimate["limits_images_per_second"].values())
    assert estimate["limits_images_per_second"][estimate["bottleneck"]] == estimate["images_per_second"]
    seconds = estimate["startup_seconds"] + 60 / estimate["images_per_second"]
    assert estimate["hours"] == pytest.approx(seconds / 3600)
    assert estimate["usd"] == pytest.approx((4 * 0.9776 + 2 * 0.714) * seconds / 3600)
    assert found["parallelism"]["read_tasks"] == 3, "no more than shards"
    assert found["sample"]["costs"]["flops"] > 0


def test_the_machine_at_hand_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_folder(tmp_path / "photos", 10)
    assert plan.main(["--input", str(folder), *TINY, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["estimate"]["cluster"] == "local"
    assert found["estimate"]["usd"] is None
    assert found["better"]["cluster"].startswith("1x")


def test_prices_of_ones_own_count(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(PRICES.read_text().replace("usd_per_hour: 0.8048", "usd_per_hour: 80.48"))
    arguments = ["--input", str(tars), *TINY, "--cluster", "g6.xlarge", "--json"]
    dollars = []
    for more in ([], ["--prices", str(mine)]):
        assert plan.main([*arguments, *more]) == 0
        estimate = json.loads(capsys.readouterr().out)["estimate"]
        dollars.append(estimate["usd"] / estimate["hours"])
    assert dollars == [pytest.approx(0.8048), pytest.approx(80.48)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cluster", "8xg6.2xlrge"), "g6.2xlarge"),
        (("--cluster", "0xg6.xlarge"), "write how many of which machine"),
        (("--prices", "none.yaml"), "none.yaml cannot be read"),
        (("--input", "none"), "none does not exist"),
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


@pytest.mark.parametrize(
    ("hours", "said"),
    [(20 / 3600, "20 s"), (0.5, "30 minutes"), (3, "3.0 hours"), (100, "4.2 days")],
)
def test_durations_are_in_the_unit_that_people_would_use(hours: float, said: str) -> None:
    assert forecast.duration(hours) == said
