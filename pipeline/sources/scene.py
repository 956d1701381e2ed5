"""Raster scenes: GeoTIFF, JPEG 2000 and VRT. A scene is cut into windows, and each window is a row.

The number of windows is known from the header. A large scene becomes several shards, each a rectangle of windows.
`pipeline.sources.gdal` reads the files; this module imports it when it is needed, because it needs the extra [geo].
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from types import ModuleType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from pipeline import schema
from pipeline.coverage import Ranges, intersect
from pipeline.errors import DecodeError, InputRefused, NightshiftError, ReadError
from pipeline.geo import bands as band_names
from pipeline.geo import sentinel2
from pipeline.geo.bands import FILLED
from pipeline.geo.sentinel2 import Claim
from pipeline.geo.windows import MAX_ROUNDING, NO_WINDOWS, Axis, Part, Span, Tiling, parts
from pipeline.sources.base import Contents, ReadOptions, Record, ShardEnd, Source
from pipeline.sources.records import Rows, storage_fault
from pipeline.sources.shard import Shard
from pipeline.storage import access
from pipeline.storage.base import ObjectInfo

RASTER_SUFFIXES = (".tif", ".tiff", ".jp2", ".j2k", ".vrt")
"""Files that are scenes if `--tile-size` is given. Without it they are images, except for .vrt, which is refused."""

CACHE_BYTES = 128 << 20
"""Decoded blocks that a reader of one shard may hold. A wide scene is cut into columns so that this is enough."""
MAX_CACHE_BYTES = 1 << 30
"""The same for a file whose blocks are so large or so wide that the windows of one row touch more than CACHE_BYTES. A
file that needs more is refused."""
MAX_WINDOWS = 100_000_000
"""Of one scene, which only a broken header exceeds."""
SIBLING_SUFFIXES = (".ovr", ".msk", ".aux.xml", ".tfw", ".wld", ".jgw", ".j2w", ".jkw")
"""Files that are read with a scene."""
MIN_SCENE_BYTES = 1 << 16
MAX_IMAGE_SIDE = 2048
"""A georeferenced TIFF that is larger and is read as one image is worth a notice."""
GEOREFERENCING_TAGS = (33550, 33922, 34264)
"""ModelPixelScale, ModelTiepoint and ModelTransformation (OGC GeoTIFF 1.1, section 7.1)."""

COLUMNS = pa.schema(
    [
        ("scene", pa.string()),
        ("window_col", pa.int32()),
        ("window_row", pa.int32()),
        ("window_width", pa.int32()),
        ("window_height", pa.int32()),
        ("crs", pa.string()),
        ("transform", pa.list_(pa.float64())),
        ("valid_fraction", pa.float32()),
        *schema.FOOTPRINT,
    ]
)
"""Columns of a window.

