"""JPEGs for a GPU: which are left encoded, their pixels, and images that fail alone. The device here is the CPU."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import images
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from servers import RayCluster, start_ray_head, stop_ray_head
from whole import TINY, Jobs, write_folder, write_tar

from jobs.bench import fidelity
from jobs.bench.harness.archives import encoded_photo
from pipeline import schema
from pipeline.coverage import END
from pipeline.errors import SettingRefused
from pipeline.images.decode import decode, leave_encoded
from pipeline.images.pixels import Encoded
from pipeline.images.transform import Transform
from pipeline.inference import jpeg
from pipeline.inference.jpeg import JpegDecoder
from pipeline.predictors.base import Allotment, Predictor
from pipeline.predictors.embed import Embedder
from pipeline.sources import ReadOptions
from pipeline.sources.shard import Shard
from pipeline.stages import load as loading
from pipeline.stages.load import Loader
from pipeline.stages.predict import Predict

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = Transform(resize=48, crop=40)


def photo(width: int, height: int, seed: int = 0, **settings: object) -> bytes:
    return images.encode(images.tile("urban", seed, (width, height)), "JPEG", quality=90, **settings)


def left(data: bytes, transform: Transform = SMALL) -> Encoded:
    encoded = leave_encoded(data, transform)
    assert encoded is not None
    return encoded


def broken_tables(data: bytes) -> bytes:
    """A JPEG with invalid Huffman tables, and a valid header and end."""
    start = data.index(b"\xff\xc4") + 5
    return data[:start] + b"\xff" * 16 + data[start + 16 :]


# Which images are left encoded


@pytest.mark.parametrize(
    ("data", "is_left"),
    [
        (photo(80, 60), True),
        (photo(80, 60, progressive=True), True),
        (images.encode(images.tile().convert("L")), True),
        (images.encode(images.tile(), "MPO", save_all=True, append_images=[images.tile("water")]), True),
        (images.encode(images.tile().convert("CMYK")), False),
        (photo(80, 60, keep_rgb=True), False),
        (images.encode(images.tile(), "PNG"), False),
        (photo(80, 60) + b"what a telephone appends", False),
        (images.truncated(), False),
        (images.broken_exif(), True),
        (images.text(), False),
        (photo(200, SMALL.resize - 1), False),
        (photo(SMALL.resize, 200), True),
    ],
    ids=["JPEG", "progressive", "grey", "MPO", "CMYK", "RGB", "PNG", "more", "cut", "EXIF", "text", "small", "just"],
)
def test_jpegs_are_left_encoded(data: bytes, is_left: bool) -> None:
    encoded = leave_encoded(data, SMALL)
    assert (encoded is not None) == is_left
    if encoded:
        decoded = decode(data, SMALL)
        assert (encoded.data, encoded.width, encoded.height) == (data, decoded.width, decoded.height)


def test_images_that_decode_refuses_are_not_left_encoded() -> None:
    assert leave_encoded(photo(80, 60), SMALL, max_pixels=80 * 60 - 1) is None
    scans = photo(80, 60).replace(b"\xff\xda", b"\xff\xda\0\x08\1" * 60, 1)
    assert leave_encoded(scans, SMALL, max_pixels=80 * 60 * 2) is None


def test_exif_orientation_is_read_only_on_request() -> None:
    data = images.oriented(6)
    assert left(data).orientation == 6
    as_stored = leave_encoded(data, SMALL, exif_rotate=False)
    assert as_stored is not None
    assert as_stored.orientation == 1
    assert left(images.oriented(9)).orientation == 1


# Pixels


@pytest.mark.parametrize(("interpolation", "squash"), [("bilinear", False), ("bicubic", False), ("bicubic", True)])
def test_pixels_are_those_of_decode_within_rounding(interpolation: str, squash: bool) -> None:
    transform = Transform(resize=48, crop=40, interpolation=interpolation, squash=squash)
    sizes = [(80, 60), (60, 80), (80, 60), (48, 200), (49, 48), (300, 211), (80, 60)]
    files = [photo(*size, seed=seed) for seed, size in enumerate(sizes)]
    files += [images.oriented(orientation, size=(90, 61)) for orientation in range(1, 9)]
    files += [images.encode(images.tile("field", size=(70, 50)).convert("L"))]
    pixels, errors = JpegDecoder(transform, CPU)([left(data, transform) for data in files])
    assert (pixels.shape, pixels.dtype, errors) == ((len(files), 40, 40, 3), torch.uint8, {})
    expected = np.stack([decode(data, transform).pixels for data in files])
    difference = np.abs(pixels.numpy().astype(int) - expected)
    assert difference.max() <= 2, "Pillow rounds between its two passes"
    assert difference.mean() < 0.3


def test_a_batch_is_decoded_in_pieces_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    jpegs = [left(photo(80 + 8 * (i % 3), 60, seed=i)) for i in range(9)]
    whole, _ = JpegDecoder(SMALL, CPU)(jpegs)
    monkeypatch.setattr(jpeg, "DECODED_BYTES", 2 * 88 * 60 * 3)
    sizes = [len(piece) for piece in jpeg._pieces(jpegs)]
    assert sum(sizes) == 9
    assert max(sizes) == 2
    assert torch.equal(JpegDecoder(SMALL, CPU)(jpegs)[0], whole)
    monkeypatch.setattr(jpeg, "DECODED_BYTES", 1)
    assert len(list(jpeg._pieces(jpegs))) == 9


def test_only_the_image_that_the_device_cannot_decode_is_decoded_on_the_cpu() -> None:
    """The size in one header is not that of the decoded image, so the call fails. The device decodes the others."""
    files = [photo(80, 60, seed=i) for i in range(7)]
    jpegs = [left(data) for data in files]
    jpegs[4] = Encoded(files[4], 81, 60, 1)
    pixels, errors = JpegDecoder(SMALL, CPU)(jpegs)
    assert errors == {}
    on_cpu = decode(files[4], SMALL, exact=False).pixels
    assert np.array_equal(pixels[4].numpy(), on_cpu)
    expected, _ = JpegDecoder(SMALL, CPU)([left(data) for data in files])
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(pixels[others], expected[others])


def test_an_error_that_is_not_the_devices_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = JpegDecoder(SMALL, CPU)
    monkeypatch.setattr(decoder, "_decode", lambda jpegs: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        decoder([left(photo(80, 60, seed=i)) for i in range(3)])


def test_an_image_that_the_cpu_cannot_decode_either_is_an_error() -> None:
    files = [photo(80, 60, seed=i) for i in range(5)]
    bad = [broken_tables(files[1]), broken_tables(files[3])]
    jpegs = [left(data) for data in (files[0], bad[0], files[2], bad[1], files[4])]
    pixels, errors = JpegDecoder(SMALL, CPU)(jpegs)
    assert {index: error.error_type for index, error in errors.items()} == {1: "corrupt", 3: "corrupt"}
    expected, _ = JpegDecoder(SMALL, CPU)([jpegs[0], jpegs[2], jpegs[4]])
    assert torch.equal(pixels, expected)
    pixels, errors = JpegDecoder(SMALL, CPU)([jpegs[1]])
    assert (len(pixels), list(errors)) == (0, [0])


def test_each_call_of_the_device_waits_for_kernels_that_still_read_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, calls, decode_jpeg = JpegDecoder(SMALL, CPU), [], jpeg.torchvision.io.decode_jpeg

    def recorded(encoded: list[torch.Tensor], *settings: object, **more: object) -> list[torch.Tensor]:
        calls.append(len(encoded))
        return decode_jpeg(encoded, *settings, **more)

    monkeypatch.setattr(jpeg.torchvision.io, "decode_jpeg", recorded)
    monkeypatch.setattr(jpeg, "synchronize", lambda device: calls.append(device.type))
    monkeypatch.setattr(jpeg, "DECODED_BYTES", 2 * 80 * 60 * 3)
    decoder([left(photo(80, 60, seed=i)) for i in range(5)])
    assert calls == ["cpu", 2, "cpu", 2, "cpu", 1]


class Stream:
    """A stand-in for a CUDA stream; records the streams that it waits for."""

    def __init__(self, _: object = None) -> None:
        self.waits_for: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waits_for.append(other)


class OnDevice:
    """A stand-in for pixels in a GPU's memory."""

    def __init__(self) -> None:
        self.used_by: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.used_by.append(stream)


