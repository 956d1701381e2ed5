"""Explanations of outputs: the place of the evidence, the row's own class, and what is refused."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scenes
import torch
from outputs import run_here
from PIL import Image
from safetensors.torch import save_file

from jobs import explain as job
from pipeline import Classifier, Embedder, RunConfig, open_output
from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import InputRefused, SettingRefused, WeightsRefused
from pipeline.explain import saliency
from pipeline.explain.job import Explanation, explain
from pipeline.models.heads import Head
from pipeline.models.spec import resolve

pytestmark = pytest.mark.usefixtures("own_caches")

COLOURS = "networks:colours"
RED, BLUE = 0, 1


def picture(small_red: bool = False) -> Image.Image:
    """A grey square of 64 pixels: red at the top left, blue at the bottom right. One of them is larger."""
    pixels = np.full((64, 64, 3), 128, np.uint8)
    red, blue = (8, 24) if small_red else (24, 8)
    pixels[:red, :red] = (255, 0, 0)
    pixels[-blue:, -blue:] = (0, 0, 255)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, one with more red and one with more blue, and a broken file; and both in a tar."""
    folder = tmp_path_factory.mktemp("photos")
    picture().save(folder / "red.png")
    picture(small_red=True).save(folder / "blue.png")
    (folder / "bad.png").write_bytes(b"")
    with tarfile.open(folder / "both.tar", "w") as tar:
        for name in ("red.png", "blue.png"):
            tar.add(folder / name, f"inside/{name}")
    return folder


@pytest.fixture
def labels(photos: Path, tmp_path: Path) -> str:
    """An output of classes, red and blue."""
    (tmp_path / "names.txt").write_text("red\nblue\n")
    classifier = Classifier(model=COLOURS, precision="float32", top_k=2, labels=str(tmp_path / "names.txt"))
    return run_here(RunConfig(input=str(photos), output=str(tmp_path / "labels")), classifier)


def ids_of(output: str) -> list[str]:
    return [name for batch in open_output(output).batches(["image_id"]) for name in batch.column(0).to_pylist()]


def seen(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder).convert("RGB"))


def only(*arguments: object, **options: object) -> Explanation:
    (explanation,) = explain(*arguments, **options)  # type: ignore[arg-type]
    return explanation


def centre(saliency: np.ndarray) -> tuple[float, float]:
    """Row and column of the centre of mass."""
    total = saliency.sum()
    rows, columns = np.indices(saliency.shape)
    return float((rows * saliency).sum() / total), float((columns * saliency).sum() / total)


def test_the_evidence_of_a_class_is_where_its_colour_is() -> None:
    explainer = saliency.Explainer(resolve(COLOURS, "DEFAULT"))
    pixels = torch.from_numpy(np.asarray(picture()).copy())[None]
    red, blue = explainer.saliency(pixels, RED), explainer.saliency(pixels, BLUE)
    assert (red.shape, red.dtype, float(red.max()), float(red.min())) == ((64, 64), np.float32, 1.0, 0.0)
    assert max(centre(red)) < 20
    assert min(centre(blue)) > 50
    assert explainer.layer_name == "0"
    grey = torch.full_like(pixels, 128)
    assert not explainer.saliency(grey, RED).any()


