"""JPEGs that a GPU decodes: which are left to it, what comes out, and what fails alone. Here the device is the CPU."""

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
from conftest import RayCluster, start_ray_head, stop_ray_head
from whole import TINY, Jobs, write_folder, write_tar

from jobs import fidelity
from jobs.bench.archives import encoded_photo
from pipeline import gpu_decode, loader, schema
from pipeline.config import Transform
from pipeline.coverage import END
from pipeline.decode import Encoded, decode, leave_encoded
from pipeline.errors import SettingRefused
from pipeline.gpu_decode import JpegDecoder
from pipeline.loader import Loader
from pipeline.plan import Shard
from pipeline.predict import Predict
from pipeline.predictors import Embedder, Predictor
from pipeline.sources import ReadOptions

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SMALL = Transform(resize=48, crop=40)


def photo(width: int, height: int, seed: int = 0, **settings: object) -> bytes:
    return images.encode(images.tile("urban", seed, (width, height)), "JPEG", quality=90, **settings)


def left(data: bytes, transform: Transform = SMALL) -> Encoded:
    found = leave_encoded(data, transform)
    assert found is not None
    return found


def broken_tables(data: bytes) -> bytes:
    """A JPEG whose Huffman tables are none, and whose header and end are as they should be."""
    start = data.index(b"\xff\xc4") + 5
    return data[:start] + b"\xff" * 16 + data[start + 16 :]


# What is left to the GPU


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
def test_what_is_left_encoded(data: bytes, is_left: bool) -> None:
    found = leave_encoded(data, SMALL)
    assert (found is not None) == is_left
    if found:
        decoded = decode(data, SMALL)
        assert (found.data, found.width, found.height) == (data, decoded.width, decoded.height)


def test_what_decode_refuses_is_not_left() -> None:
    assert leave_encoded(photo(80, 60), SMALL, max_pixels=80 * 60 - 1) is None
    scans = photo(80, 60).replace(b"\xff\xda", b"\xff\xda\0\x08\1" * 60, 1)
    assert leave_encoded(scans, SMALL, max_pixels=80 * 60 * 2) is None


def test_exif_turns_only_where_that_is_asked_for() -> None:
    data = images.oriented(6)
    assert left(data).orientation == 6
    unturned = leave_encoded(data, SMALL, exif_rotate=False)
    assert unturned is not None
    assert unturned.orientation == 1
    assert left(images.oriented(9)).orientation == 1


# What comes out


@pytest.mark.parametrize(("interpolation", "squash"), [("bilinear", False), ("bicubic", False), ("bicubic", True)])
def test_pixels_are_those_of_decode_within_rounding(interpolation: str, squash: bool) -> None:
    transform = Transform(resize=48, crop=40, interpolation=interpolation, squash=squash)
    sizes = [(80, 60), (60, 80), (80, 60), (48, 200), (49, 48), (300, 211), (80, 60)]
    files = [photo(*size, seed=seed) for seed, size in enumerate(sizes)]
    files += [images.oriented(orientation, size=(90, 61)) for orientation in range(1, 9)]
    files += [images.encode(images.tile("field", size=(70, 50)).convert("L"))]
    found, errors = JpegDecoder(transform, CPU)([left(data, transform) for data in files])
    assert (found.shape, found.dtype, errors) == ((len(files), 40, 40, 3), torch.uint8, {})
    expected = np.stack([decode(data, transform).pixels for data in files])
    apart = np.abs(found.numpy().astype(int) - expected)
    assert apart.max() <= 2, "Pillow rounds between its two passes"
    assert apart.mean() < 0.3


def test_a_batch_is_decoded_in_pieces_of_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    jpegs = [left(photo(80 + 8 * (i % 3), 60, seed=i)) for i in range(9)]
    whole, _ = JpegDecoder(SMALL, CPU)(jpegs)
    monkeypatch.setattr(gpu_decode, "DECODED_BYTES", 2 * 88 * 60 * 3)
    sizes = [piece.stop - piece.start for piece in gpu_decode._pieces(jpegs)]
    assert sum(sizes) == 9
    assert max(sizes) == 2
    assert torch.equal(JpegDecoder(SMALL, CPU)(jpegs)[0], whole)
    monkeypatch.setattr(gpu_decode, "DECODED_BYTES", 1)
    assert len(list(gpu_decode._pieces(jpegs))) == 9


