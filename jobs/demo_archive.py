"""Draw a small archive of satellite-like tiles. One in 60 is broken on purpose.

    python jobs/demo_archive.py OUT --images 600

OUT/tars/tiles-0000.tar … are WebDataset shards (key.jpg, key.json, key.cls). OUT/loose/<kind>/ holds JPEG, PNG and
WebP files. Seeds are fixed: the same version of Pillow writes the same bytes each time.
"""

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = ("forest", "water", "urban", "field", "desert")
TILES_PER_TAR = 100
BROKEN_EVERY = 60

Pixels = np.ndarray  # float64 [height, width, 3], 0 … 255


def noise(rng: np.random.Generator, size: tuple[int, int], cell: float) -> np.ndarray:
    """float64 [height, width] from 0 to 1: random values on a grid of `cell` pixels, interpolated smoothly."""
    width, height = (max(2, round(side / cell) + 1) for side in size)
    coarse = Image.fromarray(rng.random((height, width), dtype=np.float32))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float64)
    return np.clip(smooth, 0, 1)


def blend(first: tuple[int, int, int], second: tuple[int, int, int], share: np.ndarray) -> Pixels:
    """Interpolate between two colours. share: 0 to 1 per pixel."""
    start, end, ratio = np.array(first), np.array(second), share[..., None]
    return np.asarray(start + (end - start) * ratio)


