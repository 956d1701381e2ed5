"""Pictures of maps: the scene in grey, classes in colour where their windows are, north up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scenes
from affine import Affine
from PIL import Image
from scene_outputs import LABELS, VECTORS, Place, label, write_output

from pipeline.errors import InputRefused, SettingRefused
from pipeline.explore import colors
from pipeline.explore.map import write_map
from pipeline.explore.quicklook import _round_length


def picture(tmp_path: Path, transform: Any = scenes.UTM, crs: Any = "EPSG:32618", **more: Any) -> np.ndarray:
    """[height, width, 3]: the picture of a grey scene whose first window alone has a result, class 0 (blue)."""
    array = np.full((3, 128, 192), 100, np.uint8)
    path = scenes.write(tmp_path / "in" / "a.tif", array, transform, crs)

    def result(place: Place) -> dict[str, Any] | None:
        return label(0) if (place.across, place.down) == (0, 0) else None

    out = write_output(tmp_path / "out", [path], scenes.tiling(32), result)
    write_map(str(out), None, png=tmp_path / "map.png", **more)
    return np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)


def blue_centre(pixels: np.ndarray) -> tuple[float, float]:
    """Where the blue pixels of the map are, as shares of the scene's width and height. Leaves out the legend."""
    frame = np.abs(pixels - 0x88).sum(axis=2) < 12
    rows, columns = np.flatnonzero(frame.mean(axis=1) > 0.4), np.flatnonzero(frame.mean(axis=0) > 0.4)
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    inside = pixels[top:bottom, left:right]
    down, across = np.nonzero(inside[..., 2] - inside[..., 0] > 60)
    return across.mean() / (right - left), down.mean() / (bottom - top)


@pytest.mark.parametrize(
    ("transform", "crs", "expected"),
    [
        (scenes.UTM, "EPSG:32618", (1 / 12, 1 / 8)),
        (Affine(10, 0, 500_000, 0, 10, 4_500_000), "EPSG:32618", (1 / 12, 7 / 8)),
        (Affine(-10, 0, 500_000, 0, -10, 4_500_000), "EPSG:32618", (11 / 12, 1 / 8)),
        (Affine(0, 10, 500_000, 10, 0, 4_500_000), "EPSG:32618", (1 / 8, 11 / 12)),
        (Affine(0.001, 0, 7, 0, -0.001, 60), "EPSG:4326", (1 / 12, 1 / 8)),
        (None, None, (1 / 12, 1 / 8)),
    ],
    ids=["north-up", "south-up", "east-left", "turned", "degrees", "no CRS"],
)
def test_north_is_up(tmp_path: Path, transform: Any, crs: Any, expected: tuple[float, float]) -> None:
    assert blue_centre(picture(tmp_path, transform, crs)) == pytest.approx(expected, abs=0.03)


def test_a_picture_alone_leaves_no_map(tmp_path: Path) -> None:
    picture(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "map.png", "out"]


@pytest.mark.parametrize("show", ["score", "embedding"])
def test_other_maps(tmp_path: Path, show: str) -> None:
    path = scenes.write(tmp_path / "in" / "a.tif", scenes.numbers(1, 64, 96, "uint16"))

    def result(place: Place) -> dict[str, Any]:
        vector = [float(place.across), float(place.down), float(place.across * place.down), 0.0]
        return {"embedding": vector} if show == "embedding" else label(1, place.across / 3)

    columns = VECTORS if show == "embedding" else LABELS
    out = write_output(tmp_path / "out", [path], scenes.tiling(32), result, columns)
    write_map(str(out), tmp_path / "map.tif", png=tmp_path / "map.png", show=show)
    assert np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).std() > 20


def test_a_scene_that_is_gone_or_changed(tmp_path: Path) -> None:
    path = scenes.write(tmp_path / "in" / "a.tif", scenes.numbers(3, 64, 64))
    out = str(write_output(tmp_path / "out", [path], scenes.tiling(32), lambda place: label(1)))
    scenes.write(path, scenes.numbers(3, 64, 64, seed=1), compress="deflate")
    with pytest.raises(InputRefused, match=r"cannot be drawn: .*; leave out --png to write the map alone"):
        write_map(out, None, png=tmp_path / "map.png")
    path.unlink()
    with pytest.raises(InputRefused, match="cannot be drawn"):
        write_map(out, tmp_path / "map.tif", png=tmp_path / "map.png")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in", "out"]
    write_map(out, tmp_path / "map.tif")
    with pytest.raises(SettingRefused, match="give --to"):
        write_map(out, None)


def test_colours_can_be_told_apart() -> None:
    """Also by people without red cones or green cones (Viénot 1999, in linear RGB)."""
    palette = (np.array(colors.PALETTE) / 255) ** 2.2
    for blind in (np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
                  np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]])):  # fmt: skip
        seen = (palette[:7] @ blind.T).clip(0, 1) ** (1 / 2.2) * 255
        distance = np.linalg.norm(seen[:, None] - seen[None], axis=2)
        assert distance[~np.eye(7, dtype=bool)].min() > 25
    assert len(set(colors.PALETTE)) == len(colors.PALETTE)
    many = colors.class_colors(range(100))
    assert len(set(many.values())) > 90


@pytest.mark.parametrize(("limit", "length"), [(999, 500), (1000, 1000), (4.9, 2), (73_000, 50_000), (0.3, 0.2)])
def test_scale_bars_have_round_lengths(limit: float, length: float) -> None:
    assert _round_length(limit) == pytest.approx(length)
