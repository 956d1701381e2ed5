"""read → decode: tables of pixels."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import images
import numpy as np
import pillow_heif
import pyarrow as pa
import pytest
from PIL import Image
from whole import write_tar

from pipeline import schema
from pipeline.config import RunConfig
from pipeline.coverage import END
from pipeline.images.decode import decode
from pipeline.images.transform import Transform
from pipeline.images.values import Values
from pipeline.planning.archive import Archive
from pipeline.sources import ReadOptions
from pipeline.sources.shard import Shard
from pipeline.stages.load import Loader

TRANSFORM = Transform(resize=20, crop=16)


def tar_shard(path: Path, members: dict[str, bytes]) -> Shard:
    return Shard(7, "tar", str(write_tar(path, members)))


def loader(**settings: object) -> Loader:
    keep = {"cls": ("truth", pa.string())}
    values = {
        "max_pixels": 10**6,
        "exif_rotate": True,
        "exact": True,
        "keep_tiles": False,
        "rows_per_table": 4,
        "threads": 3,
        **settings,
    }
    return Loader(TRANSFORM, ReadOptions(keep=("cls",)), keep, **values)  # type: ignore[arg-type]


def test_tables_hold_every_row_and_the_end_of_the_shard(tmp_path: Path) -> None:
    data = {f"{i}.png": images.encode(images.tile("urban", i), "PNG") for i in range(9)}
    data["3.png"] = b""
    members = {**data, **{f"{i}.cls": str(i).encode() for i in range(9)}}
    tables = list(loader().load(tar_shard(tmp_path / "a.tar", members), ((0, END),)))
    assert [len(table) for table in tables] == [4, 4, 2]
    assert all(table.schema == schema.loaded({"truth": pa.string()}) for table in tables)
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["row"] for row in rows] == list(range(10))
    assert [row[schema.SHARD_ROWS] for row in rows] == [None] * 9 + [9]
    assert [row["truth"] for row in rows[:9]] == [str(i) for i in range(9)]
    assert {row["shard"] for row in rows} == {7}
    for row, (name, encoded) in zip(rows, data.items(), strict=False):
        assert row["image_id"] == f"{tmp_path}/a.tar#{name}"
        if encoded:
            pixels = np.frombuffer(row[schema.PIXELS], np.uint8).reshape(16, 16, 3)
            np.testing.assert_array_equal(pixels, decode(encoded, TRANSFORM).pixels)
            assert (row["width"], row["height"], row["size_bytes"]) == (64, 64, len(encoded))
        else:
            assert (row[schema.PIXELS], row["stage"], row["error_type"]) == (None, "decode", "empty")


def test_every_name_of_jpeg_2000_and_heif_is_read(tmp_path: Path) -> None:
    pillow_heif.register_heif_opener(thumbnails=False)
    drawn = images.tile("urban", 1, (16, 16))
    for suffix in ("jp2", "jpx", "jpf"):
        (tmp_path / f"a.{suffix}").write_bytes(images.encode(drawn, "JPEG2000"))
    for suffix in ("j2k", "j2c", "jpc"):
        (tmp_path / f"b.{suffix}").write_bytes(images.encode(drawn, "JPEG2000", no_jp2=True))
    for suffix in ("heic", "heif", "hif"):
        (tmp_path / f"c.{suffix}").write_bytes(images.encode(drawn, "HEIF", quality=-1, chroma=444))
    (shard,) = Archive(RunConfig(input=str(tmp_path), output="/o")).shards()
    rows = [row for table in loader(rows_per_table=20).load(shard, ((0, END),)) for row in table.to_pylist()][:-1]
    by_name = {Path(row["source"]).name: row for row in rows}
    assert len(by_name) == 9
    expected = decode(images.encode(drawn, "PNG"), TRANSFORM).pixels
    for name, row in by_name.items():
        pixels = np.frombuffer(row[schema.PIXELS], np.uint8).reshape(16, 16, 3)
        np.testing.assert_allclose(pixels, expected, atol=3 * name.startswith("c"))  # HEIF stores YCbCr


def test_the_end_of_a_tar_names_the_members_that_are_not_read(tmp_path: Path) -> None:
    members = {"0.png": images.encode(images.tile(), "PNG"), "0.cls": b"1", "notes.npy": b"", "a.json": b"{}"}
    (table,) = loader().load(tar_shard(tmp_path / "a.tar", members), ((0, END),))
    none, end = table[schema.SHARD_LEFT_OUT].to_pylist()
    assert (none, json.loads(end)) == (None, {".npy": 1, ".json": 1})


def test_images_of_one_colour_after_scaling_are_marked(tmp_path: Path) -> None:
    """Without --scale, and for photos of 8 bits, nothing is marked: a blank photo is what it is."""
    ramp = np.linspace(0, 1000, 32 * 32).reshape(32, 32)
    blank = images.encode(Image.new("RGB", (32, 32), "white"), "PNG")
    members = {
        **{"0.png": images.grey_16(ramp), "1.png": images.grey_16(ramp + 5000), "2.png": images.grey_16(ramp * 0 + 7)},
        **{"3.tif": images.float_tiff(ramp * np.nan), "4.tif": images.float_tiff(ramp), "5.png": blank, "6.png": b""},
    }
    shard = tar_shard(tmp_path / "a.tar", members)
    expected = [False, True, True, True, False, False, False, None]
    for scale, marks in (((0.0, 1000.0), expected), (None, [False] * 7 + [None])):
        tables = loader(values=Values(scale=scale)).load(shard, ((0, END),))
        assert [row[schema.CONSTANT] for table in tables for row in table.to_pylist()] == marks


@pytest.mark.parametrize(("images_", "rows"), [(8, [4, 5]), (9, [4, 4, 2]), (4, [5]), (3, [4])])
def test_the_end_of_a_shard_does_not_take_the_place_of_an_image(tmp_path: Path, images_: int, rows: list[int]) -> None:
    members = {f"{i}.png": images.encode(images.tile("urban", i), "PNG") for i in range(images_)}
    tables = list(loader().load(tar_shard(tmp_path / "a.tar", members), ((0, END),)))
    assert [len(table) for table in tables] == rows
    assert tables[-1][schema.SHARD_ROWS].to_pylist()[-1] == images_, "the last row, so that a batch is cut before it"


def test_settings_reach_the_decoder(tmp_path: Path) -> None:
    shard = tar_shard(tmp_path / "a.tar", {"a.jpg": images.oriented(6, size=(80, 60))})
    upright, as_stored = (
        pa.concat_tables(loader(exif_rotate=rotate).load(shard, ((0, END),)))[schema.PIXELS][0].as_py()
        for rotate in (True, False)
    )
    assert upright != as_stored
    small = pa.concat_tables(loader(max_pixels=100).load(shard, ((0, END),)))
    assert small["error_type"][0].as_py() == "too_large"


def test_an_empty_shard_is_only_its_end(tmp_path: Path) -> None:
    (table,) = loader().load(tar_shard(tmp_path / "a.tar", {"note.txt": b"x"}), ((0, END),))
    assert table[schema.SHARD_ROWS].to_pylist() == [0]
    assert table["image_id"].to_pylist() == [None]


def test_tiles_keep_their_size_if_the_network_enlarges_them(tmp_path: Path) -> None:
    sizes = [(8, 8), (30, 20), (8, 8), (4, 4), (9, 9)]
    members = {f"{i}.png": images.encode(images.tile(size=size), "PNG") for i, size in enumerate(sizes)}
    members["5.png"] = b"not an image"
    (table,) = loader(exact=False, keep_tiles=True, rows_per_table=9).load(
        tar_shard(tmp_path / "a.tar", members), ((0, END),)
    )
    lengths = [pixels and len(pixels) for pixels in table[schema.PIXELS].to_pylist()]
    assert lengths == [8 * 8 * 3, 16 * 16 * 3, 8 * 8 * 3, 4 * 4 * 3, 16 * 16 * 3, None, None]
    tile = np.asarray(images.tile(size=(8, 8)).convert("RGB"))
    assert table[schema.PIXELS][2].as_py() == tile.tobytes()


ROOT = Path(__file__).resolve().parents[2]
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
LOAD_ALL = """
import json, sys
from pathlib import Path
import pyarrow as pa
from pipeline import schema
from pipeline.images.transform import Transform
from pipeline.coverage import END
from pipeline.stages.load import Loader
from pipeline.sources.objects import LooseImages
from pipeline.sources.shard import Shard
from pipeline.sources import ReadOptions

