"""Raster files through GDAL (rasterio), whose bytes come from `pipeline.storage`. Needs the extra [geo].

GDAL opens files by a virtual file system that calls `_Files` here. So every store works with the same credentials and
retries as everywhere else, and a file that was replaced after planning is noticed.
"""

import logging
import math
import posixpath
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import affine
import numpy as np
import rasterio
import tifffile
from affine import Affine
from rasterio.abc import FileContainer
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.warp import reproject
from rasterio.windows import Window

from pipeline.errors import NightshiftError, ReadError, StorageRefused
from pipeline.geo.footprints import crs_name, pixel_metres
from pipeline.geo.windows import Span, Tiling
from pipeline.sources.read_ahead import Range, ReadAhead
from pipeline.sources.scene import Band, RasterFile, Scene
from pipeline.storage import access
from pipeline.storage.base import ObjectInfo
from pipeline.storage.uris import BUCKET_SCHEMES

DRIVERS = ("GTiff", "JP2OpenJPEG", "VRT")
CHUNK_BYTES = 1 << 16
CHUNKS = 32
CHUNKS_AHEAD = 8
"""Small reads, of headers and tables of tiles, are served from this many chunks of CHUNK_BYTES."""
AHEAD_BYTES = 32 << 20
"""Of compressed blocks of remote files that are fetched before GDAL asks for them, for one shard."""
READS_AHEAD = (*BUCKET_SCHEMES, "http", "https")
READ_BY_GDAL = (".aux.xml", ".ovr", ".msk")
HEADER_CACHE_BYTES = 16 << 20
MAX_FACTOR = 1e9
"""Pixels of a scene that become one of a window. No scene has as many side by side."""
REFUSED_ROLES = {
    ColorInterp.palette: "it has a table of colours; convert it with gdal_translate -expand rgb",
    ColorInterp.cyan: "its colours are CMYK; convert it to RGB",
    ColorInterp.Y: "its colours are YCbCr; convert it to RGB",
}

logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it logs what is raised here
# Without a transform GDAL warns; `Scene.transform` says it.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

T = TypeVar("T")


class _Bytes:
    """The bytes of one object. Large reads go to the store as they are, small ones to chunks that are kept."""

    def __init__(self, uri: str, etag: str) -> None:
        self.file = access.open_read(uri, etag)
        self.raw = getattr(self.file, "raw", self.file)  # a buffer would read megabytes for each tile
        self.size = self.raw.seek(0, 2)
        self.chunks: OrderedDict[int, bytes] = OrderedDict()
        self.ahead: ReadAhead | None = None

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, fewer at the end of the object."""
        stop = min(stop, self.size)
        if stop <= start:
            return b""
        if self.ahead and (data := self.ahead.find(start, stop)) is not None:
            return data
        if stop - start >= CHUNK_BYTES // 4:
            return self._fetch(start, stop)
        first, last = start // CHUNK_BYTES, (stop - 1) // CHUNK_BYTES
        data = b"".join(self._chunk(number) for number in range(first, last + 1))
        return data[start - first * CHUNK_BYTES : stop - first * CHUNK_BYTES]

    def _chunk(self, number: int) -> bytes:
        if number not in self.chunks:
            ahead = CHUNKS_AHEAD if number - 1 in self.chunks else 1  # strips, which are read one after the other
            start = number * CHUNK_BYTES
            data = self._fetch(start, min(start + ahead * CHUNK_BYTES, self.size))
            self.chunks[number] = b""  # of an object that has become shorter
            for offset in range(0, len(data), CHUNK_BYTES):
                self.chunks[number + offset // CHUNK_BYTES] = data[offset : offset + CHUNK_BYTES]
            while len(self.chunks) > CHUNKS:
                self.chunks.popitem(last=False)
        self.chunks.move_to_end(number)
        return self.chunks[number]

    def _fetch(self, start: int, stop: int) -> bytes:
        self.raw.seek(start)
        data = bytearray()
        while len(data) < stop - start:
            piece = self.raw.read(stop - start - len(data))
            if not piece:
                break
            data += piece
        return bytes(data)


class _Handle:
    """An open file of GDAL. It never raises, because GDAL's C code cannot pass an exception on."""

    def __init__(self, files: "_Files", data: _Bytes) -> None:
        self.files, self.data, self.position = files, data, 0

    def __enter__(self) -> "_Handle":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + {0: 0, 1: self.position, 2: self.data.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, size: int = -1) -> bytes:
        stop = self.data.size if size < 0 else self.position + size
        try:
            data = self.data.read(self.position, stop)
        except Exception as error:  # of any store
            self.files.fault = error
            return b""
        # GDAL reads a kilobyte at the start of every file, however short it is.
        self.files.is_cut_off |= len(data) < stop - self.position and self.position > 0
        self.position += len(data)
        return data

    def close(self) -> None:
        pass


