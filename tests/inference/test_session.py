"""An InferenceSession on the CPU, with the lanes of a GPU and stand-ins for its memory."""

import threading
from concurrent.futures import ThreadPoolExecutor

import images
import numpy as np
import pytest
import torch
from networks import TINY, draw_pixels

from pipeline.images.decode import decode
from pipeline.inference import compilation
from pipeline.inference.cuda_stream import Lane
from pipeline.inference.gpu import images_that_fit
from pipeline.inference.session import InferenceSession, choose_dtype
from pipeline.predictors.base import Allotment
from pipeline.predictors.embed import Embedder

pytestmark = pytest.mark.usefixtures("own_caches")


def loaded(model: str = TINY, *, compile: str = "auto", weights: str = "DEFAULT", **allotment: float) -> Embedder:
    predictor = Embedder(model=model, weights=weights, precision="float32", compile=compile)
    predictor.load(Allotment(**allotment))
    return predictor


@pytest.fixture
def session() -> InferenceSession:
    """On the CPU, with the lanes of a GPU."""
    return loaded(gpu_share=0.5).session


@pytest.mark.parametrize("compile", ["off", "auto"])
def test_batches_of_several_threads_are_not_mixed_up(monkeypatch: pytest.MonkeyPatch, compile: str) -> None:
    monkeypatch.setitem(compilation.MIN_REMAINING_SECONDS, "cpu", 0.0)
    batches = [draw_pixels(n, 32) + seed for seed, n in enumerate([4, 4, 3, 4, 1, 4, 4, 2, 4, 9])]
    expected = [Embedder(model=TINY, precision="float32").predict(pixels)["embedding"] for pixels in batches]
    predictor = loaded(compile=compile, batch_size=4, images=10_000, gpu_share=0.5)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            for columns, embedding in zip(threads.map(predictor.predict, batches), expected, strict=True):
                np.testing.assert_allclose(columns["embedding"], embedding, atol=1e-5)
    assert predictor.session.free_lanes.qsize() == Embedder.max_concurrency
    assert predictor.describe() == "cpu, float32" + ", compiled" * (compile == "auto")


def test_batches_grow_again_after_they_were_reduced(session: InferenceSession) -> None:
    session.max_batch_size = session.batch_size = 200
    session.limit_batch(100)
    assert session.batch_size == 100
    session.limit_batch(1)
    assert session.batch_size == 1
    session.limit_batch(256)
    assert session.batch_size == 200


def test_bfloat16_needs_a_gpu_that_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert choose_dtype("auto", torch.device("cuda")) is torch.float16


def test_memory_that_a_library_allocates_once_is_not_counted_per_image(
    monkeypatch: pytest.MonkeyPatch, session: InferenceSession
) -> None:
    allocated, peak, batches, cached = 1000, 0, 0, 10**6

    def run_piece(lane: Lane, pixels: np.ndarray, rows: int) -> None:
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

    monkeypatch.setattr(session, "_run_piece", run_piece)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**7 - cached, 10**8))
    assert session._max_images(1.0) == images_that_fit(10**7, 10, lanes=2)


def test_its_threads_start_no_others_and_leave_the_callers_threads_alone() -> None:
    before = torch.get_num_threads()
    workers, barrier = loaded(cores=3).session.workers, threading.Barrier(3)
    assert list(workers.map(lambda _: barrier.wait(60) >= 0 and torch.get_num_threads(), range(3))) == [1, 1, 1]
    assert torch.get_num_threads() == before


# Tiles


@pytest.mark.parametrize("compile", ["off", "on"])
def test_tiles_are_enlarged_as_decode_enlarges_them(compile: str) -> None:
    predictor = loaded(compile=compile, batch_size=4)
    assert predictor.takes_tiles
    crop = predictor.transform.crop
    encoded = [images.encode(images.tile("urban", seed, (crop // 2, crop // 2)), "PNG") for seed in range(5)]
    tiles = np.stack([decode(data, predictor.transform, keep_tiles=True).pixels for data in encoded])
    assert tiles.shape == (5, crop // 2, crop // 2, 3)
    whole = np.stack([decode(data, predictor.transform).pixels for data in encoded])
    from_tiles, from_whole = (predictor.predict(pixels)["embedding"] for pixels in (tiles, whole))
    np.testing.assert_allclose(from_tiles, from_whole, atol=0.01)
    assert np.abs(from_tiles - from_whole).max() < np.abs(from_whole[0] - from_whole[1]).max() / 20
    pixels = predictor.join([tiles, whole])
    if pixels.device.type == "cpu":
        np.testing.assert_array_equal(pixels[: len(tiles)], whole, "bit for bit as Pillow enlarges")
    joined = predictor.predict(pixels)["embedding"]
    np.testing.assert_allclose(joined, np.concatenate([from_tiles, from_whole]), atol=1e-5)


# Compiled networks


def test_compiled_batches_are_padded_and_split() -> None:
    pixels = draw_pixels(5, 32)
    expected = Embedder(model=TINY, precision="float32").predict(pixels)["embedding"]
    predictor = loaded(compile="on", batch_size=4)
    assert predictor.session.fixed_size == 4
    sizes = [predictor.session._padded_size(images) for images in (1, 2, 3, 4)]
    assert sizes == [1, 2, 4, 4], "batches of at most half the size are not compiled"
    for rows in (5, 4, 1):
        embedding = predictor.predict(pixels[:rows])["embedding"]
        np.testing.assert_allclose(embedding, expected[:rows], atol=1e-5)


@pytest.mark.parametrize(("min_seconds", "compiles"), [(0.0, True), (1e9, False)])
def test_compile_auto_compiles_if_enough_images_remain(
    monkeypatch: pytest.MonkeyPatch, min_seconds: float, compiles: bool
) -> None:
    monkeypatch.setitem(compilation.MIN_REMAINING_SECONDS, "cpu", min_seconds)
    predictor, pixels = loaded(batch_size=4, images=100), draw_pixels(4, 32)
    first = predictor.predict(pixels)["embedding"]
    predictor.predict(pixels[:1])
    assert predictor.describe() == "cpu, float32"
    predictor.predict(pixels)
    assert predictor.describe() == "cpu, float32" + ", compiled" * compiles
    np.testing.assert_allclose(predictor.predict(pixels)["embedding"], first, atol=1e-5)


@pytest.mark.parametrize(("model", "uses_graphs"), [(TINY, True), ("networks:branching", False)])
def test_a_network_with_graph_breaks_is_not_recorded(model: str, uses_graphs: bool) -> None:
    torch._dynamo.reset()
    predictor = loaded(model, batch_size=2)
    for lane in predictor.session.all_lanes:
        lane.uses_graphs = True
    predictor.session._compile()
    assert predictor.describe() == "cpu, float32, compiled"
    assert [lane.uses_graphs for lane in predictor.session.all_lanes] == [uses_graphs]


def test_a_lost_gpu_is_detected_while_nothing_is_recorded_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Embedder(model=TINY)
    assert not predictor.lost()
    predictor.load(Allotment())
    errors = [None, torch.AcceleratorError("CUDA error: an illegal memory access was encountered")]

    def synchronize() -> None:
        assert predictor.session.launch_lock._is_owned()
        if error := errors.pop(0):
            raise error

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert [predictor.lost(), predictor.lost()] == [False, True]