def peak_bytes():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

folder, budget, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
loader = Loader(Transform(), ReadOptions(), {}, 200_000_000, True, False, False, 64, threads, budget)
before = peak_bytes()
keys = tuple(sorted(path.name for path in folder.iterdir()))
table = pa.concat_tables(loader.load(Shard(0, "objects", str(folder), payload=LooseImages(keys)), ((0, END),)))
means = [sum(pixels) / len(pixels) for pixels in table[schema.PIXELS].to_pylist() if pixels]
print(json.dumps({"means": means, "peak": peak_bytes() - before}))
"""


@pytest.fixture(scope="module")
def large_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve of 100 megapixels: PNGs, TIFFs of two kinds, progressive JPEGs."""
    folder = tmp_path_factory.mktemp("large")
    drawn = Image.new("RGB", (10_000, 10_000), (90, 90, 90))
    first = {
        "a.png": images.encode(drawn, "PNG", compress_level=1),
        "b.tif": images.encode(drawn, "TIFF", compression="tiff_lzw"),
        "c.tif": images.encode(drawn.convert("L"), "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 2}),
        "d.jpg": images.encode(drawn, "JPEG", progressive=True),
    }
    for name, data in first.items():
        (folder / name).write_bytes(data)
        for copy in range(2):
            os.link(folder / name, folder / f"{copy}{name}")
    return folder


def load_apart(folder: Path, budget: int, threads: int) -> dict[str, Any]:
    """Load all images of a folder in another process: their mean values, and the peak memory in bytes."""
    arguments = [sys.executable, "-c", LOAD_ALL, str(folder), str(budget), str(threads)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@ON_LINUX
@pytest.mark.slow
@pytest.mark.parametrize(("budget", "most"), [(1 << 20, 640 << 20), (1000 << 20, 1040 << 20)])
def test_large_images_stay_within_the_budget_with_many_threads(large_images: Path, budget: int, most: int) -> None:
    """most: the budget or one image (6 bytes per pixel of a JPEG), whichever is larger; plus 40 MB."""
    found = load_apart(large_images, budget, threads=8)
    assert found["means"] == pytest.approx([90] * 12, abs=1)
    assert found["peak"] <= most


@ON_LINUX
def test_encoded_images_do_not_wait_for_their_table(tmp_path: Path) -> None:
    data = images.encode(Image.effect_noise((2000, 2000), 90), "TIFF")
    (tmp_path / "00.tif").write_bytes(data)
    for number in range(1, 40):
        os.link(tmp_path / "00.tif", tmp_path / f"{number:02}.tif")
    found = load_apart(tmp_path, 1 << 30, threads=1)
    assert len(found["means"]) == 40
    assert found["peak"] < 25 * len(data), "a reader and a decoder hold four images each"