class _Files(FileContainer):  # type: ignore[misc]
    """The files that GDAL may open: a raster, its siblings, and the rasters that a VRT names.

    fault: the error of the store, which GDAL reports as broken bytes. is_cut_off: a read went beyond the end of a file.
    """

    def __init__(self, etags: dict[str, str]) -> None:
        self.etags = etags
        self.is_open = any(uri.lower().endswith(".vrt") for uri in etags)
        self.fault: Exception | None = None
        self.is_cut_off = False
        self._bytes: dict[str, _Bytes] = {}

    def _load(self, path: str) -> _Bytes:
        uri = self._uri(path)
        if uri not in self._bytes:
            self._bytes[uri] = _Bytes(uri, self.etags.get(uri, ""))
        return self._bytes[uri]

    def _uri(self, path: str) -> str:
        """The URI of a file. Raises FileNotFoundError for a name that GDAL only tries out."""
        scheme, separator, rest = path.partition("://")
        uri = f"{scheme}{separator}{posixpath.normpath(rest)}" if separator else posixpath.normpath(path)
        if path in self.etags:
            return path
        if uri in self.etags or (self.is_open and uri.lower().endswith((".tif", ".tiff", ".jp2", ".j2k", ".vrt"))):
            return uri
        raise FileNotFoundError(path)

    def open(self, path: str, mode: str = "r", **_: Any) -> _Handle:
        try:
            return _Handle(self, self._load(path))
        except FileNotFoundError as error:
            if path in self.etags:
                self.fault = error
            raise
        except Exception as error:
            self.fault = error
            raise FileNotFoundError(path) from error

    def isfile(self, path: str) -> bool:
        try:
            return bool(self._load(path).size >= 0)
        except FileNotFoundError:
            return False
        except Exception as error:  # of any store
            self.fault = error
            return False

    def isdir(self, path: str) -> bool:
        return False

    def ls(self, path: str) -> list[str]:
        """Names in a folder, so that GDAL need not try out names."""
        return [posixpath.basename(uri) for uri in self.etags if posixpath.dirname(uri) == path.rstrip("/")]

    def mtime(self, path: str) -> int:
        return 0

    def size(self, path: str) -> int:
        return self._load(path).size

    def rm(self, path: str) -> None:
        raise PermissionError(path)

    def read_ahead(self, uri: str, steps: Iterable[Sequence[Range]], limit_bytes: int) -> ReadAhead | None:
        """Fetch the ranges of a file that the next steps need; None for a file that is not worth it."""
        data = self._load(uri)
        read_range = getattr(data.raw, "read_range", None)  # needs no position, so threads can share it
        if read_range is None or uri.partition("://")[0] not in READS_AHEAD:
            return None
        data.ahead = ReadAhead(lambda start, stop: bytes(read_range(start, min(stop, data.size))), steps, limit_bytes)
        return data.ahead

    def close(self) -> None:
        for data in self._bytes.values():
            if data.ahead:
                data.ahead.close()
            data.file.close()


