"""The contract of a source: what reads one kind of shard.

A source is a module of this package with one function

    read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]

that yields the records of the rows in `todo`, in row order, then one `ShardEnd`. It yields one record a row whatever
is wrong with the row (an `ImageError` takes the place of the bytes), numbers rows the same way each time, and raises
nothing but what is a fault of the whole run. Rows outside `todo` are skipped as cheaply as the format allows. A shard
that breaks off has one last record, with the error that ended it, and its row is counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pipeline.errors import ImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a reader must know of the job's settings.

    keep: names of the columns (or of the sidecars of a tar or zip: json, cls, txt) that go along with each image.
    image_column: the Parquet column of image bytes, None to find it.
    signed: inputs with the credentials that the plan leaves out.
    """

    keep: tuple[str, ...] = ()
    image_column: str | None = None
    signed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a shard, not yet decoded.

    image_id: readable and unique in the archive: the URI of a loose image, `<shard uri>#<member>` in a shard;
        a member name met a second time in its shard gets `#row=<row>` appended to its image_id.
    source: URI of the object it was read from. member: its name inside that object, None for a loose image.
    data: the encoded image, None where `error` says why there is none.
    kept: the `--keep` values of this image by name; a name that is missing means null.
    read_seconds: wall time spent to get the bytes.
    """

    row: int
    image_id: str
    source: str
    member: str | None
    data: bytes | None
    error: ImageError | None = None
    kept: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    read_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """The last item of every read: the number of rows that the shard has in all."""

    rows: int


def is_image(name: str) -> bool:
    """True for a file name that Nightshift reads as an image, by its suffix in either case."""
    return name.lower().endswith(IMAGE_SUFFIXES)
