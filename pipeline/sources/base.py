"""The contract of a source, a module of this package that reads one kind of shard.

A source defines `SOURCE`, a `Source`, and is registered in `pipeline.sources`. Its function

    read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]

yields one record per row in `todo`, in row order, and then one `ShardEnd`. The record of a row that cannot be read has
an `ImageError` instead of its bytes; only faults of the whole run are raised. A row has the same number in every read.
Rows outside `todo` are skipped as cheaply as the format allows. If a shard ends early or is broken, its last record has
the error and counts as a row.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.coverage import Ranges
from pipeline.errors import ImageError
from pipeline.sources.shard import Payload, Shard

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """The settings of a job that readers need.

    keep: columns to return with each image; in a tar or zip, extensions of sidecar files such as json, cls or txt.
    image_column: the Parquet column of image bytes; None to find it.
    with_credentials: the inputs with credentials, in full; the plan has them without.
    """

    keep: tuple[str, ...] = ()
    image_column: str | None = None
    with_credentials: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a shard, not yet decoded.

    image_id: readable and unique in the archive: the URI of a loose image, `<shard uri>#<member>` in a shard. If a
        member name occurs again in its shard, `#row=<row>` is appended.
    source: URI of the object that holds the image. member: its name in that object, None for a loose image.
    data: the encoded image, or pixels [height, width, bands] from a source that decodes; None if there is an `error`.
    kept: values of the `--keep` columns by name. A missing name means null.
    read_seconds: wall time of reading the bytes.
    """

    row: int
    image_id: str
    source: str
    member: str | None
    data: bytes | np.ndarray | None
    error: ImageError | None = None
    kept: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    read_seconds: float = 0.0

    @property
    def size_bytes(self) -> int:
        """Size of `data`, 0 without it."""
        return 0 if self.data is None else self.data.nbytes if isinstance(self.data, np.ndarray) else len(self.data)


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """The last item of every read. rows: total number of rows of the shard."""

    rows: int


def is_image(name: str) -> bool:
    """True if a file name has the suffix of an image, in upper or lower case."""
    return name.lower().endswith(IMAGE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Contents:
    """A shard's contents as far as planning knows them.

    rows: None if only reading can count them. keep_types: Arrow types of the `--keep` columns. payload: for
    `Shard.payload`.
    """

    rows: int | None
    keep_types: Mapping[str, pa.DataType]
    payload: Payload | None = None


def sidecar_contents(uri: str, options: ReadOptions) -> Contents:
    """Contents of a shard with sidecar files as `--keep` columns and an unknown number of rows. Does no I/O."""
    return Contents(None, dict.fromkeys(options.keep, pa.string()))


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of shard.

    kind: name in the plan. suffixes: ends of the file names of such shards, in lower case.
    read: the function described at the top of this module.
    inspect: (uri, options) → Contents, without reading the images. Raises ReadError if the header is broken (the shard
        becomes an error row), and InputRefused if the settings do not fit the shard. None for loose images.
    is_loose: each file is one image, and runs of them are virtual shards, which are not inspected.
    reads_header: `inspect` reads from the store, so planning inspects many shards at once.
    estimate_rows: (shard, options) → approximate number of rows of a shard with `rows` None; None if unknown.
    payload: class of `Shard.payload`; None if this kind has no payload.
    """

    kind: str
    suffixes: tuple[str, ...]
    read: Callable[[Shard, Ranges, ReadOptions], Iterator[Record | ShardEnd]]
    inspect: Callable[[str, ReadOptions], Contents] = sidecar_contents
    is_loose: bool = False
    reads_header: bool = False
    estimate_rows: Callable[[Shard, ReadOptions], float | None] | None = None
    payload: type[Payload] | None = None
