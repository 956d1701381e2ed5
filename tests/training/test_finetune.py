"""A whole fine-tuning without Ray: from an archive and labels to a checkpoint that `classify` reads."""

import io
import json
import tarfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import images
import numpy as np
import pytest
import torch
from alone import Killed, without_ray
from PIL import Image
from safetensors import safe_open

from jobs import classify
from pipeline.config import RunConfig
from pipeline.errors import InputRefused, OutputLocked, SettingRefused, TooManyErrors
from pipeline.images.decode import decode
from pipeline.models.record import CheckpointRecord, read_record, with_flags_of_record
from pipeline.predictors.base import Allotment
from pipeline.predictors.classify import Classifier
from pipeline.predictors.embed import Embedder
from pipeline.training import decoded
from pipeline.training import finetune as finetune_module
from pipeline.training.finetune import FinetuneConfig, FinetuneResult, compare, finetune

SIDE = 40


def stripes(kind: str, seed: int) -> bytes:
    """An image whose class is the direction of its stripes, in random colours."""
    rng = np.random.default_rng(seed)
    wave = np.sin(np.arange(SIDE) * rng.uniform(0.7, 1.0) + rng.uniform(0, 6))
    grey = np.broadcast_to(wave if kind == "upright" else wave[:, None], (SIDE, SIDE))
    colours = rng.uniform(40, 215, (2, 3))
    pixels = colours[0] + (colours[1] - colours[0]) * (grey[..., None] + 1) / 2 + rng.normal(0, 12, (SIDE, SIDE, 3))
    return images.encode(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), "PNG")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stripes")
    for number in range(64):
        path = folder / ("upright" if number % 2 else "level") / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(stripes(path.parent.name, number))
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_CACHE", str(tmp_path / "cache"))


def tune(
    archive: object, to: Path, messages: list[str] | None = None, run: dict[str, Any] | None = None, **settings: Any
) -> FinetuneResult:
    given = {"labels": "folder", "epochs": 3, "frozen_epochs": 1, "pictures": False, "learning_rate": 0.1, **settings}
    network = Embedder(model="tiny:network", weights="DEFAULT", precision="float32")
    config = RunConfig(input=str(archive), output="unused", **{"batch_size": 16, **(run or {})})
    return finetune(
        config, network, FinetuneConfig(to=str(to), **given), [].append if messages is None else messages.append
    )


