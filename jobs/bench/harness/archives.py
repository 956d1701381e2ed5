"""The archives of the benchmarks: drawn images or your own, as loose files, in tars, or on a local S3 server."""

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.bench.harness import s3
from jobs.demo_archive import KINDS, add_member, draw_tile
from pipeline.errors import InputRefused

PHOTO = (470, 400)
LARGE = (4000, 3000)
LARGE_DRAWN = (1000, 750)
PHOTOS_PER_TAR, TILES_PER_TAR = 250, 2_000
GRAIN = 10.0
"""Standard deviation of noise. With it a drawn photo has the size of a real one: about 110 KB at 470 × 400."""

OWN_SUFFIXES = (".jpg", ".jpeg", ".png")  # all contestants read these

Files = Callable[[Path, int], list[Path]]
"""(scratch folder, number of images) → files to fill an archive with. If there are fewer, they repeat."""


@dataclass(frozen=True)
class Images:
    description: str
    files: Files


@dataclass(frozen=True)
class Case:
    """A kind of archive. images_per_tar: None for loose images. on_s3: loose, on an S3 server on this machine."""

    images: Images
    layout: str
    images_per_tar: int | None = None
    on_s3: bool = False

    def make(self, folder: Path, count: int) -> None:
        """Fill an empty folder. Raises InputRefused."""
        with tempfile.TemporaryDirectory(prefix="nightshift-") as scratch:
            paths = self.images.files(Path(scratch), count)
            _fill(folder, [paths[i % len(paths)] for i in range(count)], self.images_per_tar)

    @property
    def description(self) -> str:
        return f"{self.images.description}, {self.layout}"


@dataclass(frozen=True)
class Archive:
    """A folder of images. bucket_uri: their URI on an S3 server. environment: variables that a client of it needs."""

    folder: Path
    images: int
    in_tars: bool = False
    bucket_uri: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """The input of a command."""
        return self.bucket_uri or str(self.folder)

    @property
    def on_s3(self) -> bool:
        return self.bucket_uri is not None


def drawn(encoded: Callable[[int], bytes], distinct: int) -> Files:
    """Draw at most `distinct` images. encoded: seed → JPEG."""

    def files(scratch: Path, count: int) -> list[Path]:
        paths = [scratch / f"{seed:05d}.jpg" for seed in range(min(distinct, count))]
        for seed, path in enumerate(paths):
            path.write_bytes(encoded(seed))
        return paths

    return files


def own(source: Path) -> Images:
    """The images of a folder and its subfolders, in the order of their names."""
    if not source.is_dir():
        raise InputRefused(f"--images {source} is not a folder")

    def files(scratch: Path, count: int) -> list[Path]:
        paths = list(islice(_images_of(source), count))
        if len(paths) < count:
            names = ", ".join(OWN_SUFFIXES)
            raise InputRefused(
                f"--images {source} holds {len(paths)} images ({names}), and {count} are needed: "
                "give smaller numbers as --small and --large"
            )
        for path in paths:
            path.read_bytes()  # into the page cache, so that the first contestant has no disadvantage
        return paths

    return Images(f"the images of {source.resolve().name}/", files)


def repeated_images(source: Path) -> Case:
    """Loose images of a folder, repeated as often as needed."""

    def files(scratch: Path, count: int) -> list[Path]:
        paths = list(islice(_images_of(source), count))
        if not paths:
            raise InputRefused(f"--images {source} holds no images ({', '.join(OWN_SUFFIXES)})")
        return paths

    return Case(Images(f"the images of {source.resolve().name}/", files), "loose")


def encoded_photo(seed: int) -> bytes:
    """About 110 KB of JPEG, near 470 × 400 pixels."""
    rng = np.random.default_rng(seed)
    size = (PHOTO[0] + int(rng.integers(-40, 40)), PHOTO[1] + int(rng.integers(-40, 40)))
    return encoded(_grainy(draw_tile(KINDS[seed % len(KINDS)], rng, size), rng, GRAIN), quality=95)


def encoded_large(seed: int) -> bytes:
    """3 to 4 MB of JPEG, 12 megapixels: a drawn image, enlarged, with noise like that of a sensor."""
    rng = np.random.default_rng(seed)
    drawn = draw_tile(KINDS[seed % len(KINDS)], rng, LARGE_DRAWN).resize(LARGE, Image.Resampling.BICUBIC)
    return encoded(_grainy(drawn, rng, 6.0), quality=90)


