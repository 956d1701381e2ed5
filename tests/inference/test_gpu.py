"""The choice of a device, batch sizes for a GPU's memory, and the errors of a GPU as settings."""

from pathlib import Path

import pytest
import torch
from networks import TINY

from pipeline.errors import SettingRefused
from pipeline.inference.gpu import (
    MAX_DISTINCT_SIZES,
    choose_device,
    even_batch_size,
    images_that_fit,
    padded_batch_size,
    refused_by_gpu,
)
from pipeline.predictors.base import Allotment
from pipeline.predictors.embed import Embedder

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("free_bytes", "image_bytes", "lanes", "images"),
    [(10 << 30, 10 << 20, 1, 819), (10 << 30, 10 << 20, 2, 409), (1 << 20, 10 << 20, 2, 1), (1 << 20, 0, 1, 838860)],
)
def test_batch_size_follows_free_memory(free_bytes: int, image_bytes: int, lanes: int, images: int) -> None:
    assert images_that_fit(free_bytes, image_bytes, lanes) == images


@pytest.mark.parametrize(("images", "max_size", "size"), [(256, 256, 256), (256, 255, 128), (256, 100, 86), (8, 1, 1)])
def test_a_batch_is_split_into_even_pieces(images: int, max_size: int, size: int) -> None:
    assert even_batch_size(images, max_size) == size


@pytest.mark.parametrize("batch_size", [1, 5, 8, 9, 100, 256])
def test_a_gpu_gets_few_batch_sizes(batch_size: int) -> None:
    sizes = [padded_batch_size(images, batch_size) for images in range(1, batch_size + 1)]
    assert all(images <= size <= batch_size for images, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= MAX_DISTINCT_SIZES
    assert sizes[-1] == batch_size
    assert padded_batch_size(batch_size + 3, batch_size) == batch_size + 3, "another thread has reduced the batch size"


@pytest.mark.parametrize(
    ("share", "is_available", "device"),
    [(None, True, "cuda"), (0.5, True, "cuda"), (0.0, True, "cpu"), (None, False, "cpu")],
)
def test_the_device_follows_the_gpu_share(
    monkeypatch: pytest.MonkeyPatch, share: float | None, is_available: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    assert choose_device(share).type == device


@pytest.mark.usefixtures("own_caches")
def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("pipeline.inference.gpu.DRIVER_FILE", str(tmp_path))
    predictor = Embedder(model=TINY)
    message = r"--gpus-per-actor is 0\.5, but torch \S+ for CUDA .* cannot use the GPU of .* use --gpus-per-actor 0"
    with pytest.raises(SettingRefused, match=message):
        predictor.load(Allotment(gpu_share=0.5))
    predictor.load(Allotment(gpu_share=0.0))
    monkeypatch.setattr("pipeline.inference.gpu.DRIVER_FILE", str(tmp_path / "none"))
    predictor.load(Allotment(gpu_share=0.5))


@pytest.mark.parametrize(
    "message", ["CUDA out of memory.", "CUDA error: no kernel image is available for execution on the device"]
)
def test_a_network_that_a_gpu_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with (
        pytest.raises(SettingRefused, match=r"\(Tesla V100, 1024 of 16384 MiB free\) cannot run this network: CUDA"),
        refused_by_gpu(GPU),
    ):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="illegal"), refused_by_gpu(GPU):
        raise RuntimeError("CUDA error: an illegal memory access")
    with pytest.raises(RuntimeError, match="out of memory"), refused_by_gpu(torch.device("cpu")):
        raise RuntimeError("out of memory")
