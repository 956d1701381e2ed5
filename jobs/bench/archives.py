"""The archives that benchmarks run on: drawn, or links to images of one's own."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.make_demo_archive import KINDS, add_member, draw_tile
from pipeline.errors import InputRefused

PHOTO = (470, 400)
LARGE = (4000, 3000)
LARGE_DRAWN = (1000, 750)
DISTINCT_PHOTOS, DISTINCT_LARGE, DISTINCT_TILES = 100, 5, 500
TILES_PER_TAR = 2_000
GRAIN = 10.0
"""Standard deviation of the noise that gives a drawn photo the bytes of a real one: about 110 KB at 470 × 400."""

OWN_SUFFIXES = (".jpg", ".jpeg", ".png")  # what every contestant reads


@dataclass(frozen=True)
class Archive:
    """A folder of this many images, loose or in tars."""

    folder: Path
    images: int

    @property
    def in_tars(self) -> bool:
        return any(self.folder.glob("*.tar"))


@dataclass(frozen=True)
class Case:
    """A kind of archive. small, large: how many images the two archives of a measurement hold."""

    make: Callable[[Path, int], None]
    small: int
    large: int
    what: str


def encoded_photo(seed: int) -> bytes:
    """About 110 KB of JPEG, near 470 × 400 pixels."""
    rng = np.random.default_rng(seed)
    size = (PHOTO[0] + int(rng.integers(-40, 40)), PHOTO[1] + int(rng.integers(-40, 40)))
    return _encoded(_grainy(draw_tile(KINDS[seed % len(KINDS)], rng, size), rng, GRAIN), quality=95)


def encoded_large(seed: int) -> bytes:
    """3 to 4 MB of JPEG, 12 megapixels: a drawn image enlarged, with the grain of a sensor."""
    rng = np.random.default_rng(seed)
    drawn = draw_tile(KINDS[seed % len(KINDS)], rng, LARGE_DRAWN).resize(LARGE, Image.Resampling.BICUBIC)
    return _encoded(_grainy(drawn, rng, 6.0), quality=90)


def encoded_tiles() -> list[bytes]:
    """DISTINCT_TILES JPEGs of 64 × 64 pixels."""
    tiles = (
        draw_tile(KINDS[seed % len(KINDS)], np.random.default_rng(seed), (64, 64)) for seed in range(DISTINCT_TILES)
    )
    return [_encoded(tile, quality=96) for tile in tiles]


def write_tars(folder: Path, count: int, tiles: list[bytes], per_tar: int = TILES_PER_TAR) -> None:
    """Tars of `per_tar` images each; the tiles repeat, every one under a name of its own."""
    for first in range(0, count, per_tar):
        with tarfile.open(folder / f"tiles-{first // per_tar:05d}.tar", "w") as tar:
            for i in range(first, min(first + per_tar, count)):
                add_member(tar, f"{i:08d}.jpg", tiles[i % len(tiles)])
                tar.members = []


def _draw_loose(folder: Path, count: int, encoded: Callable[[int], bytes], distinct: int) -> None:
    """Loose JPEGs; after `distinct` they repeat, as links."""
    for i in range(count):
        path = folder / f"{i:07d}.jpg"
        if i < distinct:
            path.write_bytes(encoded(i))
        else:
            _link(folder / f"{i % distinct:07d}.jpg", path)


def _draw_photos(folder: Path, count: int) -> None:
    _draw_loose(folder, count, encoded_photo, DISTINCT_PHOTOS)


def _draw_large(folder: Path, count: int) -> None:
    _draw_loose(folder, count, encoded_large, DISTINCT_LARGE)


def _draw_tiles(folder: Path, count: int) -> None:
    write_tars(folder, count, encoded_tiles())


CASES = {
    "photos": Case(_draw_photos, 500, 3_000, "loose JPEGs near 470 × 400, 110 KB"),
    "tiles": Case(_draw_tiles, 20_000, 100_000, f"64 × 64 JPEGs of 3 KB, {TILES_PER_TAR:,} a tar"),
    "large": Case(_draw_large, 60, 200, "loose 12-megapixel JPEGs, 3-4 MB"),
}


def make(case: Case, folder: Path, small: int, large: int) -> tuple[Archive, Archive]:
    """The two archives of a case, in FOLDER/small and FOLDER/large."""
    archives = Archive(folder / "small", small), Archive(folder / "large", large)
    for archive in archives:
        archive.folder.mkdir(parents=True)
        case.make(archive.folder, archive.images)
    return archives


def own_images(source: Path) -> Case:
    """A case of the images of a folder, whatever lies below it, in the order of their names."""

    def make_links(folder: Path, count: int) -> None:
        paths = list(islice(_images_of(source), count))
        if len(paths) < count:
            names = ", ".join(OWN_SUFFIXES)
            raise InputRefused(
                f"--images {source} holds {len(paths)} images ({names}), and {count} are asked for: "
                "give smaller numbers as --small and --large"
            )
        for i, path in enumerate(paths):
            _link(path, folder / f"{i:07d}{path.suffix.lower()}")
            path.read_bytes()  # into the page cache, so that the first contestant is no worse off than the next

    if not source.is_dir():
        raise InputRefused(f"--images {source} is no folder")
    photos = CASES["photos"]
    return Case(make_links, photos.small, photos.large, f"the images of {source.resolve().name}/")


def repeated_images(source: Path) -> Case:
    """As `own_images`, but the images begin anew after the last one."""

    def make_links(folder: Path, count: int) -> None:
        paths = list(islice(_images_of(source), count))
        if not paths:
            raise InputRefused(f"--images {source} holds no image ({', '.join(OWN_SUFFIXES)})")
        for i in range(count):
            path = paths[i % len(paths)]
            _link(path, folder / f"{i:07d}{path.suffix.lower()}")

    return replace(own_images(source), make=make_links)


def _images_of(source: Path) -> Iterator[Path]:
    return (path for path in sorted(source.rglob("*")) if path.suffix.lower() in OWN_SUFFIXES and path.is_file())


def _link(source: Path, target: Path) -> None:
    """A hard link, which every reader takes for a file; a copy where the file system has no links."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _grainy(image: Image.Image, rng: np.random.Generator, deviation: float) -> Image.Image:
    grain = rng.standard_normal((image.height, image.width, 1), np.float32) * np.float32(deviation)
    return Image.fromarray((np.asarray(image, np.float32) + grain).clip(0, 255).astype(np.uint8))


def _encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
