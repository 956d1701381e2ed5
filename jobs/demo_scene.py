"""Draw a satellite scene of seven megapixels: areas of forest, water, urban, field and desert, as a GeoTIFF.

    python jobs/demo_scene.py SCENE.tif

The seed is fixed. Needs the extra [geo].
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from jobs.demo_archive import KINDS, draw_tile, noise

SIZE = (3136, 2240)
"""Width and height in pixels: 14 × 10 windows of 224 pixels."""
AREA = 620
"""About the distance of two areas in pixels."""
CRS = "EPSG:32632"
CORNER, RESOLUTION = (640_000.0, 5_290_000.0), 10.0
"""The upper left corner and the size of a pixel, in metres."""
BLOCK = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", metavar="SCENE.tif", type=Path)
    write_scene(parser.parse_args().scene)
    return 0


def write_scene(path: Path) -> None:
    """Write the scene as a tiled GeoTIFF of three bands."""
    import rasterio
    from rasterio.transform import from_origin

    pixels, _ = draw_scene()
    shape = {"width": SIZE[0], "height": SIZE[1], "count": 3, "dtype": "uint8"}
    layout = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate", "photometric": "RGB"}
    transform = from_origin(*CORNER, RESOLUTION, RESOLUTION)
    with rasterio.open(path, "w", driver="GTiff", crs=CRS, transform=transform, **shape, **layout) as file:
        file.write(pixels.transpose(2, 0, 1))


def draw_scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [height, width, 3], and the number of the kind of each pixel in KINDS, [height, width]."""
    rng = np.random.default_rng(seed)
    areas = np.stack([noise(rng, SIZE, AREA) for _ in KINDS]).argmax(axis=0)
    pixels = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
    for number, kind in enumerate(KINDS):
        pixels[areas == number] = np.asarray(draw_tile(kind, rng, SIZE))[areas == number]
    return pixels, areas


if __name__ == "__main__":
    sys.exit(main())
