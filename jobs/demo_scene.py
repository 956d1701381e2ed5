"""Draw a satellite scene of three megapixels: areas of forest, water, urban, field and desert, as a GeoTIFF.

    python jobs/demo_scene.py SCENE.tif --truth TRUTH.tif

TRUTH.tif has the number of the kind of each pixel. The seed is fixed. Needs the extra [geo].
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from jobs.demo_archive import DRAW, KINDS, Pixels, as_bytes, noise, rotated_grid, waves

SIZE = (2208, 1536)
"""Width and height in pixels: 23 × 16 windows of 96 pixels."""
AREA = 436
"""About the distance of two areas in pixels."""
CRS = "EPSG:32632"
CORNER, RESOLUTION = (640_000.0, 5_290_000.0), 10.0
"""The upper left corner and the size of a pixel, in metres."""
BLOCK = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", metavar="SCENE.tif", type=Path)
    parser.add_argument("--truth", metavar="TRUTH.tif", type=Path, help="also write the kind that was drawn, by pixel")
    given = parser.parse_args()
    write_scene(given.scene, given.truth)
    return 0


def write_scene(scene: Path, truth: Path | None = None) -> None:
    """Write the scene as a tiled GeoTIFF of three bands, and the numbers of the kinds as one of one band."""
    pixels, areas = draw_scene()
    write_raster(scene, pixels.transpose(2, 0, 1), photometric="RGB")
    if truth:
        write_raster(truth, areas.astype(np.uint8)[None])


def write_raster(path: Path, array: np.ndarray, **options: str) -> None:
    """Write uint8 [bands, height, width] to the place of the scene."""
    import rasterio
    from rasterio.transform import from_origin

    bands, height, width = array.shape
    shape = {"width": width, "height": height, "count": bands, "dtype": "uint8"}
    layout = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", **options}
    transform = from_origin(*CORNER, RESOLUTION, RESOLUTION)
    with rasterio.open(path, "w", driver="GTiff", crs=CRS, transform=transform, **shape, **layout) as file:
        file.write(array)


def draw_scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [height, width, 3], and the number of the kind of each pixel in KINDS, [height, width]."""
    rng = np.random.default_rng(seed)
    areas = np.stack([noise(rng, SIZE, AREA) for _ in KINDS]).argmax(axis=0)
    pixels = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
    for number, kind in enumerate(KINDS):
        draw = open_water if kind == "water" else DRAW[kind]
        pixels[areas == number] = as_bytes(draw(rng, SIZE), rng)[areas == number]
    return pixels, areas


def open_water(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    """Water without a shore: the areas have their own."""
    _, along = rotated_grid(rng, size)
    return waves(rng, size, along)


if __name__ == "__main__":
    sys.exit(main())