class _Dataset:
    """An open raster. Every call of GDAL goes through `call`, which tells faults of the store from broken bytes."""

    def __init__(self, uri: str, etags: dict[str, str], cache_bytes: int) -> None:
        self.uri, self.files, self.cache_bytes = uri, _Files(etags), cache_bytes
        self.dataset: Any = None
        try:
            self.files.open(uri)  # raises nothing that GDAL would hide
        except FileNotFoundError:
            raise self.files.fault or FileNotFoundError(uri) from None
        try:
            self.dataset = self.call(lambda: rasterio.open(uri, opener=self.files))
        except BaseException:
            self.close()
            raise
        if self.dataset.driver not in DRIVERS:
            driver = self.dataset.driver
            self.close()
            raise ReadError("unsupported", f"{uri} is read by GDAL's driver {driver}, not by {', '.join(DRIVERS)}")

    def call(self, action: Callable[[], T]) -> T:
        """Raises OSError or StorageRefused for a fault of the store, ReadError (truncated, corrupt) for bad bytes."""
        self.files.is_cut_off = False
        try:
            with rasterio.Env(GDAL_CACHEMAX=self.cache_bytes):
                result = action()
        except (ReadError, NightshiftError, MemoryError):
            raise
        except Exception as error:  # rasterio passes on errors of GDAL that it does not document
            self._check_store()
            if isinstance(error, OSError) and not isinstance(error, RasterioError):
                raise
            kind = "truncated" if self.files.is_cut_off else "corrupt"
            reason = " ".join(str(error.__cause__ or error).split())
            raise ReadError(kind, f"{self.uri} cannot be read: {reason}") from error
        self._check_store()
        return result

    def _check_store(self) -> None:
        fault, self.files.fault = self.files.fault, None
        if isinstance(fault, (OSError, NightshiftError)):
            raise fault
        if fault is not None:
            raise OSError(f"{type(fault).__name__}: {fault}") from fault

    def close(self) -> None:
        if self.dataset is not None:
            self.dataset.close()
        self.files.close()


def inspect(info: ObjectInfo, tiling: Tiling, *, has_siblings: bool = True) -> tuple[Scene, dict[str, str]]:
    """The scene of a file and its metadata, from its header. has_siblings: look for files beside it.

    Raises ReadError, OSError and StorageRefused.
    """
    siblings = _siblings(info.uri) if has_siblings else {}
    dataset = _Dataset(info.uri, {info.uri: info.etag, **siblings}, HEADER_CACHE_BYTES)
    try:
        return dataset.call(lambda: (_scene(dataset.dataset, info, siblings, tiling), _metadata(dataset.dataset)))
    finally:
        dataset.close()


def _metadata(dataset: Any) -> dict[str, str]:
    """The tags of a file, with `SCALE:<band>` and `OFFSET:<band>` of the bands that have them."""
    metadata: dict[str, str] = dict(dataset.tags())
    for band, (scale, offset) in enumerate(zip(dataset.scales, dataset.offsets, strict=True)):
        if (scale, offset) != (1, 0):
            metadata |= {f"SCALE:{band}": str(scale), f"OFFSET:{band}": str(offset)}
    return metadata


def _siblings(uri: str) -> dict[str, str]:
    """The files beside a raster that GDAL reads with it: URI → etag."""
    stem, dot, suffix = uri.rpartition(".")
    worlds = [f"{stem}.{suffix[0]}{suffix[-1]}w", f"{stem}.wld"] if dot and suffix else []
    found = {}
    for name in [uri + suffix for suffix in READ_BY_GDAL] + worlds:
        try:
            found[name] = access.head(name).etag
        except (FileNotFoundError, PermissionError, StorageRefused):
            continue  # a bucket that may not be listed forbids what does not exist
    return found


def _scene(dataset: Any, info: ObjectInfo, siblings: dict[str, str], tiling: Tiling) -> Scene:
    bands = tuple(_band(dataset, index) for index in range(1, dataset.count + 1))
    _check(dataset, bands, info.uri)
    transform, crs = _georeferencing(dataset, info.uri, siblings)
    is_interleaved = dataset.count > 1 and dataset.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL"
    block = max(dataset.block_shapes)
    file = RasterFile(info.uri, info.etag, bands, tuple(block), is_interleaved, siblings)
    factors = _factors(dataset, transform, crs, tiling, info.uri)
    return Scene((file,), dataset.width, dataset.height, transform, crs, tiling, factors)