def encoded_tile(seed: int) -> bytes:
    """About 3 KB of JPEG, 64 × 64 pixels."""
    return encoded(draw_tile(KINDS[seed % len(KINDS)], np.random.default_rng(seed), (64, 64)), quality=96)


DISTINCT_PHOTOS, DISTINCT_TILES, DISTINCT_LARGE = 100, 500, 5  # larger archives repeat them

PHOTOS = Images("JPEGs near 470 × 400, 110 KB", drawn(encoded_photo, DISTINCT_PHOTOS))
TILES = Images("64 × 64 JPEGs of 3 KB", drawn(encoded_tile, DISTINCT_TILES))
LARGE_PHOTOS = Images("12-megapixel JPEGs, 3-4 MB", drawn(encoded_large, DISTINCT_LARGE))

CASES = {
    "photos": Case(PHOTOS, "loose"),
    "photo-tars": Case(PHOTOS, f"{PHOTOS_PER_TAR} per tar", PHOTOS_PER_TAR),
    "photos-s3": Case(PHOTOS, "loose on S3 (rclone on this machine)", on_s3=True),
    "tiles": Case(TILES, f"{TILES_PER_TAR:,} per tar", TILES_PER_TAR),
    "one-tar": Case(TILES, "all in one tar", 1 << 31),
    "large": Case(LARGE_PHOTOS, "loose"),
}


def make(case: Case, folder: Path, *counts: int) -> list[Archive]:
    """Make archives of these numbers of images below a folder, without an S3 server. Raises InputRefused."""
    archives = [Archive(folder / f"images-{count}", count, case.images_per_tar is not None) for count in counts]
    for archive in archives:
        archive.folder.mkdir(parents=True)
        case.make(archive.folder, archive.images)
    return archives


def encoded_tiles() -> list[bytes]:
    return [encoded_tile(seed) for seed in range(DISTINCT_TILES)]


@contextmanager
def temporary(case: Case, *counts: int) -> Iterator[list[Archive]]:
    """Make archives of a case, and delete them at the end. Raises InputRefused and SettingRefused."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as temporary:
        bucket = Path(temporary) / "archive"
        archives = make(case, bucket, *counts)
        if not case.on_s3:
            yield archives
            return
        with s3.serve(bucket.parent) as environment:
            uris = [f"s3://{bucket.name}/{each.folder.name}" for each in archives]
            yield [
                replace(each, bucket_uri=uri, environment=environment) for each, uri in zip(archives, uris, strict=True)
            ]


def write_tars(folder: Path, count: int, images: Sequence[bytes], per_tar: int) -> None:
    """Write tars of `per_tar` JPEGs each. The images repeat under different names."""
    _pack(folder, ((".jpg", images[i % len(images)]) for i in range(count)), per_tar)


def _pack(folder: Path, images: Iterable[tuple[str, bytes]], per_tar: int) -> None:
    """images: (suffix, bytes)."""
    remaining = enumerate(images)
    for number, first in enumerate(remaining):
        with tarfile.open(folder / f"images-{number:05d}.tar", "w") as tar:
            for i, (suffix, data) in chain([first], islice(remaining, per_tar - 1)):
                add_member(tar, f"{i:08d}{suffix}", data)
                tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile remembers every one


def _fill(folder: Path, paths: list[Path], images_per_tar: int | None) -> None:
    suffixes = [".png" if path.suffix.lower() == ".png" else ".jpg" for path in paths]
    if images_per_tar is not None:
        images = ((suffix, path.read_bytes()) for suffix, path in zip(suffixes, paths, strict=True))
        _pack(folder, images, images_per_tar)
        return
    for i, (suffix, path) in enumerate(zip(suffixes, paths, strict=True)):
        _link(path, folder / f"{i:07d}{suffix}")


def _images_of(source: Path) -> Iterator[Path]:
    return (path for path in sorted(source.rglob("*")) if path.suffix.lower() in OWN_SUFFIXES and path.is_file())


def _link(source: Path, target: Path) -> None:
    """Make a hard link; a copy if the file system has no links."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _grainy(image: Image.Image, rng: np.random.Generator, deviation: float) -> Image.Image:
    grain = rng.standard_normal((image.height, image.width, 1), np.float32) * np.float32(deviation)
    return Image.fromarray((np.asarray(image, np.float32) + grain).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