def test_images_of_a_folder_and_of_a_tar_are_explained(labels: str, tmp_path: Path) -> None:
    to = tmp_path / "why"
    ids = ["/red.png", "both.tar#inside/blue.png"]
    with pytest.raises(InputRefused, match=r"fits 2 images"):
        explain(labels, ["red.png"], to)
    archive = json.loads((Path(labels) / "_run.json").read_text())["settings"]["input"][0]
    ids = [f"{archive}/red.png", f"{archive}/both.tar#inside/blue.png"]
    explanations = list(explain(labels, ids, to))
    assert [(each.label, each.row_label, each.note) for each in explanations] == [
        ("red", "red", ""),
        ("blue", "blue", ""),
    ]
    assert all(each.score == pytest.approx(each.row_score, abs=1e-4) for each in explanations)
    assert sorted(path.name for path in to.iterdir()) == ["blue.png.png", "red.png.png"]
    shown = seen(to / "red.png.png")
    left = shown[:, : shown.shape[1] // 2]
    assert (left == (255, 0, 0)).all(axis=2).any(), "the pixels that the network saw"
    with pytest.raises(SettingRefused, match="exists; choose another name or add --overwrite"):
        explain(labels, ids, to)


def test_rows_of_parquet_zips_and_windows_of_scenes_are_explained(tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    pq.write_table(pa.table({"image": [b"", buffer.getvalue()], "name": ["bad", "red"]}), folder / "a.parquet")
    with zipfile.ZipFile(folder / "b.zip", "w") as file:
        file.writestr("x/red.png", buffer.getvalue())
    out = run_here(RunConfig(input=str(folder), output=str(tmp_path / "out")), Classifier(model=COLOURS))
    ids = [f"{folder}/b.zip#x/red.png", *(row for row in ids_of(out) if "a.parquet#" in row)]
    assert [each.row_label for each in explain(out, ids, tmp_path / "why")] == ["0", "0"]
    pixels = np.concatenate([np.asarray(picture(small_red=True)), np.asarray(picture())], axis=1).transpose(2, 0, 1)
    scene = scenes.write(tmp_path / "scene.tif", np.ascontiguousarray(pixels))
    config = RunConfig(input=str(scene), output=str(tmp_path / "windows"), tile_size=64)
    windows = run_here(config, Classifier(model=COLOURS, precision="float32"))
    explanations = list(explain(windows, ["scene.tif#0,0", "64,0"], tmp_path / "windows-why"))
    assert [(each.row_label, each.note) for each in explanations] == [("1", ""), ("0", "")]


def test_another_class_than_that_of_the_row(labels: str, tmp_path: Path) -> None:
    archive = json.loads((Path(labels) / "_run.json").read_text())["settings"]["input"][0]
    for label in ("blue", "1"):
        each = only(labels, [f"{archive}/red.png"], tmp_path / "why", label=label, overwrite=True)
        assert (each.row_label, each.score < 0.5, each.file.exists()) == ("red", True, True)
    with pytest.raises(
        SettingRefused, match="--label green is no class of the network: choose one of 0, 1, or a number"
    ):
        only(labels, [f"{archive}/red.png"], tmp_path / "other", label="green")


def test_a_row_whose_image_was_replaced_says_so(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    picture().save(tmp_path / "photos/a.png")
    out = run_here(RunConfig(input=str(tmp_path / "photos"), output=str(tmp_path / "out")), Classifier(model=COLOURS))
    data = (tmp_path / "photos/a.png").read_bytes()
    picture(small_red=True).save(tmp_path / "photos/a.png")
    assert data != (tmp_path / "photos/a.png").read_bytes()
    with pytest.raises(InputRefused, match=r"a\.png cannot be read \(changed\)"):
        only(out, ["a.png"], tmp_path / "why")


def test_a_head_is_explained_through_the_network(photos: Path, tmp_path: Path) -> None:
    out = run_here(RunConfig(input=str(photos / "red.png"), output=str(tmp_path / "out")),
                   Embedder(model=COLOURS, precision="float32"))  # fmt: skip
    with pytest.raises(SettingRefused, match="has no classes: name the one to explain with --label, or a head"):
        only(out, ["red.png"], tmp_path / "why")
    recorded = json.loads((Path(out) / "_run.json").read_text())["embedding_space"]
    space = EmbeddingSpace.from_json(recorded)
    tensors = {"weight": torch.tensor([[-9.0, 9.0], [9.0, -9.0]]), "bias": torch.zeros(2)}
    head = Head("linear", tensors, ("cold", "warm"), space, normalize=True, network={"model": COLOURS})
    head.save(str(tmp_path / "heat.safetensors"))
    each = only(out, ["red.png"], tmp_path / "why", head=str(tmp_path / "heat.safetensors"))
    assert (each.label, each.row_label) == ("warm", None)
    assert each.score > 0.9
    save_file({"vectors": torch.eye(2), "targets": torch.eye(2), "k": torch.tensor(1)}, tmp_path / "knn.safetensors",
              {"nightshift_head": json.dumps({"format": 1, "method": "knn", "classes": ["a", "b"],
                                              "embedding_space": recorded})})  # fmt: skip
    with pytest.raises(SettingRefused, match="nearest labelled images, which Grad-CAM cannot explain"):
        only(out, ["red.png"], tmp_path / "knn", head=str(tmp_path / "knn.safetensors"))


def test_classes_of_heads_need_the_same_head(photos: Path, tmp_path: Path) -> None:
    spec = Embedder(model=COLOURS, precision="float32")
    config = RunConfig(input=str(photos / "red.png"), output=str(tmp_path / "out"))
    spec.prepare()
    space = EmbeddingSpace.of({**config.result_settings(), **spec.settings()})
    assert space is not None
    files = []
    for number in (1.0, 2.0):
        tensors = {"weight": torch.tensor([[0.0, number], [number, 0.0]]), "bias": torch.zeros(2)}
        files.append(str(tmp_path / f"heat{number:g}.safetensors"))
        Head("linear", tensors, ("cold", "warm"), space, network={"model": COLOURS}).save(files[-1])
    out = run_here(config, Classifier(model=COLOURS, precision="float32", head=files[:1]))
    assert only(out, ["red.png"], tmp_path / "why", head=files[0]).row_label == "warm"
    with pytest.raises(SettingRefused, match="those of the head heat1: give its file with --head"):
        only(out, ["red.png"], tmp_path / "other")
    with pytest.raises(WeightsRefused, match="--head heat2 is not a head of"):
        only(out, ["red.png"], tmp_path / "other", head=files[1])


def test_another_network_is_refused_by_name(photos: Path, tmp_path: Path) -> None:
    from networks import save, small

    weights = save(tmp_path / "w.pth", small().state_dict())
    classifier = Classifier(model="networks:small", weights=weights, crop=48, mean=0.25)
    out = run_here(RunConfig(input=str(photos / "red.png"), output=str(tmp_path / "out")), classifier)
    moved = str(tmp_path / "moved.pth")
    Path(weights).rename(moved)
    with pytest.raises(WeightsRefused, match=r"w\.pth cannot be read"):
        only(out, ["red.png"], tmp_path / "why")
    assert only(out, ["red.png"], tmp_path / "why", weights=moved).note.startswith(("", "no place"))
    save(Path(moved), {name: value * 2 for name, value in small().state_dict().items()})
    with pytest.raises(WeightsRefused, match=r"is not that of .*: weights is sha256:\w+"):
        only(out, ["red.png"], tmp_path / "again", weights=moved)


def test_other_ids_are_refused(labels: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for image_id, message in [
        ("none.png", "--id none.png is no image of"),
        ("bad.png", "--id bad.png has no class: it is an error row, "),
    ]:
        with pytest.raises(InputRefused, match=message):
            explain(labels, [image_id], tmp_path / "why")
    with pytest.raises(SettingRefused, match="--id is missing"):
        explain(labels, [], tmp_path / "why")
    assert job.main([labels, "--id", "none.png", "--to", str(tmp_path / "why")]) == 2
    assert "is no image of" in capsys.readouterr().err
    assert not (tmp_path / "why").exists()


def test_a_transformer_is_refused() -> None:
    with pytest.raises(WeightsRefused, match="vit_b_32 has no map of features before its classifier"):
        saliency.Explainer(resolve("vit_b_32", "random"))


@pytest.mark.parametrize(
    ("model", "layer"), [("resnet18", "layer4"), ("squeezenet1_1", "classifier"), ("timm:resnet10t", "layer4")]
)
def test_the_last_map_of_features_is_found(model: str, layer: str) -> None:
    spec = resolve(model, "random")
    explainer = saliency.Explainer(spec)
    assert explainer.layer_name.startswith(layer)
    pixels = torch.randint(0, 256, (1, spec.transform.crop, spec.transform.crop, 3), dtype=torch.uint8)
    result = explainer.saliency(pixels, 3)
    assert result.shape == (spec.transform.crop,) * 2
    assert np.isfinite(result).all()
