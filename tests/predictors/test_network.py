"""Embedder and Classifier: their columns against the plain network, and their settings."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from networks import TINY, draw_pixels, tiny
from torch import nn

from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.images.transform import IMAGENET_MEAN, IMAGENET_STD, Transform
from pipeline.inference.quantize import to_int8
from pipeline.predictors.base import Allotment
from pipeline.predictors.classify import Classifier
from pipeline.predictors.embed import Embedder
from pipeline.predictors.network import NetworkPredictor
from pipeline.schema import vector

pytestmark = pytest.mark.usefixtures("own_caches")


def normalised(pixels: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous().float() / 255
    return (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A ResNet-18 whose batch normalisation is not the identity, so that wrong folding shows."""
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
    assert predictor.columns == pa.schema([("embedding", vector(pa.float32(), 512))])
    pixels = draw_pixels()
    pixels.flags.writeable = False  # as Arrow's memory is
    embedding = predictor.predict(pixels)["embedding"]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in predictor.session.forward.modules())
    expected = plain_features(network, normalised(pixels)).numpy()
    np.testing.assert_allclose(embedding, expected, atol=1e-4, rtol=1e-4)
    assert embedding.dtype == np.float32


@pytest.mark.parametrize(("precision", "max_error"), [("bfloat16", 0.05), ("float16", 0.02)])
def test_low_precision_is_close(precision: str, max_error: float, network: nn.Module, weights: str) -> None:
    pixels = draw_pixels(2, 224)
    embedding = Embedder(model="resnet18", weights=weights, precision=precision).predict(pixels)["embedding"]
    expected = plain_features(network, normalised(pixels)).numpy()
    assert 0 < np.linalg.norm(embedding - expected) / np.linalg.norm(expected) < max_error
    assert embedding.dtype == np.float32


def test_top_k_is_that_of_torch(network: nn.Module, weights: str) -> None:
    pixels = draw_pixels()
    predictor = Classifier(model="resnet18", weights=weights, precision="float32", top_k=4, embeddings=True)
    predictor.prepare()
    names = ["label", "label_id", "score", "top_labels", "top_label_ids", "top_scores", "embedding"]
    assert predictor.columns.names == names
    columns = predictor.predict(pixels)
    assert list(columns) == names
    expected = network(normalised(pixels)).softmax(1).topk(4)
    np.testing.assert_allclose(np.array(columns["top_scores"].to_pylist()), expected.values, rtol=1e-3)
    assert columns["top_label_ids"].to_pylist() == expected.indices.tolist()
    assert columns["top_labels"].to_pylist() == [[str(i) for i in row] for row in expected.indices.tolist()]
    assert columns["label_id"].tolist() == expected.indices[:, 0].tolist()
    assert columns["label"].to_pylist() == [str(i) for i in expected.indices[:, 0].tolist()]
    np.testing.assert_allclose(columns["score"], expected.values[:, 0], rtol=1e-3)
    assert columns["embedding"].shape == (3, 512)
    for field in predictor.columns:
        if field.name != "embedding":
            assert pa.array(columns[field.name]).type == field.type


def test_top_k_is_at_most_the_number_of_classes_and_labels_come_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\nf\n")
    predictor = Classifier(model=TINY, labels=str(tmp_path / "names.txt"), top_k=10)
    columns = predictor.predict(draw_pixels(2, 32))
    assert sorted(columns["top_labels"][0].as_py()) == list("abcdef")
    assert sum(columns["top_scores"][1].as_py()) == pytest.approx(1, abs=1e-5)


def test_embeddings_in_half_precision() -> None:
    predictor = Embedder(model=TINY, embedding_dtype="float16")
    predictor.prepare()
    assert predictor.columns.field("embedding").type == vector(pa.float16(), 8)
    assert predictor.transform == Transform(40, 32)
    assert predictor.predict(draw_pixels(2, 32))["embedding"].dtype == np.float16


def test_embeddings_of_8_bits() -> None:
    pixels = draw_pixels(3, 32)
    exact, small = Embedder(model=TINY), Embedder(model=TINY, embedding_dtype="int8")
    for predictor in (exact, small):
        predictor.prepare()
    assert small.columns == pa.schema([("embedding", vector(pa.int8(), 8)), ("embedding_scale", pa.float32())])
    columns, expected = small.predict(pixels), exact.predict(pixels)["embedding"]
    scales = np.asarray(columns["embedding_scale"])[:, None]
    assert (columns["embedding"].dtype, scales.dtype) == (np.int8, np.float32)
    assert (np.abs(columns["embedding"]).max(axis=1) == 127).all()
    assert (np.abs(columns["embedding"] * scales - expected) <= scales * 0.501).all()
    both = Classifier(model=TINY, embedding_dtype="int8", embeddings=True)
    both.prepare()
    assert both.columns.names[-2:] == ["embedding", "embedding_scale"]
    assert {"embedding", "embedding_scale"} <= set(both.predict(pixels))


def test_8_bits_of_vectors_that_are_zero_or_not_finite() -> None:
    vectors, scales = to_int8(
        torch.tensor([[0.0, 0.0], [1.0, torch.nan], [torch.inf, 1.0], [-1e-39, 1e-39], [3e38, -3e38]])
    )
    assert vectors[0].tolist() == [0, 0]
    assert scales[0] == 0
    assert not torch.isfinite(scales[1:3]).any(), "the row becomes an error"
    assert vectors[4].tolist() == [127, -127]
    assert torch.isfinite(scales[[0, 3, 4]]).all()