def test_an_image_that_the_device_cannot_decode_goes_to_the_cpu_alone() -> None:
    """Its header says another size than the device finds: the call fails, the other images stay the device's."""
    files = [photo(80, 60, seed=i) for i in range(7)]
    jpegs = [left(data) for data in files]
    jpegs[4] = Encoded(files[4], 81, 60, 1)
    found, errors = JpegDecoder(SMALL, CPU)(jpegs)
    assert errors == {}
    on_cpu = decode(files[4], SMALL, exact=False).pixels
    assert np.array_equal(found[4].numpy(), on_cpu)
    alone, _ = JpegDecoder(SMALL, CPU)([left(data) for data in files])
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(found[others], alone[others])


def test_an_image_that_nobody_can_decode_is_an_error() -> None:
    files = [photo(80, 60, seed=i) for i in range(5)]
    bad = [broken_tables(files[1]), broken_tables(files[3])]
    jpegs = [left(data) for data in (files[0], bad[0], files[2], bad[1], files[4])]
    found, errors = JpegDecoder(SMALL, CPU)(jpegs)
    assert {place: error.error_type for place, error in errors.items()} == {1: "corrupt", 3: "corrupt"}
    expected, _ = JpegDecoder(SMALL, CPU)([jpegs[0], jpegs[2], jpegs[4]])
    assert torch.equal(found, expected)
    nothing, errors = JpegDecoder(SMALL, CPU)([jpegs[1]])
    assert (len(nothing), list(errors)) == (0, [0])


def test_each_call_of_the_device_waits_for_what_still_reads_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, calls, decode_jpeg = JpegDecoder(SMALL, CPU), [], gpu_decode.torchvision.io.decode_jpeg

    def recorded(encoded: list[torch.Tensor], *settings: object, **more: object) -> list[torch.Tensor]:
        calls.append(len(encoded))
        return decode_jpeg(encoded, *settings, **more)

    monkeypatch.setattr(gpu_decode.torchvision.io, "decode_jpeg", recorded)
    monkeypatch.setattr(gpu_decode, "finish", lambda device: calls.append(device.type))
    monkeypatch.setattr(gpu_decode, "DECODED_BYTES", 2 * 80 * 60 * 3)
    decoder([left(photo(80, 60, seed=i)) for i in range(5)])
    assert calls == ["cpu", 2, "cpu", 2, "cpu", 1]


class Stream:
    """Stands for one of a GPU; knows whom it waits for."""

    def __init__(self, _: object = None) -> None:
        self.waits_for: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waits_for.append(other)


class OnDevice:
    """Stands for pixels in a GPU's memory."""

    def __init__(self) -> None:
        self.used_by: list[Stream] = []

    def record_stream(self, stream: Stream) -> None:
        self.used_by.append(stream)


def test_threads_decode_on_streams_of_their_own_which_the_callers_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, caller, entered = JpegDecoder(SMALL, CPU), Stream(), []
    decoder.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(entered.append(stream)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: caller)
    monkeypatch.setattr(decoder, "_all", lambda jpegs: (OnDevice(), {}))
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
def test_a_device_that_decodes_nothing_is_refused() -> None:
    with pytest.raises(SettingRefused, match=r"--decoder gpu: torchvision \S+ decodes no JPEG on cuda: .*take --decod"):
        JpegDecoder(SMALL, torch.device("cuda"))


def test_colours_that_do_not_come_back_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_decode.PROBE_COLOURS, "RGB", (200, 60, 50))
    JpegDecoder(SMALL, CPU)
    monkeypatch.setattr(gpu_decode, "turned", lambda pixels, _: pixels.flip(1))  # BGR
    with pytest.raises(SettingRefused, match="comes back as"):
        JpegDecoder(SMALL, CPU)


