"""The land cover of the demo's scene: labels from the drawn kinds, colours, and how often the map shows these kinds.

Needs the extra [geo].
"""

from pathlib import Path

import numpy as np
import pandas as pd
import rasterio
from PIL import Image
from rasterio.warp import reproject

from jobs.demo_archive import KINDS

COLORS = dict(zip(KINDS, ("#1b7837", "#2c7fb8", "#cb4b43", "#b8d957", "#e3c58f"), strict=True))
INKS = [0x22, 0x22, 0x22, 0x55, 0x55, 0x55, 0x88, 0x88, 0x88, 0xFF, 0xFF, 0xFF]
"""The colours of a picture's text, lines and paper."""
MIN_SHARE = 0.95
"""Of a window that one kind must fill for a label. A person would not label a window of two kinds either."""
PLACE = ["window_col", "window_row", "window_width", "window_height"]


def choose_labels(windows: pd.DataFrame, truth: Path, per_kind: int) -> pd.DataFrame:
    """Choose windows of each kind, at random and without overlap. Returns the columns image and label.

    windows: image_id and PLACE. truth: a GeoTIFF with the number of the kind of each pixel.
    """
    with rasterio.open(truth) as file:
        drawn = file.read(1)
    alone = windows[(windows["window_col"] % windows["window_width"] == 0)
                    & (windows["window_row"] % windows["window_height"] == 0)]  # fmt: skip
    shares = np.stack([kind_shares(drawn, *place) for place in alone[PLACE].itertuples(index=False)])
    pure = alone[shares.max(axis=1) >= MIN_SHARE]
    kinds = pd.Series(shares.argmax(axis=1), alone.index)[pure.index].map(lambda kind: KINDS[kind])
    labelled = pd.DataFrame({"image": pure["image_id"], "label": kinds})
    mixed = labelled.sort_values("image").sample(frac=1, random_state=0)
    return mixed.groupby("label").head(per_kind)


def kind_shares(drawn: np.ndarray, column: int, row: int, width: int, height: int) -> np.ndarray:
    """The share of each kind in a window."""
    numbers = drawn[row : row + height, column : column + width]
    return np.bincount(numbers.ravel(), minlength=len(KINDS)) / numbers.size


def compare(land_cover: Path, truth: Path, labelled: pd.DataFrame) -> pd.DataFrame:
    """Numbers of pixels of the scene, by the kind that was drawn (rows) and by the class on the map (columns).

    land_cover, truth: GeoTIFFs of the map and of the kinds. labelled: PLACE of windows whose pixels do not count.
    """
    with rasterio.open(land_cover) as file, rasterio.open(truth) as grid:
        classes = {int(key.removeprefix("CLASS_")): name for key, name in file.tags(1).items() if "CLASS_" in key}
        drawn, shown = grid.read(1), np.full(grid.shape, file.nodata, np.uint8)
        reproject(rasterio.band(file, 1), shown, dst_transform=grid.transform, dst_crs=grid.crs)
    counts = np.ones(drawn.shape, bool)
    for column, row, width, height in labelled[PLACE].itertuples(index=False):
        counts[row : row + height, column : column + width] = False
    table = pd.crosstab(drawn[counts], shown[counts])
    return table.rename(index=dict(enumerate(KINDS)), columns=classes).rename_axis(index="drawn", columns="on the map")


def agreement(table: pd.DataFrame) -> float:
    """Share of the pixels whose class on the map is the kind that was drawn."""
    counts = table.reindex(columns=table.index, fill_value=0).to_numpy()
    return float(counts.trace() / table.to_numpy().sum())


def shrink(picture: Path, to: Path, width: int = 800, colors: int = 28) -> None:
    """Write a small PNG of the map's picture, of few colours: those of its areas and those of its text."""
    with Image.open(picture) as image:
        size = width, round(image.height * width / image.width)
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    palette = Image.new("P", (1, 1))
    palette.putpalette([*(small.quantize(colors).getpalette() or [])[: 3 * colors], *INKS])
    small.quantize(palette=palette, dither=Image.Dither.NONE).save(to, optimize=True)