def rotated_grid(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Two coordinates per pixel, rotated by a random angle around the centre of the tile."""
    y, x = np.mgrid[: size[1], : size[0]].astype(np.float64)
    angle = rng.uniform(0, np.pi)
    x, y = x - size[0] / 2, y - size[1] / 2
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def forest(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    crowns, stands = noise(rng, size, 5), noise(rng, size, 50)
    pixels = blend((14, 38, 20), (74, 112, 52), crowns * 0.7 + stands * 0.3)
    across, along = rotated_grid(rng, size)
    track = np.abs(across + 14 * np.sin(along / 40) - rng.uniform(-60, 60)) < 2.5
    pixels[track] = (142, 124, 92)
    return pixels


def waves(rng: np.random.Generator, size: tuple[int, int], along: np.ndarray) -> Pixels:
    crests = 0.5 + 0.5 * np.sin(along / 2.6 + 9 * noise(rng, size, 40))
    depth = noise(rng, size, 120)
    return blend((10, 42, 84), (40, 110, 140), depth * 0.75 + crests * 0.25 * noise(rng, size, 30))


def water(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    across, along = rotated_grid(rng, size)
    pixels = waves(rng, size, along)
    shore = across + 30 * noise(rng, size, 35) - max(size) * rng.uniform(0.3, 0.6)
    sand, surf = shore > 0, np.abs(shore + 4) < 4
    pixels[sand] = blend((168, 150, 112), (98, 112, 66), noise(rng, size, 9))[sand]
    pixels[surf] = (214, 226, 224)
    return pixels


def urban(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    across, along = rotated_grid(rng, size)
    block = rng.uniform(34, 52)
    pixels = blend((116, 122, 104), (146, 144, 136), noise(rng, size, 7))
    lots = block / 2
    row, column = np.floor(across / lots).astype(int), np.floor(along / lots).astype(int)
    roofs = np.array([(158, 86, 66), (132, 72, 58), (96, 98, 104), (182, 180, 174), (74, 80, 92)])
    choice = rng.integers(0, len(roofs) + 1, (64, 64))[row % 64, column % 64]
    margin = rng.uniform(3, 6)
    from_centre = np.maximum(np.abs(across % lots - lots / 2), np.abs(along % lots - lots / 2))
    inside = from_centre < lots / 2 - margin
    built = inside & (choice < len(roofs))
    ridge = np.where(across % lots < lots / 2, 1.06, 0.88)[built]
    pixels[built] = roofs[choice[built]] * ridge[:, None]
    street = (across % block < 4.5) | (along % (2 * block) < 4.5)
    pixels[street] = (66, 66, 70)
    return pixels


def field(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    across, along = rotated_grid(rng, size)
    wide, long = rng.uniform(46, 80), rng.uniform(70, 130)
    row, column = np.floor(across / wide).astype(int) % 32, np.floor(along / long).astype(int) % 32
    crops = np.array([(96, 136, 58), (150, 164, 76), (196, 176, 96), (128, 98, 66), (70, 112, 54), (210, 196, 130)])
    parcel = rng.integers(0, len(crops), (32, 32))[row, column]
    furrows = np.where(parcel % 2 == 0, np.sin(across * 1.5), np.sin(along * 1.1))
    pixels: Pixels = crops[parcel] + 9 * furrows[..., None] + 22 * (noise(rng, size, 25) - 0.5)[..., None]
    pixels[(across % wide < 2) | (along % long < 2)] = (108, 104, 76)
    return pixels


def desert(rng: np.random.Generator, size: tuple[int, int]) -> Pixels:
    _, along = rotated_grid(rng, size)
    dunes = (along + 46 * noise(rng, size, 60)) / rng.uniform(24, 40) % 1
    light = np.where(dunes < 0.72, dunes / 0.72, (1 - dunes) / 0.28)  # a long windward slope and a steep lee slope
    return blend((166, 118, 70), (236, 202, 146), light * 0.8 + noise(rng, size, 3) * 0.2)


DRAW: dict[str, Callable[[np.random.Generator, tuple[int, int]], Pixels]] = {
    "forest": forest,
    "water": water,
    "urban": urban,
    "field": field,
    "desert": desert,
}


def draw_tile(kind: str, rng: np.random.Generator, size: tuple[int, int] = (256, 256)) -> Image.Image:
    """An RGB tile of one of KINDS. size: (width, height). The same state of `rng` gives the same tile."""
    return Image.fromarray(as_bytes(DRAW[kind](rng, size), rng))


def as_bytes(pixels: Pixels, rng: np.random.Generator) -> np.ndarray:
    """uint8, of a random brightness and with a sensor's noise."""
    pixels = pixels * rng.uniform(0.9, 1.08) + rng.normal(0, 3, (*pixels.shape[:2], 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def encode(image: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix], quality=90, compress_level=3, method=0)
    return buffer.getvalue()


def break_checksum(png: bytes) -> bytes:
    """Flip the last byte of the header chunk's checksum (PNG specification, 5.3: length, type, data, CRC)."""
    last = png.index(b"IHDR") + 4 + 13 + 3
    return png[:last] + bytes([png[last] ^ 0xFF]) + png[last + 1 :]


FAULTS: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    ("jpg", lambda data: b""),
    ("jpg", lambda data: data[: len(data) // 2]),
    ("jpg", lambda data: b"<html><body>404: this tile was not found</body></html>\n"),
    ("png", break_checksum),
)
"""File suffix, and the function that breaks an image of this format."""


@dataclass(frozen=True)
class Tile:
    name: str
    suffix: str
    kind: str
    size: tuple[int, int]
    data: bytes


def tiles(images: int) -> Iterator[Tile]:
    """Encoded tiles. One in BROKEN_EVERY is broken, by each of FAULTS in turn. The first half is meant for the tars."""
    for number in range(images):
        rng = np.random.default_rng(number)
        kind = KINDS[number % len(KINDS)]
        size = (int(rng.integers(240, 300)), int(rng.integers(240, 300)))
        suffix = "jpg" if number < images // 2 else ("jpg", "png", "webp")[number % 3]
        turn, place = divmod(number, BROKEN_EVERY)
        suffix, fault = FAULTS[turn % len(FAULTS)] if place == BROKEN_EVERY // 2 else (suffix, None)
        data = encode(draw_tile(kind, rng, size), suffix)
        yield Tile(f"{kind}-{number:05d}", suffix, kind, size, fault(data) if fault else data)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, shard: list[Tile]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for tile in shard:
            details = {"kind": tile.kind, "width": tile.size[0], "height": tile.size[1]}
            add_member(tar, f"{tile.name}.{tile.suffix}", tile.data)
            add_member(tar, f"{tile.name}.json", json.dumps(details).encode())
            add_member(tar, f"{tile.name}.cls", str(KINDS.index(tile.kind)).encode())


def make_archive(out: Path, images: int = 600) -> str:
    """Write the archive: half in tars, half in folders. Returns a one-line summary."""
    everything = list(tiles(images))
    shards, loose = everything[: images // 2], everything[images // 2 :]
    (out / "tars").mkdir(parents=True, exist_ok=True)
    for start in range(0, len(shards), TILES_PER_TAR):
        write_tar(out / "tars" / f"tiles-{start // TILES_PER_TAR:04d}.tar", shards[start : start + TILES_PER_TAR])
    for tile in loose:
        path = out / "loose" / tile.kind / f"{tile.name}.{tile.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tile.data)
    broken = (images + BROKEN_EVERY // 2 - 1) // BROKEN_EVERY
    tars = -(-len(shards) // TILES_PER_TAR)
    return f"{out}: {images} images, {len(shards)} in {tars} tars, {len(loose)} loose; {broken} broken on purpose"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write to; files of the same name are replaced")
    parser.add_argument("--images", metavar="N", type=int, default=600, help="number of images (default: 600)")
    given = parser.parse_args()
    try:
        print(make_archive(given.out, given.images))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
