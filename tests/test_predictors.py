import logging
import pickle
import threading
from dataclasses import dataclass, field
from pathlib import Path

import images
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch._inductor.config
import torchvision
from networks import TINY, draw_pixels, tiny
from torch import nn
from torch._inductor.utils import fresh_cache

from pipeline import network as network_module
from pipeline.config import IMAGENET_MEAN, IMAGENET_STD, Transform
from pipeline.decode import decode
from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.predictors import Classifier, Embedder, NetworkPredictor, Predictor

pytestmark = pytest.mark.usefixtures("own_caches")


def normalised(pixels: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous().float() / 255
    return (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A ResNet-18 with statistics that folding must take into account."""
    torch.manual_seed(3)
    network = torchvision.models.resnet18()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def weights(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(network.state_dict(), path)
    return str(path)


def plain_features(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    head, network.fc = network.fc, nn.Identity()
    try:
        return network(x)
    finally:
        network.fc = head


def test_the_embedding_is_that_of_the_plain_network(network: nn.Module, weights: str) -> None:
    predictor = Embedder(model="resnet18", weights=weights, precision="float32")
    predictor.prepare()
    assert predictor.columns == pa.schema([("embedding", pa.list_(pa.float32(), 512))])
    pixels = draw_pixels()
    pixels.flags.writeable = False  # as Arrow's memory is
    found = predictor.predict(pixels)["embedding"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in predictor._runner.forward.modules())
    expected = plain_features(network, normalised(pixels)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    assert found.dtype == np.float32


@pytest.mark.parametrize(("precision", "worst"), [("bfloat16", 0.05), ("float16", 0.02)])
def test_low_precision_is_close(precision: str, worst: float, network: nn.Module, weights: str) -> None:
    pixels = draw_pixels(2, 224)
    found = Embedder(model="resnet18", weights=weights, precision=precision).predict(pixels)["embedding"]
    expected = plain_features(network, normalised(pixels)).numpy()
    assert 0 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < worst
    assert found.dtype == np.float32


def test_top_k_is_torchs(network: nn.Module, weights: str) -> None:
    pixels = draw_pixels()
    predictor = Classifier(model="resnet18", weights=weights, precision="float32", top_k=4, embeddings=True)
    predictor.prepare()
    names = ["label", "label_id", "score", "top_labels", "top_label_ids", "top_scores", "embedding"]
    assert predictor.columns.names == names
    found = predictor.predict(pixels)
    assert list(found) == names
    expected = network(normalised(pixels)).softmax(1).topk(4)
    np.testing.assert_allclose(np.array(found["top_scores"].to_pylist()), expected.values, rtol=1e-3)
    assert found["top_label_ids"].to_pylist() == expected.indices.tolist()
    assert found["top_labels"].to_pylist() == [[str(i) for i in row] for row in expected.indices.tolist()]
    assert found["label_id"].tolist() == expected.indices[:, 0].tolist()
    assert found["label"].to_pylist() == [str(i) for i in expected.indices[:, 0].tolist()]
    np.testing.assert_allclose(found["score"], expected.values[:, 0], rtol=1e-3)
    assert found["embedding"].shape == (3, 512)
    for column in predictor.columns:
        if column.name != "embedding":
            assert pa.array(found[column.name]).type == column.type


def test_top_k_is_capped_and_labels_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\nf\n")
    predictor = Classifier(model=TINY, labels=str(tmp_path / "names.txt"), top_k=10)
    found = predictor.predict(draw_pixels(2, 32))
    assert sorted(found["top_labels"][0].as_py()) == list("abcdef")
    assert sum(found["top_scores"][1].as_py()) == pytest.approx(1, abs=1e-5)


def test_embeddings_in_half_precision() -> None:
    predictor = Embedder(model=TINY, embedding_dtype="float16")
    predictor.prepare()
    assert predictor.columns.field("embedding").type == pa.list_(pa.float16(), 8)
    assert predictor.transform == Transform(40, 32)
    assert predictor.predict(draw_pixels(2, 32))["embedding"].dtype == np.float16


def test_one_channel_is_luma(tmp_path: Path) -> None:
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=4).eval().requires_grad_(False)
    network.conv1[0] = nn.Conv2d(1, 24, 3, 2, 1, bias=False)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    predictor = Embedder(model="shufflenet_v2_x0_5", weights=str(tmp_path / "w.pth"), precision="float32")
    pixels = draw_pixels(2)
    luma = torch.from_numpy(pixels @ np.array([0.299, 0.587, 0.114])).float()[:, None] / 255
    mean, std = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3
    expected = plain_features(network, (luma - mean) / std).detach().numpy()
    np.testing.assert_allclose(predictor.predict(pixels)["embedding"], expected, atol=1e-4)


def test_a_network_that_cannot_be_traced_runs_as_it_is() -> None:
    predictor = Embedder(model="networks:branching", weights="random", precision="float32")
    assert predictor.predict(draw_pixels(1))["embedding"].shape == (1, 4)
    assert any(isinstance(module, nn.BatchNorm2d) for module in predictor._runner.forward.modules())


def test_nan_is_handed_on(network: nn.Module, tmp_path: Path) -> None:
    state = tiny()[0].state_dict()
    state["2.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    found = Classifier(model=TINY, weights=str(tmp_path / "w.pth"), embeddings=True).predict(draw_pixels(2, 32))
    assert np.isnan(found["score"]).all()
    assert np.isfinite(found["embedding"]).all()


def test_what_travels_to_an_actor_is_small_and_whole() -> None:
    predictor = Classifier(model=TINY, top_k=2)
    expected = predictor.predict(draw_pixels(2, 32))
    data = pickle.dumps(predictor)
    assert len(data) < 10_000
    copy = pickle.loads(data)
    assert copy._runner is None
    assert (copy.columns, copy.transform, copy.spec) == (predictor.columns, predictor.transform, predictor.spec)
    assert copy.predict(draw_pixels(2, 32))["top_scores"] == expected["top_scores"]


def test_its_threads_start_no_others_and_the_callers_stay() -> None:
    before = torch.get_num_threads()
    predictor = Embedder(model=TINY, threads=3)
    predictor.load()
    threads, everywhere = predictor.runner.workers, threading.Barrier(3)
    assert list(threads.map(lambda _: everywhere.wait(60) >= 0 and torch.get_num_threads(), range(3))) == [1, 1, 1]
    assert torch.get_num_threads() == before


# Tiles


@pytest.mark.parametrize("compile", ["off", "on"])
def test_tiles_are_enlarged_as_decode_does_it(compile: str) -> None:
    predictor = Embedder(model=TINY, precision="float32", compile=compile)
    predictor.batch_size = 4
    predictor.prepare()
    assert predictor.takes_tiles
    crop = predictor.transform.crop
    encoded = [images.encode(images.tile("urban", seed, (crop // 2, crop // 2)), "PNG") for seed in range(5)]
    tiles = np.stack([decode(data, predictor.transform, keep_tiles=True).pixels for data in encoded])
    assert tiles.shape == (5, crop // 2, crop // 2, 3)
    whole = np.stack([decode(data, predictor.transform).pixels for data in encoded])
    found, expected = (predictor.predict(pixels)["embedding"] for pixels in (tiles, whole))
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert np.abs(found - expected).max() < np.abs(expected[0] - expected[1]).max() / 20
    pixels = predictor.join([tiles, whole])
    if pixels.device.type == "cpu":
        np.testing.assert_array_equal(pixels[: len(tiles)], whole, "as Pillow enlarges, to the bit")
    joined = predictor.predict(pixels)["embedding"]
    np.testing.assert_allclose(joined, np.concatenate([found, expected]), atol=1e-5)


# Compiling


def compiled(batch_size: int) -> Embedder:
    predictor = Embedder(model=TINY, compile="on", precision="float32")
    predictor.batch_size = batch_size
    predictor.load()
    return predictor


def test_compiled_batches_are_padded_and_split() -> None:
    pixels = draw_pixels(5, 32)
    expected = Embedder(model=TINY, precision="float32").predict(pixels)["embedding"]
    predictor = compiled(4)
    assert predictor._runner.fixed_size == 4
    assert [predictor._runner._rows(images) for images in (1, 2, 3, 4)] == [1, 2, 4, 4], "few go without the compiler"
    for rows in (5, 4, 1):
        found = predictor.predict(pixels[:rows])["embedding"]
        np.testing.assert_allclose(found, expected[:rows], atol=1e-5)


def test_without_a_compiler_it_goes_on_uncompiled(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)})
    with no_compiler, fresh_cache(), caplog.at_level(logging.WARNING, "pipeline.network"):
        predictor = compiled(4)
    assert [record.message[:20] for record in caplog.records if record.name == "pipeline.network"] == [
        "torch.compile failed"
    ]
    assert predictor.predict(draw_pixels(5, 32))["embedding"].shape == (5, 8)


@pytest.mark.parametrize(("pays_seconds", "compiles"), [(0.0, True), (1e9, False)])
def test_compile_auto_compiles_where_enough_is_left(
    monkeypatch: pytest.MonkeyPatch, pays_seconds: float, compiles: bool
) -> None:
    monkeypatch.setitem(network_module.COMPILE_PAYS_SECONDS, "cpu", pays_seconds)
    predictor = Embedder(model=TINY, precision="float32")
    predictor.batch_size, predictor.images = 4, 100
    predictor.load()
    pixels = draw_pixels(4, 32)
    first = predictor.predict(pixels)["embedding"]
    predictor.predict(pixels[:1])
    assert predictor.describe() == "cpu, float32"
    predictor.predict(pixels)
    assert predictor.describe() == "cpu, float32" + ", compiled" * compiles
    np.testing.assert_allclose(predictor.predict(pixels)["embedding"], first, atol=1e-5)


# Settings


@pytest.mark.parametrize(
    ("cls", "values", "said"),
    [
        (Embedder, {"precision": "int8"}, "--precision is 'int8': it is one of auto, float32"),
        (Embedder, {"compile": "yes"}, "--compile is 'yes'"),
        (Classifier, {"embedding_dtype": "float64"}, "--embedding-dtype is 'float64'"),
        (Classifier, {"top_k": 0}, "--top-k is 0"),
    ],
)
def test_bad_settings_are_refused_at_once(cls: type[NetworkPredictor], values: dict[str, object], said: str) -> None:
    with pytest.raises(SettingRefused, match=said):
        cls(**values)


def test_a_classifier_needs_a_classifier() -> None:
    with pytest.raises(WeightsRefused, match="does not end in a classifier"):
        Classifier(model="networks:branching", weights="random").prepare()


def test_settings_change_with_results_and_with_nothing_else(network: nn.Module, weights: str, tmp_path: Path) -> None:
    def settings(cls: type[NetworkPredictor] = Classifier, **values: object) -> dict[str, object]:
        return cls(**{"model": "resnet18", "weights": weights, **values}).settings()

    base = settings()
    moved = tmp_path / "moved.pth"
    moved.write_bytes(Path(weights).read_bytes())
    assert settings(weights=str(moved)) == base
    assert settings(compile="on", threads=3, seed=9) == base
    (tmp_path / "names.txt").write_text("\n".join(f"class {i}" for i in range(1000)))
    others = [
        settings(weights="random"),
        settings(weights="random", seed=1),
        settings(precision="float32"),
        settings(top_k=2),
        settings(embeddings=True),
        settings(labels=str(tmp_path / "names.txt")),
        settings(embedding_dtype="float16"),
        settings(Embedder),
    ]
    for place, other in enumerate(others):
        assert other not in [base, *others[:place]]


def test_provenance_names_the_weights(weights: str) -> None:
    random = Embedder(model="resnet18", weights="random", seed=4).provenance()
    assert (random["weights"], random["seed"], random["weights_sha256"]) == ("random", 4, "")
    file = Embedder(model="resnet18", weights=weights).provenance()
    assert (file["weights"], file["weights_uri"], file["embedding_dim"]) == (weights, weights, 512)
    assert len(str(file["weights_sha256"])) == 64


# A predictor of one's own


class Brightness(Predictor):
    columns = pa.schema([("brightness", pa.float32())])

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"brightness": pixels.mean(axis=(1, 2, 3), dtype="float32")}


@dataclass
class Threshold(Brightness):
    least: float = 0.5
    threads: int | None = None
    how: object = field(default=None)


@dataclass
class Tagged(Embedder):
    tag: str = ""


def test_a_predictor_of_ones_own_needs_columns_and_predict() -> None:
    predictor = Brightness()
    predictor.prepare()
    predictor.load()
    assert predictor.settings()["predictor"] == "Brightness"
    assert predictor.settings()["columns"] == {"brightness": "float"}
    assert predictor.provenance() == predictor.settings()
    assert predictor.predict(np.full((2, 4, 4, 3), 7, np.uint8))["brightness"].tolist() == [7, 7]
    assert pickle.loads(pickle.dumps(predictor)).transform == Transform()


def test_its_fields_are_its_settings() -> None:
    assert Threshold(0.3).settings() != Threshold(0.4).settings()
    assert Threshold(threads=2).settings() == Threshold().settings()
    with pytest.raises(SettingRefused, match=r"Threshold\.how"):
        Threshold(how=object()).settings()
    with pytest.raises(SettingRefused, match="adds no columns"):
        Predictor().settings()
    assert Tagged(model=TINY, tag="a").settings() != Tagged(model=TINY, tag="b").settings()