def test_embeddings_are_as_near_the_reference_as_the_defaults(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.jpg" for seed in range(6)]
    for seed, path in enumerate(paths):
        path.write_bytes(encoded_photo(seed))
    found = fidelity.embeddings(paths, "resnet18", "random", "float32", "gpu")
    compared = fidelity.compare(found, fidelity.reference(paths, "resnet18", "random"))
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


def test_a_shard_of_all_kinds_gives_the_rows_that_it_gives_on_the_cpu(tmp_path: Path, tiny: Embedder) -> None:
    shard = shard_of_all_kinds(tmp_path)
    encoded = loaded(shard, tiny, leave_jpegs=True)
    is_jpeg = encoded[schema.ORIENTATION].is_valid().to_pylist()
    assert is_jpeg == [True, True, True, False, True, False, True, True, True, True, False]
    assert encoded[schema.ORIENTATION][8].as_py() == 8
    predict = Predict(tiny, {})
    found, expected = predict(encoded).to_pylist(), predict(loaded(shard, tiny)).to_pylist()
    for row, wanted in zip(found, expected, strict=True):
        for name in ("image_id", "row", "stage", "error_type", "shard_rows"):
            assert row[name] == wanted[name], name
        if wanted["embedding"] is None:
            assert row["embedding"] is None
        else:
            assert (row["width"], row["height"]) == (wanted["width"], wanted["height"])
            np.testing.assert_allclose(row["embedding"], wanted["embedding"], atol=0.02)
    assert [row["error_type"] for row in found if row["stage"]] == ["empty", "corrupt"]
    halves = [predict(encoded.slice(*cut)).to_pylist() for cut in ((0, 6), (6, 5))]
    assert [row["embedding"] for half in halves for row in half] == [row["embedding"] for row in found]


def test_only_jpegs_that_cannot_be_decoded(tmp_path: Path, tiny: Embedder) -> None:
    shard = Shard(0, "tar", str(write_tar(tmp_path / "a.tar", {"a.jpg": broken_tables(photo(50, 44))})))
    (row, _) = Predict(tiny, {})(loaded(shard, tiny, leave_jpegs=True)).to_pylist()
    assert (row["stage"], row["error_type"], row["embedding"], row["width"]) == ("decode", "corrupt", None, 50)


def test_what_waits_for_the_gpu_is_bounded(tmp_path: Path, tiny: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"{i}.jpg": photo(50, 44, seed=i) for i in range(6)}
    shard = Shard(0, "tar", str(write_tar(tmp_path / "a.tar", files)))
    largest = max(map(len, files.values()))
    made = Loader(tiny.transform, ReadOptions(), {}, 10**6, True, False, False, 32, 2, leave_jpegs=True)
    monkeypatch.setattr(loader, "LEFT_TABLE_BYTES", 2 * largest + 1)
    lengths = [len(table) for table in made.load(shard, ((0, END),))]
    assert sum(lengths) == 7
    assert max(lengths) in (3, 4)
    monkeypatch.setattr(loader, "LEFT_BATCH_BYTES", 32 * (largest - 1))
    kinds = [kind for table in made.load(shard, ((0, END),)) for kind in table[schema.ORIENTATION].to_pylist()]
    assert kinds.count(1) == sum(len(data) < largest for data in files.values())


def test_predictors_of_ones_own_are_given_pixels() -> None:
    assert not Predictor.takes_encoded
    with pytest.raises(NotImplementedError, match="has no decode"):
        Predictor().decode([])


# Whole jobs


@pytest.fixture(scope="module")
def gpu_jobs() -> Iterator[Jobs]:
    """A cluster that says it has a GPU; the network, which finds none, runs on the CPU."""
    environment = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    process, cluster = start_ray_head(environment, gpus=1)
    try:
        yield Jobs({**environment, "RAY_ADDRESS": cluster.address})
    finally:
        stop_ray_head(process)


@pytest.mark.slow
def test_a_job_whose_jpegs_are_decoded_by_the_actors(gpu_jobs: Jobs, tmp_path: Path) -> None:
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
    assert not np.array_equal(np.stack(gpu["embedding"]), np.stack(fast["embedding"])), "it was not the loader's work"
    (error,) = pd.read_parquet(tmp_path / "gpu" / "_errors").to_dict("records")
    assert (error["row"], error["stage"], error["error_type"]) == (7, "decode", "corrupt")
    gpu_jobs.run("verify", tmp_path / "gpu")


@pytest.mark.slow
def test_without_a_gpu_it_is_refused_before_anything_is_written(ray_cluster: RayCluster, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 2)
    given = ("--input", folder, "--output", tmp_path / "out", *TINY)
    done = Jobs(ray_cluster.environment).run("embed", *given, "--decoder", "gpu", code=2)
    assert "--decoder gpu" in done.stderr
    assert "take --decoder fast" in done.stderr
    Jobs(ray_cluster.environment).run("embed", *given)