scene: URI of the scene. window_col, window_row, window_width, window_height: its part of the scene, in pixels of the
scene at full resolution. crs: `EPSG:32618`, or PROJJSON if the CRS has no code; null without a CRS. transform: of the
window's own pixels at full resolution, six numbers a, b, c, d, e, f with x = a·column + b·row + c and
y = d·column + e·row + f (the order of rasterio's Affine). valid_fraction: share of its pixels that have data.
geometry: footprint as WKB in OGC:CRS84. bbox: range of the geometry's coordinates.
"""

ITEM_COLUMNS = pa.schema(
    [("item_id", pa.string()), ("datetime", pa.timestamp("us", "UTC")), ("eo:cloud_cover", pa.float32())]
)
"""Further columns of the windows of a STAC item."""

NO_GEOMETRY = "no CRS or no transform: the rows have no geometry, crs or bbox"
NOT_UNSCALED = "tags of scale or offset are not applied: the network gets the numbers as they are stored"


@dataclass(frozen=True, slots=True)
class Band:
    """One band of a file.

    role: GDAL's colour interpretation, such as "red" or "alpha". mask: where GDAL finds the pixels without data:
    "nodata", "alpha", "mask" (a band of its own), or "" if all pixels have data. also: other names of the band.
    """

    dtype: str
    role: str
    name: str = ""
    nodata: float | None = None
    mask: str = ""
    scale: float = 1.0
    offset: float = 0.0
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.also


@dataclass(frozen=True, slots=True)
class RasterFile:
    """One file of a scene.

    siblings: files beside it that belong to it, such as `.ovr` and `.msk`: URI → etag. block: height and width of a
    tile or strip. is_interleaved: a block holds all bands. factor: pixels of the scene that one pixel of the file
    covers, across and down: 2 for a band of 20 m in a scene of 10 m.
    """

    uri: str
    etag: str
    bands: tuple[Band, ...]
    block: tuple[int, int]
    is_interleaved: bool
    siblings: Mapping[str, str]
    factor: tuple[float, float] = (1.0, 1.0)

    @property
    def scene_block(self) -> tuple[int, int]:
        """Height and width of a block in pixels of the scene."""
        return math.ceil(self.block[0] * self.factor[1]), math.ceil(self.block[1] * self.factor[0])

    def pixel_bytes(self, bands: Sequence[int]) -> int:
        """Bytes per pixel of the scene in the blocks that GDAL decodes for some bands; of all if interleaved."""
        decoded = self.bands if self.is_interleaved and bands else [self.bands[band] for band in bands]
        has_mask = any(band.mask == "mask" for band in decoded)
        size_bytes = sum(np.dtype(band.dtype).itemsize for band in decoded) + has_mask
        return math.ceil(size_bytes / (self.factor[0] * self.factor[1]))


@dataclass(frozen=True, slots=True)
class Scene:
    """The payload of a shard: a scene, and the windows of it that are the shard's rows.

    files: in the order of their bands; a scene of one file has one. width, height: pixels at full resolution, which is
    that of the finest file. transform: a to f, see COLUMNS; None if the file has none. crs: text for PROJ; None without
    one. factors: pixels of the scene that become one pixel of a window, across and down.
    name: URI of the scene if it is not that of its only file. offset: a constant that the numbers contain, and that is
    subtracted. reason: what says so. zero_is_missing: the number 0 means no data, as in Sentinel-2.
    item: values of the columns that a STAC item has, as JSON. hides_credentials: they were removed from URIs of files.
    fault: error type and message of a scene that could not be planned; it has no files.
    """

    files: tuple[RasterFile, ...]
    width: int
    height: int
    transform: tuple[float, float, float, float, float, float] | None
    crs: str | None
    tiling: Tiling
    factors: tuple[float, float] = (1.0, 1.0)
    part: Part = NO_WINDOWS
    name: str = ""
    offset: float = 0.0
    reason: str = ""
    zero_is_missing: bool = False
    item: Mapping[str, Any] = field(default_factory=dict)
    hides_credentials: bool = False
    fault: tuple[str, str] | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        fields = json.loads(text)
        transform, fault = fields.pop("transform"), fields.pop("fault")
        return cls(
            files=tuple(map(_file, fields.pop("files"))),
            transform=transform and tuple(transform),
            tiling=Tiling(**fields.pop("tiling")),
            part=Part(**fields.pop("part")),
            factors=tuple(fields.pop("factors")),
            fault=fault and tuple(fault),
            **fields,
        )

    def first(self, rows: int) -> "Scene":
        return self  # `Shard.rows` is the limit

    @property
    def uri(self) -> str:
        return self.name or self.files[0].uri

    @property
    def bands(self) -> tuple[Band, ...]:
        return tuple(band for file in self.files for band in file.bands)

    @property
    def across(self) -> Axis:
        return self._axis(self.width, self.factors[0])

    @property
    def down(self) -> Axis:
        return self._axis(self.height, self.factors[1])

    def _axis(self, length: int, factor: float) -> Axis:
        return Axis(length, self.tiling.size, self.tiling.stride, self.tiling.edge, factor)

    def spans(self, row: int) -> tuple[Span, Span]:
        """Where a window of this shard is, across and down."""
        column, line = self.part.place(row)
        return self.across.span(column), self.down.span(line)

    @property
    def is_resampled(self) -> bool:
        return self.factors != (1.0, 1.0)

    def cache_bytes(self, bands: Sequence[int], columns: int = 1) -> int:
        """Memory of the decoded blocks that windows side by side touch. bands: those that are read.

        Windows of another resolution share few blocks, and GDAL reads them in pieces or from an overview.
        """
        if self.is_resampled:
            return CACHE_BYTES
        width = (columns - 1) * self.tiling.stride + self.tiling.size
        first = total = 0
        for file in self.files:
            block = file.scene_block
            pixels = _touched(self.tiling.size, block[0], self.height) * _touched(width, block[1], self.width)
            total += pixels * file.pixel_bytes(
                [band - first for band in bands if first <= band < first + len(file.bands)]
            )
            first += len(file.bands)
        return total

    def max_columns(self, bands: Sequence[int]) -> int:
        """The number of windows side by side whose blocks fit into CACHE_BYTES; at least 1."""
        low, high = 1, max(1, self.across.count)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cache_bytes(bands, middle) <= CACHE_BYTES else (low, middle - 1)
        is_striped = any(file.scene_block[1] >= self.width for file in self.files)
        return self.across.count if is_striped else low


def _file(fields: dict[str, Any]) -> RasterFile:
    """A file of a payload in JSON."""
    bands = tuple(Band(**{**band, "also": tuple(band["also"])}) for band in fields["bands"])
    return RasterFile(**{**fields, "bands": bands, "block": tuple(fields["block"]), "factor": tuple(fields["factor"])})


def _touched(length: int, block: int, whole: int) -> int:
    """Pixels of the blocks that a range of this length touches at most. whole: length of the scene's side."""
    return min((length + block - 2) // block + 1, -(-whole // block)) * block


def chosen_bands(scene: Scene, options: ReadOptions) -> list[int]:
    """Indices of the bands that the network gets; FILLED for one that the scene lacks and that has a declared value.

    Raises ReadError (unsupported) for a band that does not exist.
    """
    bands, wanted = scene.bands, options.wanted
    if options.bands:
        chosen = [_band(name, bands, scene.uri) for name in options.bands]
        is_without_fillers = len(chosen) == sum(band.filler is None for band in wanted) < len(wanted)
        return band_names.with_fillers(chosen, wanted) if is_without_fillers else chosen
    if wanted and is_named(scene):
        try:
            return band_names.match([band.names for band in bands], wanted, scene.uri)
        except DecodeError as error:
            raise ReadError(error.error_type, error.message) from error
    without_alpha = [index for index, band in enumerate(bands) if band.role != "alpha"]
    if wanted and len(without_alpha) < len(bands):
        raise ReadError(
            "unsupported",
            f"{scene.uri} marks a band as an alpha, which may be a band of a sensor; choose the {len(wanted)} bands of "
            f"the input specification with --bands, as in --bands {','.join(map(str, range(1, len(wanted) + 1)))}",
        )
    if len(bands) == options.network_bands != 3:
        return list(range(len(bands)))
    is_rgb = [bands[index].role for index in without_alpha[:3]] == ["red", "green", "blue"]
    return without_alpha[:3] if is_rgb and options.network_bands == 3 else without_alpha


def is_named(scene: Scene) -> bool:
    """Whether the scene names its bands, and does not only count them."""
    return band_names.are_named([name for band in scene.bands for name in band.names])


def _band(name: str, bands: tuple[Band, ...], uri: str) -> int:
    if name.isdecimal() and 1 <= int(name) <= len(bands):
        return int(name) - 1
    exact = [index for index, band in enumerate(bands) if name in band.names]
    called = band_names.Band((name,)).is_called
    alike = exact or [index for index, band in enumerate(bands) if any(map(called, band.names))]
    if len(alike) == 1:
        return alike[0]
    known = ", ".join(band.name for band in bands if band.name) or "none"
    raise ReadError("unsupported", f"{uri} has {len(bands)} bands and no band {name!r} for --bands; its names: {known}")


def shards(info: ObjectInfo, options: ReadOptions) -> Iterator[Contents]:
    """The shards of a scene, from its header. Raises ReadError, and InputRefused without `--tile-size`."""
    if options.tiling is None:
        raise InputRefused(f"{info.uri} is a raster scene: give --tile-size, as in --tile-size 224")
    try:
        scene, metadata = gdal().inspect(info, options.tiling)
    except OSError as error:
        raise storage_fault(info.uri, error) from error
    yield from planned(scene, claims_of(info.uri, metadata, options), info.size_bytes, options)


def claims_of(uri: str, metadata: Mapping[str, str], options: ReadOptions) -> list[Claim]:
    """What the name and the tags of a file say about Sentinel-2's offset; nothing without `--harmonize`."""
    if not options.harmonize:
        return []
    try:
        return [*sentinel2.claims_of_name(uri), *sentinel2.claims_of_file(metadata)]
    except DecodeError as error:
        raise ReadError(error.error_type, f"{uri}: {error.message}") from error


def planned(scene: Scene, claims: Sequence[Claim], size_bytes: int, options: ReadOptions) -> Iterator[Contents]:
    """The shards of an inspected scene. claims: about Sentinel-2's offset. Raises ReadError."""
    bands = chosen_bands(scene, options)
    _check_bands(scene, bands, options)
    scene = _harmonized(scene, claims, options)
    _check_size(scene, bands)
    yield from _contents(scene, bands, size_bytes, _notices(scene, options))


def faulty(error: ReadError) -> Scene:
    """The payload of a scene that could not be planned."""
    return Scene((), 0, 0, None, None, Tiling(1, 1), fault=(error.error_type, error.message))


def _harmonized(scene: Scene, claims: Sequence[Claim], options: ReadOptions) -> Scene:
    """The scene with the offset of its numbers. Raises ReadError (unsupported) if nothing says it."""
    if not options.harmonize:
        return scene
    try:
        claim = sentinel2.harmonize(options.harmonize, claims, scene.uri)
    except DecodeError as error:
        raise ReadError(error.error_type, error.message) from error
    return replace(scene, offset=claim.offset, reason=claim.reason, zero_is_missing=True)


def _check_bands(scene: Scene, bands: Sequence[int], options: ReadOptions) -> None:
    """Raise ReadError (unsupported) for numbers that cannot become the network's pixels."""
    wanted = options.network_bands
    if wanted is not None and len(bands) != wanted and (options.wanted or not (len(bands) == 1 and wanted == 3)):
        raise ReadError(
            "unsupported",
            f"{scene.uri} gives {len(bands)} bands, and the network takes {wanted}; choose them with --bands, as in "
            f"--bands {','.join(map(str, range(1, wanted + 1)))}",
        )
    dtypes = list(dict.fromkeys(scene.bands[band].dtype for band in bands if band != FILLED))
    if len(dtypes) != 1:
        types = f"different number types ({', '.join(dtypes)})" if dtypes else "none of the wanted bands"
        raise ReadError("unsupported", f"{scene.uri} has {types}; choose other bands with --bands")
    if options.needs_8_bits and dtypes[0] != "uint8":
        raise ReadError(
            "unsupported",
            f"{scene.uri} holds numbers of type {dtypes[0]}, and nothing says which of them are black and white; set "
            "one range for the whole run with --scale MIN:MAX, or measure it with --scale percentile:2:98",
        )
    if options.harmonize and dtypes[0] in ("uint8", "int8"):
        raise ReadError(
            "unsupported",
            f"{scene.uri} holds numbers of 8 bits, and the input specification takes digital numbers of Sentinel-2; "
            "use a network for RGB, or a copy of the specification with harmonize: false and your divisor",
        )


def _check_size(scene: Scene, bands: Sequence[int]) -> None:
    """Raise ReadError for a scene that cannot be read within a bounded memory, whose windows would be far from their
    size, and for a broken header."""
    rounding = max(scene.across.rounding, scene.down.rounding)
    if rounding > MAX_ROUNDING:
        raise ReadError(
            "unsupported",
            f"{scene.uri}: at --resolution {scene.tiling.resolution:g} a window of {scene.tiling.size} pixels covers "
            f"{scene.tiling.size * min(scene.factors):.3g} of its pixels; in whole pixels it would be off by up to "
            f"{min(rounding, 1):.0%}; give a larger --tile-size or --resolution",
        )
    windows = scene.across.count * scene.down.count
    if windows > MAX_WINDOWS:
        raise ReadError("too_large", f"{scene.uri} would be {windows} windows; the limit is {MAX_WINDOWS}")
    size_bytes = scene.cache_bytes(bands)
    if size_bytes > MAX_CACHE_BYTES:
        height, width = scene.files[0].block
        raise ReadError(
            "too_large",
            f"{scene.uri} is stored in blocks of {width} × {height} pixels, of which a row of windows needs "
            f"{size_bytes} bytes; the limit is {MAX_CACHE_BYTES}; convert it with gdal_translate -of COG",
        )


def _contents(scene: Scene, bands: Sequence[int], size_bytes: int, notices: tuple[str, ...]) -> Iterator[Contents]:
    windows = scene.across.count * scene.down.count
    block = max(file.scene_block for file in scene.files)
    pieces = parts(scene.across, scene.down, block, scene.max_columns(bands))
    for part in pieces if windows else [NO_WINDOWS]:
        share = size_bytes * part.count // max(1, windows)
        yield Contents(part.count, {}, replace(scene, part=part), share, notices)
        notices = ()


def _notices(scene: Scene, options: ReadOptions) -> tuple[str, ...]:
    is_scaled = any((band.scale, band.offset) != (1, 0) for band in scene.bands)
    is_placed = scene.crs is not None and scene.transform is not None
    notices = (NO_GEOMETRY,) * (not is_placed) + (NOT_UNSCALED,) * (is_scaled and not options.harmonize)
    if not options.harmonize:
        return notices
    offset = f"the offset of {scene.offset:g} is subtracted" if scene.offset else "no offset is subtracted"
    return (*notices, f"Sentinel-2: {offset}, by {scene.reason}")


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read windows in the order of the file's blocks. The contract is in `pipeline.sources.base`."""
    scene = shard.payload
    if not isinstance(scene, Scene) or scene.fault:
        fault = ReadError(*scene.fault) if isinstance(scene, Scene) and scene.fault else _header_fault(shard, options)
        yield from Rows(shard, todo).finish(fault)
        return
    rows = scene.part.count if shard.rows is None else min(shard.rows, scene.part.count)
    numbers = [row for start, stop in intersect(todo, ((0, rows),)) for row in range(start, stop)]
    if numbers:
        yield from _windows(scene, numbers, options)
    yield ShardEnd(rows)


def _header_fault(shard: Shard, options: ReadOptions) -> ReadError:
    """Why a scene could not be planned."""
    try:
        list(shards(ObjectInfo(shard.uri, shard.size_bytes, shard.etag), options))
    except ReadError as error:
        return error
    except InputRefused as error:
        return ReadError("unsupported", str(error))
    return ReadError("unreadable", f"{shard.uri} could not be read when it was planned; --update reads it again")


def _windows(scene: Scene, numbers: list[int], options: ReadOptions) -> Iterator[Record]:
    """The records of some windows. A fault of the storage ends the scene: all further windows have it too."""
    fault: ReadError | None = None
    reader = None
    try:
        try:
            bands = chosen_bands(scene, options)
            present = [band for band in bands if band != FILLED]
            windows = [scene.spans(row) for row in numbers]
            reader = gdal().Reader(scene, present, max(CACHE_BYTES, scene.cache_bytes(present)), windows)
        except OSError as error:
            fault = storage_fault(scene.uri, error)
        except ReadError as error:
            fault = error
        for row in numbers:
            record, fault = _window(scene, row, reader, fault)
            if isinstance(record.data, np.ma.MaskedArray):
                record = replace(record, data=_with_fillers(_without_offset(record.data, scene), bands, options))
            yield record
    finally:
        if reader is not None:
            reader.close()


def _window(scene: Scene, row: int, reader: Any, fault: ReadError | None) -> tuple[Record, ReadError | None]:
    """The record of a window, and the fault that ends the scene. reader: None if there is such a fault already."""
    started = time.perf_counter()
    across, down = scene.spans(row)
    member = f"{across.start},{down.start}"
    record = Record(row, f"{scene.uri}#{member}", scene.uri, member, None)
    try:
        if fault:
            raise fault
        kept = planned_columns(scene, row)
        array = reader.read(across, down)
    except NightshiftError:
        raise
    except OSError as error:
        fault = storage_fault(scene.uri, error)
        return replace(record, error=fault, read_seconds=time.perf_counter() - started), fault
    except ReadError as error:
        return replace(record, error=error, read_seconds=time.perf_counter() - started), fault
    valid = _valid_fraction(array, across, down)
    kept["valid_fraction"] = valid
    is_empty = 1 - valid > scene.tiling.max_nodata or not valid
    seconds = time.perf_counter() - started
    return replace(record, data=None if is_empty else array, is_empty=is_empty, kept=kept, read_seconds=seconds), fault


def _without_offset(numbers: np.ma.MaskedArray, scene: Scene) -> np.ma.MaskedArray:
    """Subtract Sentinel-2's offset; what would be negative becomes 0, as before baseline 04.00."""
    if not scene.offset:
        return numbers
    offset = np.array(scene.offset, numbers.dtype)
    return np.ma.MaskedArray(np.maximum(numbers.data, offset) - offset, numbers.mask)


def _with_fillers(numbers: np.ma.MaskedArray, bands: Sequence[int], options: ReadOptions) -> np.ma.MaskedArray:
    """Insert the bands that the scene lacks: [height, width, present bands] → [height, width, bands]."""
    if FILLED not in bands:
        return numbers
    fillers = [band.filler for band, index in zip(options.wanted, bands, strict=True) if index == FILLED]
    holds_all = all(np.array(filler).astype(numbers.dtype) == filler for filler in fillers)
    shape = (*numbers.shape[:2], len(bands))
    present = [place for place, index in enumerate(bands) if index != FILLED]
    data, mask = np.empty(shape, numbers.dtype if holds_all else np.float64), np.zeros(shape, bool)
    data[..., present], mask[..., present] = numbers.data, np.ma.getmaskarray(numbers)
    data[..., [place for place, index in enumerate(bands) if index == FILLED]] = fillers
    return np.ma.MaskedArray(data, mask)


def _valid_fraction(array: np.ndarray, across: Span, down: Span) -> float:
    """Share of a window's pixels inside of the scene that have data in at least one band."""
    inside = array[: down.pixels, : across.pixels]
    missing = np.ma.getmaskarray(inside).all(axis=2)
    return float(1 - np.count_nonzero(missing) / missing.size)


def planned_columns(scene: Scene, row: int) -> dict[str, Any]:
    """The values of COLUMNS that follow from the plan alone: all but valid_fraction. Raises ReadError."""
    across, down = scene.spans(row)
    columns: dict[str, Any] = {
        "scene": scene.uri,
        "window_col": across.start,
        "window_row": down.start,
        "window_width": across.length,
        "window_height": down.length,
        **item_columns(scene.item),
    }
    if scene.transform is None:
        return columns
    from pipeline.geo import footprints

    window = footprints.Window(across.start, down.start, across.length, down.length)
    columns["transform"] = list(footprints.window_transform(scene.transform, window))
    if scene.crs is None:
        return columns
    columns["crs"] = scene.crs
    polygon = footprints.footprint(scene.transform, scene.crs, window)
    if polygon is not None:
        columns["geometry"] = polygon.wkb
        columns["bbox"] = dict(zip(("xmin", "ymin", "xmax", "ymax"), polygon.bounds, strict=True))
    return columns


def item_columns(item: Mapping[str, Any]) -> dict[str, Any]:
    """The values of ITEM_COLUMNS that an item has. item: as in `Scene`."""
    columns = dict(item)
    if text := columns.get("datetime"):
        columns["datetime"] = datetime.fromisoformat(text)
    return columns


def gdal() -> ModuleType:
    """The module that reads rasters. Raises InputRefused without the extra [geo]."""
    try:
        from pipeline.sources import gdal
    except ImportError as error:
        raise InputRefused(f"--tile-size needs {error.name}: pip install 'nightshift[geo]'") from error
    return gdal


def may_be_scene(info: ObjectInfo) -> bool:
    """Whether the header of an image is worth a look: a TIFF of some size."""
    return info.uri.lower().endswith((".tif", ".tiff")) and info.size_bytes >= MIN_SCENE_BYTES


def describe_as_image(info: ObjectInfo) -> str | None:
    """What the user should know of a scene that is read as one image; None for other images and broken files."""
    import tifffile  # takes long, and few archives need it

    try:
        with access.open_read(info.uri) as file, tifffile.TiffFile(file) as tiff:
            page: Any = tiff.pages[0]
            is_large = max(page.imagewidth, page.imagelength) > MAX_IMAGE_SIDE
            if is_large and any(tag in page.tags for tag in GEOREFERENCING_TAGS):
                size = f"{page.imagewidth} × {page.imagelength} pixels"
                return f"a georeferenced raster of {size} is read as one image; --tile-size 224 cuts it into windows"
    except Exception:  # of a store or a broken file: the run itself says it, in an error row
        return None
    return None


SOURCE = Source(
    "scene",
    (".vrt",),
    read,
    shards=shards,
    reads_header=True,
    payload=Scene,
    columns=COLUMNS,
    planned_columns=planned_columns,
)