def state(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_checkpoint_needs_no_other_flag(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    to, said = tmp_path / "stripes.safetensors", list[str]()
    result = tune(archive, to, said, epochs=8, patience=9, pictures=True)
    assert result.evaluation.accuracy >= 0.8
    assert result.evaluation.images == 8, "half of a quarter of 64"
    assert any("64 images are decoded" in text for text in said)
    assert sum(text.startswith("epoch ") for text in said) == 1 + 1 + 8
    assert not list((tmp_path / "cache/finetune").glob("*")), "pixels, states and the lock are removed"
    assert result.evaluation.warnings[0].startswith("only 8 labels tested the classes: all figures are uncertain")
    assert result.probe.curve[-1][1] == result.probe.accuracy
    assert result.temperature >= 1, "8 labels cannot show that the scores may be surer"
    content = json.loads((tmp_path / "stripes.json").read_text())
    assert content["verdict"] == result.verdict == compare(result.evaluation, result.probe)
    losses = [epoch["loss"] for epoch in content["history"]]
    assert losses[0] is None
    assert losses[-1] < losses[1]
    page = (tmp_path / "stripes.html").read_text()
    assert page.count("<polyline") == 2
    assert "fine-tuning" in page

    run, network = classify.with_flags_of_weights({"input": "x", "output": "o"}, {"weights": str(to)})
    classifier = Classifier(**network, precision="float32")
    classifier.prepare()
    classifier.load(Allotment(cores=1, batch_size=8))
    assert classifier.spec.labels == ("level", "upright")
    assert classifier.transform == result.record.transform
    paths = sorted(archive.glob("*/*.png"))
    pixels = np.stack([decode(path.read_bytes(), classifier.transform).pixels for path in paths])
    labels = classifier.predict(pixels)["label"].to_pylist()  # type: ignore[union-attr]
    assert np.mean([label == path.parent.name for label, path in zip(labels, paths, strict=True)]) > 0.8
    for given, message in [
        ({"model": "resnet18"}, r"--model is resnet18, but tiny:network in --weights .*: leave it out"),
        ({"crop": 16}, "--crop is 16, but 32 in --weights"),
        ({"mean": ["0.5"]}, "--mean is 0.5, but 0.485,0.456,0.406 in"),
    ]:
        with pytest.raises(SettingRefused, match=message):
            classify.with_flags_of_weights(run, {"weights": str(to), **given})
    (tmp_path / "names.txt").write_text("level\nslanted\n")
    other = Classifier(**network, labels=str(tmp_path / "names.txt"))
    with pytest.raises(SettingRefused, match=r"class 1 is slanted, but upright in --weights"):
        other.prepare()
    with pytest.raises(SettingRefused, match=r"--model is resnet50, but --weights .* holds tiny:network"):
        Classifier(weights=str(to)).prepare()


def test_a_training_that_was_killed_gives_the_same_checkpoint(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    without_ray(monkeypatch)
    tune(archive, whole)
    for dies_after in (1, 2):  # at the end of the first phase, and in the second one
        without_ray(monkeypatch, dies_after)
        with pytest.raises(Killed):
            tune(archive, cut)
    without_ray(monkeypatch)
    said: list[str] = []
    tune(archive, cut, said)
    assert "64 images are decoded already" in said[0]
    assert any(text.startswith("continues after epoch ") for text in said)
    assert all(torch.equal(a, b) for a, b in zip(state(whole).values(), state(cut).values(), strict=True))
    records = [read_record(str(path)) for path in (whole, cut)]
    assert records[0] == records[1]


def test_bfloat16_and_weights_of_classes(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    labels = {path.name: path.parent.name for path in archive.glob("*/*.png")}
    rare = {name for name, kind in labels.items() if kind == "level" and int(name[:3]) > 15}
    (tmp_path / "labels.json").write_text(json.dumps({n: kind for n, kind in labels.items() if n not in rare}))
    settings = {"labels": str(tmp_path / "labels.json"), "class_weights": "balanced", "epochs": 1}
    network = Embedder(model="tiny:network", weights="DEFAULT", precision="bfloat16")
    config = FinetuneConfig(to=str(tmp_path / "a.safetensors"), **settings)  # type: ignore[arg-type]
    result = finetune(RunConfig(input=str(archive), output="unused"), network, config)
    assert all(tensor.dtype is torch.float32 for tensor in state(tmp_path / "a.safetensors").values())
    history = json.loads((tmp_path / "a.json").read_text())["history"]
    assert all(np.isfinite(epoch["stop_loss"]) for epoch in history)
    assert result.record.training["class_weights"] == "balanced"
    with pytest.raises(SettingRefused, match="--precision is float16: fine-tuning computes in bfloat16 or float32"):
        finetune(
            RunConfig(input=str(archive), output="unused"), Embedder(model="tiny:network", precision="float16"), config
        )


def test_images_of_a_tar_are_read_once_and_errors_are_listed(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    lines = ["image,label"]
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for path in sorted(archive.glob("*/*.png")):
            data = path.read_bytes()
            info = tarfile.TarInfo(path.name)
            info.size = len(data) if path.name != "007.png" else 100
            tar.addfile(info, io.BytesIO(data))
            if int(path.stem) < 40:
                lines.append(f"{path.name},{path.parent.name}")
    (tmp_path / "labels.csv").write_text("\n".join([*lines, "none.png,level"]))
    opened: list[object] = []
    one = decoded.Loader._decode
    monkeypatch.setattr(decoded.Loader, "_decode", lambda self, *a: (opened.append(a), one(self, *a))[1])
    said: list[str] = []
    settings = {"labels": str(tmp_path / "labels.csv"), "group_by": "member"}
    tune(tmp_path / "images.tar", tmp_path / "a.safetensors", said, **settings)
    content = json.loads((tmp_path / "a.json").read_text())
    assert [(each["image_id"][-7:], each["stage"]) for each in content["errors"]] == [("007.png", "decode")]
    assert content["unknown"] == ["007.png", "none.png"]
    assert content["training"]["labels"] == 39
    assert len(opened) == 41, "labelled images, and the end of the tar"
    with pytest.raises(TooManyErrors, match=r"1 of 40 images could not be read or decoded"):
        tune(tmp_path / "images.tar", tmp_path / "a.safetensors", run={"max_error_rate": 0.0}, **settings)
    (tmp_path / "labels.csv").write_text("name,label\n001.png,upright\n")
    with pytest.raises(InputRefused, match=r"entry 1 has no 'image', only name, label; name .* with --name-column"):
        tune(tmp_path / "images.tar", tmp_path / "a.safetensors", labels=str(tmp_path / "labels.csv"))


def test_pixels_that_do_not_fit_on_the_disk_are_refused(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda _: usage(1 << 30, 0, decoded.SPARE_BYTES + 64 * 36 * 36))
    message = (
        r"pixels of 64 images take 0.00 GB, and .* has 0.27 GB free: name a folder on a larger disk with --work-dir"
    )
    with pytest.raises(SettingRefused, match=message):
        tune(archive, tmp_path / "a.safetensors")


def test_a_training_that_gets_worse_ends_with_its_best_epoch(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    result = tune(archive, tmp_path / "a.safetensors", epochs=40, patience=2, learning_rate=1.0)
    history = json.loads((tmp_path / "a.json").read_text())["history"]
    best = result.record.training["best_epoch"]
    assert history[-1]["number"] == max(best, 1) + 2 < 41
    assert history[best]["stop_loss"] == min(epoch["stop_loss"] for epoch in history)


def test_one_checkpoint_is_written_by_one_command(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    to, inner = tmp_path / "a.safetensors", list[str]()
    decode_all = finetune_module.decode_images

    def beside(*arguments: Any) -> decoded.DecodedImages:
        with pytest.raises(OutputLocked, match=r"another `nightshift finetune` writes .*a\.safetensors"):
            tune(archive, to, inner)
        return decode_all(*arguments)

    monkeypatch.setattr(finetune_module, "decode_images", beside)
    tune(archive, to, epochs=1)


def test_few_labels_are_said_to_be_few(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ray(monkeypatch)
    labels = {f"{number:03d}.png": "upright" if number % 2 else "level" for number in range(8)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    said: list[str] = []
    tune(archive, tmp_path / "a.safetensors", said, labels=str(tmp_path / "labels.json"), epochs=1)
    assert any("2 labels are left out, too few to divide them" in text for text in said)
    content = json.loads((tmp_path / "a.json").read_text())
    assert any("too few to divide" in note for note in content["notes"])
    (tmp_path / "labels.json").write_text(json.dumps({"001.png": "upright", "002.png": "level"}))
    with pytest.raises(InputRefused, match="the labels cannot be divided"):
        tune(archive, tmp_path / "a.safetensors", labels=str(tmp_path / "labels.json"))


def test_a_refused_call_leaves_no_folder(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"labels\.csv does not exist"):
        tune(archive, tmp_path / "a.safetensors", labels=str(tmp_path / "labels.csv"))
    assert not list((tmp_path / "cache/finetune").glob("*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": ""}, "--labels is missing"),
        ({"to": ""}, "--to is missing"),
        ({"to": "a.pt"}, r"must end in \.safetensors"),
        ({"holdout": 0.6}, "--holdout is 0.6: it must be above 0 and at most 0.5"),
        ({"learning_rate": 0.0}, "--learning-rate is 0"),
        ({"label_smoothing": 1.0}, "--label-smoothing is 1"),
        ({"workers": 0}, "--workers is 0: it must be at least 1"),
        ({"augment": "all"}, "--augment is 'all': it must be one of photo, aerial, none"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingRefused, match=message):
        FinetuneConfig(**{"labels": "folder", "to": "a.safetensors", **settings})


def test_a_record_is_the_same_after_a_file() -> None:
    from pipeline.images.transform import Transform

    record = CheckpointRecord("m", Transform(squash=True), ("a", "b"), {"scale": "0:3"}, "s.yaml", {"x": 1})
    assert CheckpointRecord.from_json(record.to_json()) == record
    assert CheckpointRecord.from_json('{"transform": {}}') is None
    run, network = with_flags_of_record(record, "w", {"scale": "0.0:3.0"}, {})
    assert run == {"scale": "0:3"}
    assert network == {"model": "m", "input_spec": "s.yaml"}
    with pytest.raises(SettingRefused, match="--scale is 0:4, but 0:3 in --weights w: leave it out"):
        with_flags_of_record(record, "w", {"scale": "0:4"}, {})