def _band(dataset: Any, index: int) -> Band:
    flags = dataset.mask_flag_enums[index - 1]
    mask = next((name for flag, name in MASKS.items() if flag in flags), "")
    return Band(
        dataset.dtypes[index - 1],
        dataset.colorinterp[index - 1].name,
        dataset.descriptions[index - 1] or "",
        dataset.nodatavals[index - 1],
        mask,
        dataset.scales[index - 1],
        dataset.offsets[index - 1],
    )


MASKS = {MaskFlags.alpha: "alpha", MaskFlags.nodata: "nodata", MaskFlags.per_dataset: "mask"}


def _check(dataset: Any, bands: Sequence[Band], uri: str) -> None:
    """Raise ReadError (unsupported) for a raster whose numbers would not be read as they are meant."""
    reasons = [REFUSED_ROLES[role] for role in dataset.colorinterp if role in REFUSED_ROLES]
    structure = {**dataset.tags(ns="IMAGE_STRUCTURE"), **dataset.tags(1, ns="IMAGE_STRUCTURE")} if bands else {}
    bits = int(structure.get("NBITS", 8))
    if not bands:
        reasons.append("it has no band; name one of its subdatasets in a VRT")
    elif len({band.dtype for band in bands}) > 1:
        reasons.append(f"its bands have different number types ({', '.join(band.dtype for band in bands)})")
    elif np.dtype(bands[0].dtype).kind not in "iuf":
        reasons.append(f"its numbers are {bands[0].dtype}")
    if len(dataset.subdatasets) > 1:
        reasons.append(f"it has {len(dataset.subdatasets)} pages; write each to a file of its own")
    if structure.get("MINISWHITE") == "YES":
        reasons.append("its white is zero; invert it")
    if bits < 8:
        reasons.append(f"it has {bits} bits per number; convert it with gdal_translate -co NBITS=8")
    if reasons:
        raise ReadError("unsupported", f"{uri} is not supported as a scene: {reasons[0]}")


def _georeferencing(
    dataset: Any, uri: str, siblings: dict[str, str]
) -> tuple[tuple[float, float, float, float, float, float] | None, str | None]:
    """Transform and CRS, each None if the file has none. Raises ReadError (unsupported) for GCPs, RPCs and a CRS that
    is not one of the Earth's surface."""
    points, _ = dataset.gcps
    placement = dataset.transform if not dataset.transform.is_identity else _world_file(siblings)
    has_transform = placement is not None
    if not has_transform and (points or dataset.rpcs):
        kind = "ground control points" if points else "RPCs"
        raise ReadError(
            "unsupported",
            f"{uri} is placed by {kind} alone, which give no exact footprint; warp it with gdalwarp, as in "
            "gdalwarp -t_srs EPSG:4326",
        )
    if placement is None:
        return None, None
    transform = tuple(float(number) for number in tuple(placement)[:6])
    if not all(map(math.isfinite, transform)) or placement.is_degenerate:
        raise ReadError("unsupported", f"{uri} has an invalid transform: {transform}")
    try:
        return transform, crs_name(dataset.crs.to_wkt(version="WKT2_2019")) if dataset.crs else None  # type: ignore[return-value]
    except ReadError as error:
        raise ReadError(error.error_type, f"{uri}: {error.message}") from error


def _world_file(siblings: dict[str, str]) -> Affine | None:
    """The transform of a world file, which GDAL does not read through rasterio's virtual files."""
    for uri, etag in siblings.items():
        if not uri.endswith(READ_BY_GDAL):
            try:
                return affine.loadsw(access.read(uri, etag).decode("ascii"))
            except ValueError as error:
                raise ReadError("corrupt", f"{uri} is no world file: {error}") from error
    return None


def _factors(
    dataset: Any,
    transform: tuple[float, float, float, float, float, float] | None,
    crs: str | None,
    tiling: Tiling,
    uri: str,
) -> tuple[float, float]:
    """Pixels of the scene per pixel of a window, across and down."""
    if tiling.resolution is None:
        return 1.0, 1.0
    if transform is None or crs is None:
        raise ReadError("unsupported", f"{uri} has no CRS or no transform, which --resolution needs; leave it out")
    across, down = pixel_metres(transform, crs, dataset.width, dataset.height)
    if not all(0 < tiling.resolution / metres < MAX_FACTOR for metres in (across, down)):
        raise ReadError("unsupported", f"{uri} has pixels of {across:g} × {down:g} metres; is its transform right?")
    factors = _whole(tiling.resolution / across), _whole(tiling.resolution / down)
    if tiling.stride * min(factors) < 1:
        raise ReadError(
            "unsupported",
            f"{uri} has pixels of {max(across, down):g} metres: at --resolution {tiling.resolution:g} several windows "
            "would begin at one pixel; give a larger one",
        )
    return factors