def test_each_thread_decodes_on_its_own_stream_and_the_callers_stream_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder, caller, entered = JpegDecoder(SMALL, CPU), Stream(), []
    decoder.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(entered.append(stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: caller)
    monkeypatch.setattr(decoder, "_decode_all", lambda jpegs: (OnDevice(), {}))
    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            for pixels, _ in thread.map(decoder, [[], []]):
                assert pixels.used_by == [caller]
    assert entered == caller.waits_for
    first, again, other, other_again = entered
    assert first is again
    assert other is other_again
    assert first is not other


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_cannot_decode_is_refused() -> None:
    message = r"--decoder gpu: torchvision \S+ cannot decode JPEGs on cuda: .*use --decoder fast"
    with pytest.raises(SettingRefused, match=message):
        JpegDecoder(SMALL, torch.device("cuda"))


def test_a_device_that_decodes_wrong_colours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(jpeg.PROBE_COLOURS, "RGB", (200, 60, 50))
    JpegDecoder(SMALL, CPU)
    monkeypatch.setattr(jpeg, "rotate", lambda pixels, _: pixels.flip(1))  # BGR
    with pytest.raises(SettingRefused, match="was decoded to"):
        JpegDecoder(SMALL, CPU)


def test_embeddings_are_close_to_the_reference(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.jpg" for seed in range(6)]
    for seed, path in enumerate(paths):
        path.write_bytes(encoded_photo(seed))
    embeddings = fidelity.embeddings(paths, "resnet18", "random", "float32", "gpu")
    compared = fidelity.compare(embeddings, fidelity.reference(paths, "resnet18", "random"))
    assert compared.median < 0.03
    assert compared.worst < 0.06


# From a shard to rows


def shard_of_all_kinds(folder: Path) -> Shard:
    files = {f"{i:02d}.jpg": photo(50 + i % 3, 44, seed=i) for i in range(10)}
    files["03.jpg"] = images.encode(images.tile("water"), "PNG")
    files["05.jpg"] = b""
    files["06.jpg"] = broken_tables(files["06.jpg"])
    files["08.jpg"] = images.oriented(8)
    return Shard(0, "tar", str(write_tar(folder / "a.tar", files)))


def loaded(shard: Shard, predictor: Predictor, **settings: bool) -> pa.Table:
    loader = Loader(predictor.transform, ReadOptions(), {}, 10**6, True, False, False, 32, 2, **settings)
    return pa.concat_tables(loader.load(shard, ((0, END),)))


@pytest.fixture(scope="module")
def tiny() -> Embedder:
    predictor = Embedder(model="tiny:network", weights="random", precision="float32")
    predictor.prepare()
    assert predictor.takes_encoded
    return predictor


def test_a_shard_of_all_kinds_gives_the_same_rows_as_on_the_cpu(tmp_path: Path, tiny: Embedder) -> None:
    shard = shard_of_all_kinds(tmp_path)
    encoded = loaded(shard, tiny, leave_jpegs=True)
    is_jpeg = encoded[schema.ORIENTATION].is_valid().to_pylist()
    assert is_jpeg == [True, True, True, False, True, False, True, True, True, True, False]
    assert encoded[schema.ORIENTATION][8].as_py() == 8
    predict = Predict(tiny, {}, Allotment())
    rows, expected = predict(encoded).to_pylist(), predict(loaded(shard, tiny)).to_pylist()
    for row, on_cpu in zip(rows, expected, strict=True):
        for name in ("image_id", "row", "stage", "error_type", "shard_rows"):
            assert row[name] == on_cpu[name], name
        if on_cpu["embedding"] is None:
            assert row["embedding"] is None
        else:
            assert (row["width"], row["height"]) == (on_cpu["width"], on_cpu["height"])
            np.testing.assert_allclose(row["embedding"], on_cpu["embedding"], atol=0.02)
    assert [row["error_type"] for row in rows if row["stage"]] == ["empty", "corrupt"]
    halves = [predict(encoded.slice(*cut)).to_pylist() for cut in ((0, 6), (6, 5))]
    assert [row["embedding"] for half in halves for row in half] == [row["embedding"] for row in rows]


def test_a_batch_of_only_broken_jpegs(tmp_path: Path, tiny: Embedder) -> None:
    shard = Shard(0, "tar", str(write_tar(tmp_path / "a.tar", {"a.jpg": broken_tables(photo(50, 44))})))
    (row, _) = Predict(tiny, {}, Allotment())(loaded(shard, tiny, leave_jpegs=True)).to_pylist()
    assert (row["stage"], row["error_type"], row["embedding"], row["width"]) == ("decode", "corrupt", None, 50)


def test_jpegs_that_wait_for_the_gpu_take_bounded_memory(
    tmp_path: Path, tiny: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{i}.jpg": photo(50, 44, seed=i) for i in range(6)}
    shard = Shard(0, "tar", str(write_tar(tmp_path / "a.tar", files)))
    largest = max(map(len, files.values()))
    loader = Loader(tiny.transform, ReadOptions(), {}, 10**6, True, False, False, 32, 2, leave_jpegs=True)
    monkeypatch.setattr(loading, "ENCODED_TABLE_BYTES", 2 * largest + 1)
    lengths = [len(table) for table in loader.load(shard, ((0, END),))]
    assert sum(lengths) == 7
    assert max(lengths) in (3, 4)
    monkeypatch.setattr(loading, "ENCODED_BATCH_BYTES", 32 * (largest - 1))
    kinds = [kind for table in loader.load(shard, ((0, END),)) for kind in table[schema.ORIENTATION].to_pylist()]
    assert kinds.count(1) == sum(len(data) < largest for data in files.values())


def test_a_predictor_takes_no_jpegs_by_default() -> None:
    assert not Predictor.takes_encoded
    with pytest.raises(NotImplementedError, match="has no decode"):
        Predictor().decode([])


# Whole jobs


@pytest.fixture(scope="module")
def gpu_jobs() -> Iterator[Jobs]:
    """A cluster that claims to have a GPU. The network finds none and runs on the CPU."""
    environment = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}"}
    process, cluster = start_ray_head(environment, gpus=1)
    try:
        yield Jobs({**environment, "RAY_ADDRESS": cluster.address})
    finally:
        stop_ray_head(process)


@pytest.mark.slow
def test_a_job_decodes_jpegs_in_the_actors(gpu_jobs: Jobs, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 40)
    (folder / "0007.jpg").write_bytes(broken_tables((folder / "0007.jpg").read_bytes()))
    (folder / "0008.jpg").write_bytes(images.encode(images.tile("water"), "PNG"))
    for decoder in ("fast", "gpu"):
        settings = ("--decoder", decoder, "--actors", 2, "--gpus-per-actor", 0.5, "--batch-size", 16)
        gpu_jobs.run("embed", "--input", folder, "--output", tmp_path / decoder, *TINY, *settings)
    fast, gpu = (pd.read_parquet(tmp_path / decoder).sort_values("image_id") for decoder in ("fast", "gpu"))
    assert list(gpu["image_id"]) == list(fast["image_id"])
    assert len(gpu) == 39
    np.testing.assert_allclose(np.stack(gpu["embedding"]), np.stack(fast["embedding"]), atol=0.02)
    assert not np.array_equal(np.stack(gpu["embedding"]), np.stack(fast["embedding"])), "the loader has decoded them"
    (error,) = pd.read_parquet(tmp_path / "gpu" / "_errors").to_dict("records")
    assert (error["row"], error["stage"], error["error_type"]) == (7, "decode", "corrupt")
    gpu_jobs.run("verify", tmp_path / "gpu")


@pytest.mark.slow
def test_without_a_gpu_it_is_refused_before_anything_is_written(ray_cluster: RayCluster, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 2)
    arguments = ("--input", folder, "--output", tmp_path / "out", *TINY)
    done = Jobs(ray_cluster.environment).run("embed", *arguments, "--decoder", "gpu", code=2)
    assert "--decoder gpu" in done.stderr
    assert "use --decoder fast" in done.stderr
    Jobs(ray_cluster.environment).run("embed", *arguments)
