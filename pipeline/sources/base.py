"""The contract of a source, a module of this package that reads one kind of shard.

A source defines `SOURCE`, a `Source`, and is registered in `pipeline.sources`. Its function

    read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]

yields one record per row in `todo`, in row order, and then one `ShardEnd`; a record may stand for several rows, as
`Record.repeats` says. The record of a row that cannot be read has
an `ImageError` instead of its bytes; only faults of the whole run are raised. A row has the same number in every read.
Rows outside `todo` are skipped as cheaply as the format allows. If a shard ends early or is broken, its last record has
the error and counts as a row.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.coverage import Ranges
from pipeline.errors import ImageError, InputRefused, ReadError
from pipeline.geo.bands import Band
from pipeline.geo.tiles import ALL_TILES, Selection
from pipeline.geo.windows import Tiling
from pipeline.sources.shard import Payload, Shard
from pipeline.storage.base import ObjectInfo

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif",
    ".jp2", ".jpx", ".jpf", ".j2k", ".j2c", ".jpc", ".avif", ".pgm", ".ppm", ".pbm", ".pnm",
    ".heic", ".heif", ".hif", ".jxl",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """The settings of a job that readers need.

    keep: columns to return with each image; in a tar or zip, extensions of sidecar files such as json, cls or txt.
    image_column: the Parquet column of image bytes; None to find it.
    any_suffix: read members of any name if their first bytes are those of an image.
    selection: the tiles to plan of a tile archive.
    with_credentials: the inputs with credentials, in full; the plan has them without.
    tiling: how raster scenes are cut into windows; None to read them as images.
    bands, network_bands: of raster scenes: the bands of `--bands`, and the number that the network takes, if known.
    needs_8_bits: other numbers of raster scenes cannot become pixels, because there is no `--scale`.
    assets: of STAC items: the assets of `--assets`.
    wanted: of raster scenes: the bands of the network's input specification, in order; () without one.
    harmonize: --harmonize, if the network takes digital numbers of Sentinel-2, otherwise "".
    """

    keep: tuple[str, ...] = ()
    image_column: str | None = None
    with_credentials: tuple[str, ...] = ()
    any_suffix: bool = False
    selection: Selection = ALL_TILES
    tiling: Tiling | None = None
    bands: tuple[str, ...] = ()
    network_bands: int | None = None
    needs_8_bits: bool = False
    assets: tuple[str, ...] = ()
    wanted: tuple[Band, ...] = ()
    harmonize: str = ""


@dataclass(frozen=True, slots=True)
class Compound(ObjectInfo):
    """Several objects that are one, such as the files of a scene.

    kind: of the source that reads it. notices: as in `Contents`.
    """

    kind: str = ""
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """A further row with the same bytes as a record. The fields are those of `Record`."""

    image_id: str
    member: str | None
    kept: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """One image of a shard, not yet decoded.

    image_id: readable and unique in the archive: the URI of a loose image, `<shard uri>#<member>` in a shard. If a
        member name occurs again in its shard, `#row=<row>` is appended.
    source: URI of the object that holds the image. member: its name in that object, None for a loose image.
    data: the encoded image; or an array [height, width, bands] from a source that decodes: pixels as the predictor
        takes them, or as a masked array the numbers of a raster, which become such pixels; None if there is an `error`,
        or if the image `is_empty`.
    kept: values of the `--keep` columns and of `Source.columns` by name. A missing name means null.
    read_seconds: wall time of reading the bytes.
    repeats: the rows `row + 1`, `row + 2` …, if their bytes are the same ones, such as an ocean tile of a map. They are
        in `todo` too, and get results of their own, but the bytes are read, decoded and computed once.
    is_empty: the image has no data, so that it is counted and becomes no row.
    """

    row: int
    image_id: str
    source: str
    member: str | None
    data: bytes | np.ndarray | None
    error: ImageError | None = None
    kept: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    read_seconds: float = 0.0
    repeats: tuple[Place, ...] = ()
    is_empty: bool = False

    @property
    def size_bytes(self) -> int:
        """Size of `data`, 0 without it."""
        return 0 if self.data is None else self.data.nbytes if isinstance(self.data, np.ndarray) else len(self.data)


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """The last item of every read.

    rows: total number of rows of the shard. left_out: numbers of members that are not read, by suffix, of a shard that
    was read to its end; NO_END_MARK: 1 of a tar without its end mark.
    """

    rows: int
    left_out: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


class NoImages(InputRefused):
    """The object is of a kind that is read, and holds no images. Beside other objects it is passed over."""


MAGIC_BYTES = 16
_MAGIC = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"),
    *(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),  # TIFF, BigTIFF
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),  # JPEG 2000, and its code stream alone
    b"\0\0\0\x0cJXL \r\n\x87\n",
)
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_PNM = re.compile(rb"P[1-6]\s+(#|\d)")


def starts_as_image(head: bytes) -> bool:
    """True if the first MAGIC_BYTES of a file are those of a format of IMAGE_SUFFIXES."""
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_bmp = head[:2] == b"BM" and head[6:10] == bytes(4)  # two reserved numbers, which are zero
    is_heif = head[4:8] == b"ftyp" and head[8:12] in _BRANDS
    return head.startswith(_MAGIC) or is_webp or is_bmp or is_heif or _PNM.match(head) is not None


def is_image(name: str) -> bool:
    """True if a file name has the suffix of an image, in upper or lower case."""
    return name.lower().endswith(IMAGE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Contents:
    """A shard's contents as far as planning knows them.

    rows: None if only reading can count them. keep_types: Arrow types of the `--keep` columns. payload: for
    `Shard.payload`. size_bytes: the shard's share of its object; None if the shard is the whole object. notices: what
    the user should know of this object, each a text that is the same for all such objects.
    """

    rows: int | None
    keep_types: Mapping[str, pa.DataType]
    payload: Payload | None = None
    size_bytes: int | None = None
    notices: tuple[str, ...] = ()


def sidecar_contents(uri: str, options: ReadOptions) -> Contents:
    """Contents of a shard with sidecar files as `--keep` columns and an unknown number of rows. Does no I/O."""
    return Contents(None, dict.fromkeys(options.keep, pa.string()))


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of shard.

    kind: name in the plan. suffixes: ends of the file names of such shards, in lower case.
    read: the function described at the top of this module.
    inspect: (uri, options) → Contents, without reading the images. Raises ReadError if the header is broken (the shard
        becomes an error row), NoImages if it holds none, and InputRefused if the settings do not fit the shard.
    shards: (info, options) → Contents of one shard after the other, for objects that are cut into several shards. Used
        instead of `inspect`; raises the same errors, but only before the first shard. A later fault is a shard whose
        read gives the error. Planning reads on as it writes the plan. The payload of a shard says which part of the
        object it is; a shard without a payload is an object that could not be inspected.
    is_loose: each file is one image, and runs of them are virtual shards, which are not inspected.
    reads_header: `inspect` or `shards` reads from the store, so planning inspects many shards at once.
    estimate_rows: (shard, options) → approximate number of rows of a shard with `rows` None; None if unknown.
    payload: class of `Shard.payload`; None if this kind has no payload.
    own_title: the format's name in messages, if it is not the kind with a capital letter.
    columns: result columns that every row of this kind has, beside those of `--keep`.
    selects: the flags that select parts of such objects, of zoom, bbox, datetime and assets. With another kind they
    are refused.
    content_column: the one of `columns` that is a 64-bit hash of an image's bytes. After an object was replaced, an
        update then compares its images one by one; the payload is a `KeyedPayload`.
    fault_payload: the error of an object that cannot be inspected → the payload of its shard, if it is not inspected
    again when it is read.
    planned_columns: (payload, row) → those of `columns` that follow from the plan alone, which `verify` computes again.
    tables: as `read`, with Arrow tables instead of the records of rows that could be read, for kinds whose rows need no
        decoding and are too many for Python. Columns: row, image_id, source, member, width, height, those of `--keep`,
        and either `schema.VECTOR` (float32) or stage, error_type and message.
    """

    kind: str
    suffixes: tuple[str, ...]
    read: Callable[[Shard, Ranges, ReadOptions], Iterator[Record | ShardEnd]]
    inspect: Callable[[str, ReadOptions], Contents] = sidecar_contents
    shards: Callable[[ObjectInfo, ReadOptions], Iterator[Contents]] | None = None
    is_loose: bool = False
    reads_header: bool = False
    estimate_rows: Callable[[Shard, ReadOptions], float | None] | None = None
    payload: type[Payload] | None = None
    columns: pa.Schema = field(default_factory=lambda: pa.schema([]))
    own_title: str = ""
    selects: tuple[str, ...] = ()
    content_column: str = ""
    planned_columns: Callable[[Any, int], Mapping[str, Any]] | None = None
    fault_payload: Callable[[ReadError], Payload] | None = None
    tables: "Callable[[Shard, Ranges, ReadOptions], Iterator[pa.Table | Record | ShardEnd]] | None" = None

    @property
    def title(self) -> str:
        """The format's name in messages."""
        return self.own_title or self.kind.capitalize()