def test_one_channel_is_the_luma(tmp_path: Path) -> None:
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=4).eval().requires_grad_(False)
    network.conv1[0] = nn.Conv2d(1, 24, 3, 2, 1, bias=False)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    predictor = Embedder(model="shufflenet_v2_x0_5", weights=str(tmp_path / "w.pth"), precision="float32")
    pixels = draw_pixels(2)
    luma = torch.from_numpy(pixels @ np.array([0.299, 0.587, 0.114])).float()[:, None] / 255
    mean, std = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3
    expected = plain_features(network, (luma - mean) / std).detach().numpy()
    np.testing.assert_allclose(predictor.predict(pixels)["embedding"], expected, atol=1e-4)


def test_a_network_that_cannot_be_traced_is_not_folded() -> None:
    predictor = Embedder(model="networks:branching", weights="random", precision="float32")
    assert predictor.predict(draw_pixels(1))["embedding"].shape == (1, 4)
    assert any(isinstance(module, nn.BatchNorm2d) for module in predictor.session.forward.modules())


def test_nan_is_returned_as_it_is(network: nn.Module, tmp_path: Path) -> None:
    state = tiny()[0].state_dict()
    state["2.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "w.pth")
    columns = Classifier(model=TINY, weights=str(tmp_path / "w.pth"), embeddings=True).predict(draw_pixels(2, 32))
    assert np.isnan(columns["score"]).all()
    assert np.isfinite(columns["embedding"]).all()


def test_a_pickled_predictor_is_small_and_complete() -> None:
    predictor = Classifier(model=TINY, top_k=2)
    expected = predictor.predict(draw_pixels(2, 32))
    data = pickle.dumps(predictor)
    assert len(data) < 10_000
    copy = pickle.loads(data)
    assert copy._session is None
    assert (copy.columns, copy.transform, copy.spec) == (predictor.columns, predictor.transform, predictor.spec)
    assert copy.predict(draw_pixels(2, 32))["top_scores"] == expected["top_scores"]


# Settings


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (Embedder, {"precision": "int8"}, "--precision is 'int8': it must be one of auto, float32"),
        (Embedder, {"compile": "yes"}, "--compile is 'yes'"),
        (Classifier, {"embedding_dtype": "float64"}, "--embedding-dtype is 'float64'"),
        (Embedder, {"embedding_dtype": "pca:64"}, "nightshift export OUTPUT --to small.parquet --pca 64"),
        (Classifier, {"top_k": 0}, "--top-k is 0"),
        (Embedder, {"resize": -1}, "--resize is -1"),
        (Embedder, {"interpolation": "cubic"}, "--interpolation is 'cubic': it must be one of nearest, bilinear"),
        (Embedder, {"mean": "red"}, "--mean is 'red'"),
    ],
)
def test_bad_settings_are_refused_at_once(cls: type[NetworkPredictor], values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingRefused, match=message):
        cls(**values)


def test_a_classifier_needs_a_classifier() -> None:
    with pytest.raises(WeightsRefused, match="does not end in a classifier"):
        Classifier(model="networks:branching", weights="random").prepare()


def test_settings_change_only_if_results_change(network: nn.Module, weights: str, tmp_path: Path) -> None:
    def settings(cls: type[NetworkPredictor] = Classifier, **values: object) -> dict[str, object]:
        return cls(**{"model": "resnet18", "weights": weights, **values}).settings()

    base = settings()
    moved = tmp_path / "moved.pth"
    moved.write_bytes(Path(weights).read_bytes())
    assert settings(weights=str(moved)) == base
    assert settings(compile="on", seed=9) == base
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
    for index, other in enumerate(others):
        assert other not in [base, *others[:index]]


def test_the_transform_is_recorded_only_as_the_resulting_one() -> None:
    plain = Embedder(model=TINY)
    assert {"resize", "crop", "interpolation", "mean", "std"}.isdisjoint(plain.settings())
    assert Embedder(model=TINY, resize=40, crop=32, mean=IMAGENET_MEAN).settings() == plain.settings()
    changed = Embedder(model=TINY, crop=24, interpolation="bicubic", mean=["0.5", "0.5", "0.5"], std="0.25")
    expected = {"resize": 40, "crop": 24, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.25,) * 3}
    assert changed.settings()["transform"] == expected | {"squash": False}
    assert changed.provenance()["transform"] == changed.settings()["transform"]
    assert changed.transform == changed.spec.transform


def test_mean_and_std_change_the_input_of_the_network(network: nn.Module, weights: str) -> None:
    predictor = Embedder(model="resnet18", weights=weights, precision="float32", mean=0.5, std="0.2,0.3,0.4")
    pixels = draw_pixels(2)
    x = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous().float() / 255
    expected = plain_features(network, (x - 0.5) / torch.tensor((0.2, 0.3, 0.4)).view(3, 1, 1))
    result = torch.from_numpy(predictor.predict(pixels)["embedding"])
    torch.testing.assert_close(result, expected, atol=2e-4, rtol=2e-4)


def test_an_assumed_transform_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    predictor = Embedder(model="networks:small", weights="random")
    predictor.prepare()
    predictor.predict(draw_pixels(1))
    (message,) = caplog.messages
    assert message.startswith("nightshift: --model networks:small comes without a transform")


def test_an_allotment_is_not_in_the_settings() -> None:
    predictor = Embedder(model=TINY, precision="float32")
    before = predictor.settings()
    predictor.load(Allotment(cores=1, batch_size=4, gpu_share=0.0, images=10))
    assert predictor.settings() == before
    assert predictor.session.batch_size == 4


def test_provenance_names_the_weights(weights: str) -> None:
    random = Embedder(model="resnet18", weights="random", seed=4).provenance()
    assert (random["weights"], random["seed"], random["weights_sha256"]) == ("random", 4, "")
    file = Embedder(model="resnet18", weights=weights).provenance()
    assert (file["weights"], file["weights_uri"], file["embedding_dim"]) == (weights, weights, 512)
    assert len(str(file["weights_sha256"])) == 64
