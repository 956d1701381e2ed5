"""How a network runs on a GPU, which stand-ins take the part of: batches, lanes, memory, recordings."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import TINY, draw_pixels

from pipeline import network as network_module
from pipeline.errors import SettingRefused
from pipeline.gpu import GPU_SIZES, choose_device, evenly, images_that_fit, refused_by_gpu, rounded_up
from pipeline.lane import Lane, finish
from pipeline.network import NetworkRunner
from pipeline.predictors import Embedder

pytestmark = pytest.mark.usefixtures("own_caches")

GPU = torch.device("cuda")


@pytest.fixture
def runner() -> NetworkRunner:
    """On the CPU, with the lanes of a GPU."""
    predictor = Embedder(model=TINY, precision="float32")
    predictor.gpu_share = 0.5
    return predictor.runner


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


@pytest.mark.parametrize(("model", "records"), [(TINY, True), ("networks:branching", False)])
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
