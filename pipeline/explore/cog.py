"""Rasters on disk: written block by block, then as a cloud-optimized GeoTIFF with overviews. Needs the extra [geo]."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import rasterio
import rasterio.shutil
from numpy.typing import NDArray
from pyproj import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from pipeline.explore.scenes import Grid
from pipeline.explore.votes import BLOCK, Block, blocks

CACHE_BYTES = 64 << 20
COG = {"driver": "COG", "compress": "DEFLATE", "blocksize": BLOCK, "bigtiff": "IF_SAFER"}
BLOCKS = {
    "driver": "GTiff",
    "compress": "DEFLATE",
    "tiled": True,
    "blockxsize": BLOCK,
    "blockysize": BLOCK,
    "bigtiff": "IF_SAFER",
}


# A scene without a transform gives a map without one.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


@dataclass(frozen=True)
class Raster:
    """How a raster is stored.

    descriptions: of each band. tags: metadata of the first band. colormap: number → red, green, blue, alpha. roles: of
    each band, for colours. resampling: of the overviews.
    """

    dtype: str
    descriptions: tuple[str, ...]
    nodata: float | None
    tags: Mapping[str, str] = field(default_factory=dict)
    colormap: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    roles: tuple[str, ...] = ()
    resampling: str = "AVERAGE"


def write(
    raster: Raster, grid: Grid, path: Path, pixels: Callable[[Block], tuple[NDArray[Any], int]], tags: Mapping[str, str]
) -> int:
    """Write a raster on a map's grid. Returns the number of pixels with data.

    pixels: the numbers [bands, height, width] of a block, and how many of its pixels have data. tags: metadata of the
    file. The file `blocks.tif` in the same folder exists for a while.
    """
    blocks_file = path.with_name("blocks.tif")
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES):
        with rasterio.open(blocks_file, "w", **BLOCKS, **_profile(raster, grid)) as file:
            _describe(file, raster, tags)
            total = 0
            for block in blocks(grid.height, grid.width):
                data, has_data = pixels(block)
                total += has_data
                file.write(data, window=Window(block.column, block.row, block.width, block.height))
        predictor = {"predictor": "YES"} if raster.dtype == "float32" else {}
        rasterio.shutil.copy(blocks_file, path, **COG, overview_resampling=raster.resampling, **predictor)
    blocks_file.unlink()
    return total


def _profile(raster: Raster, grid: Grid) -> dict[str, Any]:
    crs = None if grid.scene.crs is None else rasterio.CRS.from_wkt(CRS.from_user_input(grid.scene.crs).to_wkt())
    return {
        "count": len(raster.descriptions),
        "height": grid.height,
        "width": grid.width,
        "dtype": raster.dtype,
        "nodata": raster.nodata,
        "crs": crs,
        "transform": rasterio.Affine(*grid.transform),
        **({"photometric": "RGB", "alpha": "YES"} if raster.roles else {}),
    }


def _describe(file: Any, raster: Raster, tags: Mapping[str, str]) -> None:
    """Write what a TIFF must have before its pixels."""
    if raster.colormap:
        file.write_colormap(1, dict(raster.colormap))
    if raster.roles:
        file.colorinterp = [ColorInterp[role] for role in raster.roles]
    for band, text in enumerate(raster.descriptions, 1):
        file.set_band_description(band, text)
    file.update_tags(**tags)
    file.update_tags(1, **raster.tags)


def write_names(path: Path, names: Mapping[int, str]) -> None:
    """Write the names of the classes to the file beside a raster where GDAL and QGIS look for them."""
    root = ElementTree.Element("PAMDataset")
    band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
    categories = ElementTree.SubElement(band, "CategoryNames")
    for label in range(max(names, default=-1) + 1):
        ElementTree.SubElement(categories, "Category").text = names.get(label, "")
    path.write_bytes(ElementTree.tostring(root))
