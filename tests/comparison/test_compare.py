"""Networks on a labelled sample: accuracy, speed and cost, networks out of reach, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import images
import numpy as np
import pytest
import torch
from PIL import Image

from jobs import compare as job
from pipeline.comparison.job import CompareConfig, Comparison, NetworkResult, compare
from pipeline.comparison.measure import embed
from pipeline.config import RunConfig
from pipeline.errors import InputRefused, SettingRefused
from pipeline.estimates import sample
from pipeline.predictors.embed import Embedder

pytestmark = pytest.mark.usefixtures("own_caches")

NETWORKS = ("networks:small", "networks:colours")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 tiles of red or blue noise in folders of these names, and a broken one."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(40):
        pixels = random.integers(0, 120, (64, 64, 3), np.uint8)
        name = ("red", "blue")[number % 2]
        pixels[..., 0 if name == "red" else 2] += 60
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    (folder / "red/bad.jpg").write_bytes(images.zero_bytes())
    return folder


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sample, "PREDICT_SECONDS", 0.05)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are small, and threads that wait for each other take longer
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_networks_are_compared_on_the_same_folds(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_WEIGHTS_MIRROR", str(tmp_path / "nothing"))  # no network may be downloaded
    to = tmp_path / "networks.json"
    models = ["networks:colours", "networks:small=random", "resnet18"]
    assert job.main(["--input", str(photos), "--labels", "folder", "--to", str(to), "--models", *models]) == 0
    out = capsys.readouterr().out
    record = json.loads(to.read_text())
    by_name = {each["model"]: each for each in record["networks"]}
    assert (record["images"], record["failed"], record["folds"]) == (40, 1, 5)
    assert (record["classes"], record["baseline"]) == ({"blue": 20, "red": 20}, 0.5)
    colours = by_name["networks:colours"]
    assert (colours["accuracy"], colours["spread"], colours["embedding_dim"]) == (1.0, 0.0, 2)
    assert len(by_name["networks:small"]["fold_accuracies"]) == 5
    for name in NETWORKS:
        assert by_name[name]["images_per_second"] > 0
        assert by_name[name]["usd_per_million"] > 0
    assert "cannot be downloaded" in by_name["resnet18"]["fault"]
    assert record["networks"][-1]["model"] == "resnet18", "the most accurate first, those left out last"
    assert "networks:small (random weights)" in out.replace("\n", " ")
    assert "left out: resnet18: weights" in out
    assert Image.open(tmp_path / "networks.png").size[0] > 600


def test_the_vectors_are_those_of_a_run(photos: Path) -> None:
    embedder = Embedder(model="networks:colours", precision="float32")
    embedder.prepare()
    embedded = embed(RunConfig(input=str(photos), output="unused"), embedder)
    assert (embedded.rows, embedded.failures) == (40, (f"{photos}/red/bad.jpg",))
    name = embedded.table["image_id"][5].as_py()
    pixels = np.asarray(Image.open(name))[None]
    np.testing.assert_allclose(embedded.vectors()[5], embedder.predict(pixels)["embedding"][0], rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": ""}, "--labels is missing"),
        ({"labels": "column:cls"}, "--labels is column:cls: compare takes a file or folder"),
        ({"models": ()}, "--models is missing: name the networks"),
        ({"models": ("vgg11", "vgg11")}, "--models has vgg11 twice"),
        ({"to": "x.txt"}, "--to is 'x.txt': it must end in .json"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingRefused, match=message):
        CompareConfig(**{"labels": "folder", "models": ("resnet18",), **values})  # type: ignore[arg-type]


def test_other_refusals(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = RunConfig(input=str(photos), output="unused")
    config = CompareConfig(labels=str(tmp_path / "none.csv"), models=NETWORKS)
    with pytest.raises(InputRefused, match=r"none\.csv does not exist"):
        compare(run, {}, config, print)
    with pytest.raises(SettingRefused, match="'resnet19' is unknown: did you mean"):
        compare(run, {}, CompareConfig(labels="folder", models=("resnet18", "resnet19")), print)
    missing = CompareConfig(labels="folder", models=("resnet18=none.pth",))
    with pytest.raises(InputRefused, match=r"no network could be loaded: .*none\.pth cannot be read"):
        compare(run, {}, missing, print)
    arguments = ["--input", str(photos), "--labels", "folder", "--models", "resnet18", "--model", "resnet18"]
    assert job.main(arguments) == 2
    assert "--model is no flag of compare: leave it out" in capsys.readouterr().err


def test_a_price_that_is_unknown_is_said_so() -> None:
    from rich.console import Console

    from pipeline.comparison import chart

    result = NetworkResult("resnet18", "w", embedding_dim=512, accuracy=0.5, images_per_second=9.0)
    comparison = Comparison((result,), 10, 0, {"a": 5, "b": 5}, 5, 0.5, "local")
    console = Console(width=120, record=True)
    chart.show(comparison, console)
    assert "unknown" in console.export_text()
    assert chart.png(comparison).startswith(b"\x89PNG")