def _whole(factor: float) -> float:
    """The factor, as a whole number if it is one but for rounding: 0.04 % are less than a tenth of a pixel in 224."""
    return float(round(factor)) if round(factor) and abs(factor / round(factor) - 1) < 4e-4 else factor


RESAMPLINGS = {name: Resampling[name] for name in ("nearest", "bilinear", "cubic", "average")}
MAX_NATIVE_PIXELS = 1 << 25
"""Of one band, which are read at once before they are averaged without zeros."""
MARGIN_PIXELS = 3
"""Of a file around a window, which cubic resampling needs."""
ANY_CRS = "EPSG:3857"
"""`reproject` needs a CRS; source and destination have the same, so that it does not matter which."""


def _block_numbers(start: float, length: float, block: int, margin: int, whole: int) -> range:
    """The blocks that a range of pixels touches. whole: length of the file's side."""
    first, last = max(0, math.floor(start) - margin), min(whole, math.ceil(start + length) + margin)
    return range(first // block, -(-last // block))


UNIT = Affine.scale(10, -10)
"""Size of a file's pixels for `reproject`. GDAL takes pixels of 1 × 1 at 0, 0 for a file without a transform."""


class Reader:
    """Reads windows of a scene. Not thread-safe."""

    def __init__(
        self, scene: Scene, bands: Sequence[int], cache_bytes: int, windows: Sequence[tuple[Span, Span]] = ()
    ) -> None:
        """bands: indices over all files of the scene. windows: those that will be read, in order; blocks of remote
        files are fetched ahead for them. Raises OSError, ReadError and StorageRefused."""
        self.scene, self.size, self.bands = scene, scene.tiling.size, len(bands)
        self.dtype = np.dtype(scene.bands[bands[0]].dtype)
        self.files: list[_BandReader] = []
        first = 0
        try:
            for file in scene.files:
                places = [place for place, band in enumerate(bands) if first <= band < first + len(file.bands)]
                if places:
                    indices = [bands[place] - first for place in places]
                    self.files.append(_BandReader(scene, file, indices, places, cache_bytes))
                    self.files[-1].check_blocks()
                first += len(file.bands)
            for each in self.files:
                each.read_ahead(windows, AHEAD_BYTES // len(self.files))
        except BaseException:
            self.close()
            raise

    def read(self, across: Span, down: Span) -> np.ma.MaskedArray:
        """A window [size, size, bands] in the file's number type, masked where a band has no data.

        Outside of the scene all is masked. Raises OSError, ReadError and StorageRefused.
        """
        data = np.zeros((self.size, self.size, self.bands), self.dtype)
        mask = np.zeros(data.shape, bool)
        mask[down.pixels :], mask[:, across.pixels :] = True, True
        for file in self.files:
            numbers, missing = file.read(across, down)
            inside = np.s_[: down.pixels, : across.pixels, file.places]
            data[inside] = numbers.transpose(1, 2, 0)
            if missing is not None:
                mask[inside] = missing.transpose(1, 2, 0)
        return np.ma.MaskedArray(data, mask if mask.any() else np.ma.nomask)

    def close(self) -> None:
        for file in self.files:
            file.input.close()


class _BandReader:
    """Reads windows of some bands of one file. places: of these bands in the window."""

    def __init__(
        self, scene: Scene, file: RasterFile, bands: Sequence[int], places: Sequence[int], cache_bytes: int
    ) -> None:
        """bands: indices in the file."""
        self.scene, self.file, self.places = scene, file, list(places)
        self.indexes = [index + 1 for index in bands]
        self.masks = {file.bands[index].mask for index in bands}
        self.input = _Dataset(file.uri, {file.uri: file.etag, **file.siblings}, cache_bytes)
        self.ahead: ReadAhead | None = None
        self.steps: dict[tuple[Span, Span], int] = {}

    def read_ahead(self, windows: Sequence[tuple[Span, Span]], limit_bytes: int) -> None:
        """Fetch the blocks of the windows before they are read. Only a TIFF says where its blocks are, and only blocks
        of full resolution are known to be the ones that GDAL reads."""
        if len(windows) < 2 or self.input.dataset.driver != "GTiff" or self.scene.is_resampled:
            return
        steps = (self._blocks(*window) for window in windows)
        self.ahead = self.input.files.read_ahead(self.file.uri, steps, limit_bytes)
        self.steps = {window: step for step, window in enumerate(windows)}

    def _blocks(self, across: Span, down: Span) -> list[Range]:
        """The ranges of the file with the blocks of a window."""
        window, (height, width) = self._window(across, down), self.file.block
        margin = 0 if self.file.factor == (1.0, 1.0) else MARGIN_PIXELS
        columns = _block_numbers(window.col_off, window.width, width, margin, self.input.dataset.width)
        rows = _block_numbers(window.row_off, window.height, height, margin, self.input.dataset.height)
        bands = self.indexes[:1] if self.file.is_interleaved else self.indexes
        places = [(column, row, band) for row in rows for column in columns for band in bands]
        return [found for place in places if (found := self._block(*place))]

    def _block(self, column: int, row: int, band: int) -> Range | None:
        """None for a block that a sparse file does not have."""
        names = (f"BLOCK_OFFSET_{column}_{row}", f"BLOCK_SIZE_{column}_{row}")
        offset, size = (self.input.dataset.get_tag_item(name, "TIFF", bidx=band) for name in names)
        return (int(offset), int(offset) + int(size)) if offset and size else None

    def check_blocks(self) -> None:
        """Raise ReadError (corrupt) if the header of a TIFF lists fewer blocks than its size has.

        GDAL would read the others as zeros, and those of another band in their place. A sparse file lists all blocks;
        those that it lacks have no data.
        """
        dataset = self.input.dataset
        if dataset.driver != "GTiff" or self.input.call(lambda: self._has_last_block()):
            return
        with access.open_read(self.file.uri, self.file.etag) as file, tifffile.TiffFile(file) as tiff:
            page: Any = tiff.pages[0]
            listed, blocks = len(page.dataoffsets), math.prod(page.chunked)
        if listed < blocks:
            raise ReadError(
                "corrupt",
                f"{self.file.uri} lacks blocks: its size of {dataset.width} × {dataset.height} pixels has {blocks}, "
                f"and its header lists {listed}",
            )

    def _has_last_block(self) -> bool:
        dataset, (height, width) = self.input.dataset, self.file.block
        last = f"BLOCK_OFFSET_{(dataset.width - 1) // width}_{(dataset.height - 1) // height}"
        return dataset.get_tag_item(last, "TIFF", bidx=dataset.count) is not None

    def read(self, across: Span, down: Span) -> tuple[np.ndarray, np.ndarray | None]:
        """Numbers [bands, height, width] of a window, and True for those without data; None if all have data."""
        if self.ahead and (step := self.steps.get((across, down))) is not None:
            self.input.call(partial(self.ahead.advance, step))
        window = self._window(across, down)
        shape = down.pixels, across.pixels
        is_without_zeros = self.scene.zero_is_missing and self.masks == {""}
        read = self._read_without_zeros if is_without_zeros else self._read
        data, missing = self.input.call(lambda: read(window, shape))
        if missing is None and data.all():  # GDAL fills blocks that a file lacks with 0 or the value of no data
            return data, None
        absent = self.input.call(lambda: self._absent(window, shape))
        if not absent.any():
            return data, missing
        return data, absent if missing is None else missing | absent

    def _absent(self, window: Window, shape: tuple[int, int]) -> np.ndarray:
        """True [bands, height, width] for pixels in blocks that a TIFF does not have."""
        absent = np.zeros((len(self.indexes), *shape), bool)
        dataset = self.input.dataset
        if dataset.driver != "GTiff":
            return absent
        height, width = self.file.block
        rows = window.row_off + (np.arange(shape[0]) + 0.5) * window.height / shape[0]
        columns = window.col_off + (np.arange(shape[1]) + 0.5) * window.width / shape[1]
        rows, columns = (rows // height).astype(int), (columns // width).astype(int)
        for place, index in enumerate(self.indexes):
            if self.file.is_interleaved and place:
                absent[place] = absent[0]
                continue
            for row in np.unique(rows):
                for column in np.unique(columns):
                    if dataset.get_tag_item(f"BLOCK_OFFSET_{column}_{row}", "TIFF", bidx=index) is None:
                        absent[place] |= (rows == row)[:, None] & (columns == column)
        return absent

    def _window(self, across: Span, down: Span) -> Window:
        """The part of the file that a window covers, in its own pixels."""
        x, y = self.file.factor
        left, top = across.start / x, down.start / y
        right = min((across.start + across.length) / x, self.input.dataset.width)
        bottom = min((down.start + down.length) / y, self.input.dataset.height)
        return Window(left, top, right - left, bottom - top)

    def _resampling(self, window: Window, shape: tuple[int, int]) -> Resampling:
        chosen = self.scene.tiling.resampling
        if chosen in RESAMPLINGS:
            return RESAMPLINGS[chosen]
        enlarges = window.width < shape[1] or window.height < shape[0]
        return Resampling.bilinear if enlarges else Resampling.average

    def _read(self, window: Window, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        how = {
            "window": window,
            "out_shape": (len(self.indexes), *shape),
            "resampling": self._resampling(window, shape),
        }
        data = self.input.dataset.read(self.indexes, **how)
        missing = None
        if "nodata" in self.masks:
            missing = self.input.dataset.read_masks(self.indexes, **how) == 0
        elif self.masks != {""}:  # one mask for all bands
            mask = self.input.dataset.read_masks(self.indexes[0], **{**how, "out_shape": shape}) == 0
            missing = np.broadcast_to(mask, data.shape)
        if self.scene.zero_is_missing:
            missing = data == 0 if missing is None else missing | (data == 0)
        if data.dtype.kind == "f" and (bad := np.isnan(data)).any():
            missing = bad if missing is None else missing | bad
        return data, missing if missing is not None and missing.any() else None

    def _read_without_zeros(self, window: Window, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray | None]:
        """As `_read`, where 0 is no data although the file does not say so: it must not be mixed into other numbers."""
        if (window.height, window.width) == shape:
            return self._read(window, shape)
        data = np.zeros((len(self.indexes), *shape), self.input.dataset.dtypes[0])
        resampling = self._resampling(window, shape)
        height = window.height / shape[0]  # in the file, of one row of the result
        rows = max(1, int(MAX_NATIVE_PIXELS / (window.width * height)))
        for index, target in zip(self.indexes, data, strict=True):
            for first in range(0, shape[0], rows):
                strip = target[first : first + rows]
                part = Window(window.col_off, window.row_off + first * height, window.width, len(strip) * height)
                self._resample(index, part, strip, resampling)
        missing = data == 0
        return data, missing if missing.any() else None

    def _resample(self, index: int, window: Window, target: np.ndarray, resampling: Resampling) -> None:
        """Fill [height, width] with a band's numbers in a window; 0 where all of them are 0."""
        left, top = (max(0, math.floor(start) - MARGIN_PIXELS) for start in (window.col_off, window.row_off))
        right = min(math.ceil(window.col_off + window.width) + MARGIN_PIXELS, self.input.dataset.width)
        bottom = min(math.ceil(window.row_off + window.height) + MARGIN_PIXELS, self.input.dataset.height)
        reproject(
            self.input.dataset.read(index, window=Window(left, top, right - left, bottom - top)),
            target,
            src_transform=UNIT @ Affine.translation(left, top),
            dst_transform=UNIT
            @ Affine.translation(window.col_off, window.row_off)
            @ Affine.scale(window.width / target.shape[1], window.height / target.shape[0]),
            src_crs=ANY_CRS,
            dst_crs=ANY_CRS,
            src_nodata=0,
            dst_nodata=0,
            resampling=resampling,
        )
