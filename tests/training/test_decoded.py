"""Decoded images: windows of scenes, tiles of an archive, and what is decoded again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes
from tile_archives import tile_image, write_mbtiles

from pipeline.config import RunConfig
from pipeline.errors import SettingRefused
from pipeline.predictors.embed import Embedder
from pipeline.training.decoded import DecodedImages, decode_images, open_pixels


def decode(folder: Path, source: Path, said: list[str] | None = None, fits: Any = None, **run: Any) -> DecodedImages:
    network = Embedder(model="tiny:network", weights="DEFAULT", resize=32, crop=32)
    network.prepare()
    network.takes_tiles = False
    folder.mkdir(exist_ok=True)
    config = RunConfig(input=str(source), output=str(folder), **run)
    return decode_images(config, network, folder, fits, ([] if said is None else said).append)


def test_windows_of_a_scene(tmp_path: Path) -> None:
    array = scenes.numbers(3, 96, 64, "uint16")
    array[:, 64:, 32:] = 0
    scenes.write(tmp_path / "in/a.tif", array, nodata=0)
    images = decode(tmp_path / "out", tmp_path / "in", tile_size=32, scale="0:10000")
    assert (images.rows, images.empty, len(images.failed)) == (5, 1, 0)
    pixels = open_pixels(images.file, images.shape, images.dtype)
    rows = images.table.to_pylist()
    for row, window in zip(rows, pixels, strict=True):
        top, left = row["window_row"], row["window_col"]
        own = array[:, top : top + 32, left : left + 32].transpose(1, 2, 0)
        assert np.abs(window.astype(float) - own.astype(float) * 255 / 10_000).max() <= 0.51
    assert images.config.scale_range() == (0, 10_000)


def test_tiles_with_the_same_bytes_are_images_of_their_own(tmp_path: Path) -> None:
    sea = tile_image(0, side=32)
    tiles: dict[Any, bytes | None] = {
        (3, x, y): sea if y < 3 else tile_image(8 * x + y, side=32) for x in range(2) for y in range(4)
    }
    path = write_mbtiles(tmp_path / "map.mbtiles", tiles, "map")
    images = decode(tmp_path / "out", path, fits=lambda name: not name.endswith("/0"))
    assert images.rows == 6
    pixels = open_pixels(images.file, images.shape, images.dtype)
    by_place = {(r["tile_x"], r["tile_y"]): pixel for r, pixel in zip(images.table.to_pylist(), pixels, strict=True)}
    assert set(by_place) == {(x, y) for x in range(2) for y in range(1, 4)}
    assert np.array_equal(by_place[0, 1], by_place[1, 2])
    assert not np.array_equal(by_place[0, 3], by_place[1, 3])


def test_only_other_images_or_settings_are_decoded_again(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / f"in/{number}.png").write_bytes(tile_image(number))
    said: list[str] = []
    first = decode(tmp_path / "out", tmp_path / "in", said)
    decode(tmp_path / "out", tmp_path / "in", said)
    assert ["decoded already" in text for text in said] == [False, False, True]
    (tmp_path / "in/1.png").write_bytes(tile_image(7, side=20))
    changed = decode(tmp_path / "out", tmp_path / "in")
    assert changed.fingerprint != first.fingerprint
    assert decode(tmp_path / "out", tmp_path / "in", exif_rotate=False).fingerprint != changed.fingerprint
    with pytest.raises(SettingRefused, match=r"--work-dir must be a folder that all of them share"):
        open_pixels(str(tmp_path / "gone"), first.shape, first.dtype)


def test_half_written_pixels_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(tile_image(0))
    images = decode(tmp_path / "out", tmp_path / "in")
    Path(images.file).write_bytes(b"")
    said: list[str] = []
    assert decode(tmp_path / "out", tmp_path / "in", said).rows == 1
    assert "decoded already" not in " ".join(said)
    assert Path(images.file).stat().st_size == images.size_bytes
