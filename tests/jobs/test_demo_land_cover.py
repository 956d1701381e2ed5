"""The demo's land cover: which windows are labelled, and how the map is compared with what was drawn."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rasterio
import scenes
from affine import Affine
from PIL import Image

from jobs import demo_land_cover
from jobs.demo_archive import KINDS


def windows(width: int, height: int, size: int = 8, stride: int = 4) -> pd.DataFrame:
    places = [
        (f"scene.tif#{column},{row}", column, row, size, size)
        for row in range(0, height - size + 1, stride)
        for column in range(0, width - size + 1, stride)
    ]
    return pd.DataFrame(places, columns=["image_id", *demo_land_cover.PLACE])


def write_truth(path: Path, drawn: np.ndarray) -> Path:
    return scenes.write(path, drawn[None].astype(np.uint8))


def test_labels_are_of_windows_of_one_kind_that_do_not_overlap(tmp_path: Path) -> None:
    drawn = np.zeros((32, 64), int)
    drawn[:, 28:] = 3  # in the middle of a window
    labels = demo_land_cover.choose_labels(windows(64, 32), write_truth(tmp_path / "truth.tif", drawn), per_kind=5)
    assert labels["label"].value_counts().to_dict() == {"forest": 5, "field": 5}
    for image, label in labels.itertuples(index=False):
        column, row = map(int, image.partition("#")[2].split(","))
        assert column % 8 == row % 8 == 0
        assert column != 24, "this window has both kinds"
        assert label == ("forest" if column < 24 else "field")


def test_the_map_is_compared_pixel_by_pixel_without_the_labelled_windows(tmp_path: Path) -> None:
    drawn = np.zeros((32, 64), int)
    drawn[:, 32:] = 1
    truth = write_truth(tmp_path / "truth.tif", drawn)
    shown = np.full((8, 16), 7, np.uint8)
    shown[:, 8:] = 2
    shown[0, 0] = 2  # wrong, but inside of a labelled window
    shown[0, 4] = 2  # wrong
    shown[0, 12] = 255
    land_cover = scenes.write(tmp_path / "map.tif", shown[None], Affine(40, 0, 500_000, 0, -40, 4_500_000), nodata=255)
    with rasterio.open(land_cover, "r+") as file:
        file.update_tags(1, CLASS_2="water", CLASS_7="forest")
    table = demo_land_cover.compare(land_cover, truth, windows(64, 32).head(1))
    assert table.loc["forest"].to_dict() == {"water": 16, "forest": 32 * 32 - 64 - 16, 255: 0}
    assert table.loc["water"].to_dict() == {"water": 32 * 32 - 16, "forest": 0, 255: 16}
    assert demo_land_cover.agreement(table) == pytest.approx(1 - 32 / (32 * 64 - 64))


def test_every_kind_has_a_colour_of_its_own() -> None:
    assert set(demo_land_cover.COLORS) == set(KINDS)
    assert len(set(demo_land_cover.COLORS.values())) == len(KINDS)


def test_a_small_picture_keeps_the_colour_of_its_text(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(90, 200, (300, 500, 3)).astype(np.uint8)
    noise[:20, :100] = 0x22
    Image.fromarray(noise).save(tmp_path / "map.png")
    demo_land_cover.shrink(tmp_path / "map.png", tmp_path / "small.png", width=250)
    with Image.open(tmp_path / "small.png") as small:
        assert small.size == (250, 150)
        assert small.convert("RGB").getpixel((10, 5)) == (0x22, 0x22, 0x22)


def test_the_picture_of_the_readme_is_small() -> None:
    path = Path(__file__).resolve().parents[2] / "notebooks" / "land_cover.png"
    assert path.stat().st_size <= 60 << 10
