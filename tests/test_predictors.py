import logging
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import images
import numpy as np
import pyarrow as pa
import pytest
import torch
import torch._inductor.config
import torchvision
from torch import nn
from torch._inductor.utils import fresh_cache

from pipeline import network as network_module
from pipeline.config import IMAGENET_MEAN, IMAGENET_STD, Transform
from pipeline.decode import decode
from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.gpu import GPU_SIZES, choose_device, evenly, images_that_fit, refused_by_gpu, rounded_up
from pipeline.lane import Lane, finish
from pipeline.network import NetworkRunner
from pipeline.predictors import Classifier, Embedder, NetworkPredictor, Predictor

TINY = f"{__name__}:tiny"


def tiny() -> tuple[nn.Module, Transform]:
    """Quick to compile: one convolution with its normalisation, 6 classes."""
    torch.manual_seed(2)
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(8, 6)), Transform(40, 32)


class Branching(nn.Module):
    """Its way depends on the data, so that a trace of it cannot be made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def branching() -> nn.Module:
    return Branching()


def draw_pixels(rows: int = 3, size: int = 224) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)


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


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_CACHE", str(tmp_path / "cache"))


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
    predictor = Embedder(model=f"{__name__}:branching", weights="random", precision="float32")
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


# Several batches at once, as on a GPU


@pytest.mark.parametrize("compile", ["off", "auto"])
def test_batches_of_several_threads_do_not_mix(monkeypatch: pytest.MonkeyPatch, compile: str) -> None:
    monkeypatch.setitem(network_module.COMPILE_PAYS_SECONDS, "cpu", 0.0)
    batches = [draw_pixels(n, 32) + seed for seed, n in enumerate([4, 4, 3, 4, 1, 4, 4, 2, 4, 9])]
    expected = [Embedder(model=TINY, precision="float32").predict(pixels)["embedding"] for pixels in batches]
    predictor = Embedder(model=TINY, precision="float32", compile=compile)
    predictor.batch_size, predictor.images, predictor.gpu_share = 4, 10_000, 0.5
    predictor.load()
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            for found, wanted in zip(threads.map(predictor.predict, batches), expected, strict=True):
                np.testing.assert_allclose(found["embedding"], wanted, atol=1e-5)
    assert predictor._runner.free_lanes.qsize() == Embedder.max_concurrency
    assert predictor.describe() == "cpu, float32" + ", compiled" * (compile == "auto")


@pytest.mark.parametrize(
    ("free_bytes", "image_bytes", "lanes", "images"),
    [(10 << 30, 10 << 20, 1, 819), (10 << 30, 10 << 20, 2, 409), (1 << 20, 10 << 20, 2, 1), (1 << 20, 0, 1, 838860)],
)
def test_batches_are_sized_from_free_memory(free_bytes: int, image_bytes: int, lanes: int, images: int) -> None:
    assert images_that_fit(free_bytes, image_bytes, lanes) == images


@pytest.mark.parametrize(("images", "most", "size"), [(256, 256, 256), (256, 255, 128), (256, 100, 86), (8, 1, 1)])
def test_batches_are_cut_without_a_small_rest(images: int, most: int, size: int) -> None:
    assert evenly(images, most) == size


# On a GPU, which stand-ins take the part of here

GPU = torch.device("cuda")


@pytest.fixture
def runner() -> NetworkRunner:
    """On the CPU, with the lanes of a GPU."""
    predictor = Embedder(model=TINY, precision="float32")
    predictor.gpu_share = 0.5
    return predictor.runner


@pytest.mark.parametrize(
    ("share", "found", "device"), [(None, True, "cuda"), (0.5, True, "cuda"), (0.0, True, "cpu"), (None, False, "cpu")]
)
def test_it_computes_on_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch, share: float | None, found: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert choose_device(share).type == device


def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("pipeline.gpu.DRIVER_FILE", str(tmp_path))
    predictor = Embedder(model=TINY)
    predictor.gpu_share = 0.5
    with pytest.raises(
        SettingRefused, match=r"--gpus-per-actor is 0\.5, .* torch \S+ for CUDA .* take --gpus-per-actor 0"
    ):
        predictor.load()
    predictor.gpu_share = 0.0
    predictor.load()
    monkeypatch.setattr("pipeline.gpu.DRIVER_FILE", str(tmp_path / "none"))
    predictor.gpu_share = 0.5
    predictor.load()


@pytest.mark.parametrize("said", ["CUDA out of memory.", "CUDA error: no kernel image is available for execution"])
def test_a_network_that_a_gpu_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with (
        pytest.raises(SettingRefused, match=r"\(Tesla V100, 1024 of 16384 MiB free\) cannot run this network: CUDA"),
        refused_by_gpu(GPU),
    ):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="illegal"), refused_by_gpu(GPU):
        raise RuntimeError("CUDA error: an illegal memory access")


def test_batches_that_became_small_become_large_again(runner: NetworkRunner) -> None:
    runner.largest = runner.batch_size = 200
    runner.limit_batch(100)
    assert runner.batch_size == 100
    runner.limit_batch(1)
    runner.limit_batch(256)
    assert runner.batch_size == 200


def test_a_lane_that_lacked_memory_records_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lane, pixels = Lane(torch.device("cpu")), torch.zeros(1, 2, 2, 3)
    for said, again in (("CUDA out of memory.", True), ("operation not permitted when stream is capturing", False)):
        lane.records = True
        monkeypatch.setattr("pipeline.lane._Graph", lambda *_, said=said: raise_(RuntimeError(said)))
        assert lane._recorded(lambda x: (x, None), pixels) is None
        assert not lane.records
        lane.free()
        assert lane.records is again


def raise_(error: Exception) -> None:
    raise error


def test_bfloat16_is_for_gpus_that_compute_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert network_module._dtype("auto", GPU) is torch.float16


def test_what_a_library_takes_once_counts_for_no_image(monkeypatch: pytest.MonkeyPatch, runner: NetworkRunner) -> None:
    allocated, peak, batches, cached = 1000, 0, 0, 10**6

    def batch(lane: Lane, pixels: np.ndarray, rows: int) -> None:
        nonlocal allocated, peak, batches
        allocated += 50 if batches == 0 else 0
        peak = max(peak, allocated + 10 * rows + (10**5 if batches == 0 else 0))
        batches += 1

    def reset() -> None:
        nonlocal peak
        peak = allocated

    def empty_cache() -> None:
        nonlocal cached
        cached = 0

    monkeypatch.setattr(runner, "_batch", batch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**7 - cached, 10**8))
    assert runner._fitting(1.0) == images_that_fit(10**7, 10, lanes=2)


@pytest.mark.parametrize("batch_size", [1, 5, 8, 9, 100, 256])
def test_a_gpu_is_given_batches_of_few_sizes(batch_size: int) -> None:
    sizes = [rounded_up(images, batch_size) for images in range(1, batch_size + 1)]
    assert all(images <= size <= batch_size for images, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= GPU_SIZES
    assert sizes[-1] == batch_size
    assert rounded_up(batch_size + 3, batch_size) == batch_size + 3, "another thread has made batches smaller meanwhile"


@pytest.mark.parametrize(("seconds", "compiles"), [(5.0, False), (20.0, True)])
def test_compiling_is_judged_by_the_fastest_of_several_batches(
    monkeypatch: pytest.MonkeyPatch, runner: NetworkRunner, seconds: float, compiles: bool
) -> None:
    """Two lanes compute 2 × 256 images in so many seconds; what warms up or waits takes a minute."""
    monkeypatch.setitem(network_module.WARM_UPS, "cpu", 3)
    compiled: list[bool] = []
    monkeypatch.setattr(runner, "_compile", lambda: compiled.append(True))
    runner.images, runner.batch_size = 20_000, 256
    for each in (60.0, 60.0, 60.0, seconds, seconds, 60.0):
        runner._consider(256, each)
        runner._consider(3, 0.001)
        assert runner.images is not None
    runner._consider(200, 60.0)
    assert runner.images is None
    assert compiled == [True] * compiles


def test_waiting_for_a_gpu_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Event:
        def __init__(self, blocking: bool = False) -> None:
            calls.append(blocking)

        def record(self, stream: str) -> None:
            calls.append(stream)

        def synchronize(self) -> None:
            calls.append("waited")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "this thread's")
    finish(GPU)
    assert calls == [True, "this thread's", "waited"]
    finish(torch.device("cpu"))
    assert len(calls) == 3


def test_a_recording_that_fails_is_let_go_before_the_network_runs_without(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fail(*_: object) -> None:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    def forward(pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert sys.exc_info() == (None, None, None), "it would hold on to the recording's memory"
        return pixels + 1, None

    monkeypatch.setattr("pipeline.lane._Graph", fail)
    lane = Lane(torch.device("cpu"))
    lane.records = True
    for _ in range(2):
        assert lane.run(forward, torch.zeros(2), record=True)[0].tolist() == [1, 1]
    assert tried == [1]


@pytest.mark.parametrize(("model", "records"), [(TINY, True), (f"{__name__}:branching", False)])
def test_a_network_that_is_not_compiled_as_a_whole_is_not_recorded(model: str, records: bool) -> None:
    torch._dynamo.reset()
    predictor = Embedder(model=model, weights="random", precision="float32")
    predictor.batch_size = 2
    for lane in predictor.runner.all_lanes:
        lane.records = True
    predictor.runner._compile()
    assert predictor.describe() == "cpu, float32, compiled"
    assert [lane.records for lane in predictor.runner.all_lanes] == [records]


def test_a_gpu_is_asked_whether_it_is_lost_while_nothing_is_recorded_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Embedder(model=TINY)
    assert not predictor.lost()
    predictor.load()
    answers = [None, torch.AcceleratorError("CUDA error: an illegal memory access was encountered")]

    def synchronize() -> None:
        assert predictor.runner.starting._is_owned()
        if error := answers.pop(0):
            raise error

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert [predictor.lost(), predictor.lost()] == [False, True]


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
        Classifier(model=f"{__name__}:branching", weights="random").prepare()


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
