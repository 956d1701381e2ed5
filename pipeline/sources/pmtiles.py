"""PMTiles version 3: tiles by their places on a Hilbert curve, in one file (github.com/protomaps/PMTiles, spec/v3).

Planning reads the header and the directories, reading reads the tiles, both as ranges: no archive is fetched as a
whole. A shard is a run of tile ids. The package `pmtiles` parses the header. It reads directories one number at a time
and only with gzip, so they are decoded here, in arrays.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.coverage import Ranges
from pipeline.errors import InputRefused, ReadError
from pipeline.geo.tiles import MAX_ZOOM, Selection, first_id, id_ranges, tiles_of_ids
from pipeline.sources import tiles
from pipeline.sources.base import Contents, NoImages, ReadOptions, Record, ShardEnd, Source
from pipeline.sources.records import MAX_MEMBER_BYTES, storage_fault, too_large
from pipeline.sources.shard import Shard
from pipeline.sources.tiles import TILES_PER_SHARD, Lost, NoTiles, Numbers, Oversized, TileArchive, TileRun, decompress
from pipeline.storage import access
from pipeline.storage.base import ObjectInfo, RawReader
from pipeline.threads import ordered_map

HEADER_BYTES = 127
MAX_DEPTH = 4
"""Levels of directories. The specification has two; more than four are a loop."""
DIRECTORY_BYTES = 1 << 20
"""Leaf directories lie one after the other, and are read in pieces of this size."""
MAX_DIRECTORY_BYTES = 8 << 20
"""Of one directory, decompressed: about a million entries. Writers cut directories after some thousand."""
MAX_TILES = 6_000_000_000
"""To plan of one archive: the whole Earth up to zoom 16 has fewer."""
MAX_NUMBER = (1 << 32) - 1
"""Size and run length of an entry, which writers store in 32 bits."""
MAX_OFFSET = 1 << 62
SPAN_BYTES = 2 << 20
GAP_BYTES = 64 << 10
"""Neighbouring tiles are read in one request of up to SPAN_BYTES. They may have a gap of GAP_BYTES."""
THREADS = 8
"""Requests at once to an object store."""

MORE_TILES = "its directories have more tiles than its header counts; all of them are read"

ReadRange = Callable[[int, int], bytes]
"""(start, stop) → exactly these bytes. Raises OSError."""


class _Entries(NamedTuple):
    """Entries of a directory, as arrays. runs: number of tiles with this content, 0 for a leaf directory."""

    ids: Numbers
    runs: Numbers
    sizes: Numbers
    offsets: Numbers

    def take(self, index: Any) -> "_Entries":
        return _Entries(*(column[index] for column in self))


def shards(info: ObjectInfo, options: ReadOptions) -> Iterator[Contents]:
    """The shards of an archive, from its directories. Raises ReadError, NoImages and InputRefused."""
    try:
        with access.open_read(info.uri, info.etag) as file:
            size_bytes = file.seek(0, os.SEEK_END)
            if not size_bytes:
                raise ReadError("empty", f"{info.uri} has no bytes")
            read_range = _range_reader(file)
            header = _header(info.uri, read_range(0, min(HEADER_BYTES, size_bytes)))
            directories = _Directories(info.uri, header, read_range, size_bytes, options.selection)
            is_empty = True
            for contents in _counted(_cut(directories.entries()), header, is_all=options.selection.is_all):
                is_empty = False
                yield contents
            if is_empty and options.selection.is_all:
                raise NoTiles(f"{info.uri} has no tiles")
    except OSError as error:
        raise storage_fault(info.uri, error) from error


def _counted(pieces: Iterator[_Entries | Lost], header: dict[str, Any], *, is_all: bool) -> Iterator[Contents]:
    """The shards, whose number of tiles is compared with the header's: with fewer one is lost, and more are read too.

    More than MAX_TILES end the archive. is_all: all tiles are selected.
    """
    count = header["addressed_tiles_count"]  # 0 if unknown
    tiles, is_whole = 0, True
    for piece in pieces:
        if isinstance(piece, Lost):
            is_whole = False
            yield piece.contents()
            continue
        before, tiles = tiles, tiles + int(piece.runs.sum())
        if tiles > MAX_TILES:
            yield Lost(
                f"it has more than {MAX_TILES} tiles, of which {before} are read; select some with --zoom and --bbox",
                "too_large",
            ).contents()
            return
        notices = (MORE_TILES,) if before <= count < tiles and count else ()
        yield replace(_contents(piece, header), notices=notices)
    if is_all and is_whole and tiles < count:
        yield Lost(f"its directories have only {tiles} of the {count} tiles of its header").contents()


def _header(uri: str, data: bytes) -> dict[str, Any]:
    """The header. Raises ReadError if it is none, and NoImages if the tiles are not images."""
    try:
        from pmtiles.tile import Compression, TileType, deserialize_header
    except ImportError as error:
        raise InputRefused(f"{uri}: PMTiles need pip install 'nightshift[geo]'") from error
    if data[:2] == b"PM" and data[:7] != b"PMTiles":
        raise ReadError("unsupported", f"{uri} is PMTiles of version 1 or 2: convert it with `pmtiles convert`")
    if data[:7] != b"PMTiles" or len(data) < HEADER_BYTES:
        raise ReadError("corrupt", f"{uri} is not PMTiles, or its header is broken")
    if data[7] != 3:
        raise ReadError("unsupported", f"{uri} is PMTiles of version {data[7]}: version 3 is read")
    kinds = {each.value: each.name for each in TileType}
    kind = kinds.get(data[99], str(data[99]))
    if kind not in ("PNG", "JPEG", "WEBP", "AVIF"):
        what = "vector tiles" if kind in ("MVT", "MLT") else "tiles of an unknown kind"
        raise NoImages(f"{uri} holds {what} ({kind.lower()}): images are png, jpeg, webp or avif")
    compressions = {each.value for each in Compression}
    if data[97] not in compressions or data[98] not in compressions or not data[97]:
        raise ReadError("unsupported", f"{uri}: its compression has the unknown numbers {data[97]} and {data[98]}")
    header: dict[str, Any] = {**deserialize_header(data)}
    names = {Compression.GZIP: "gzip", Compression.ZSTD: "zstd", Compression.BROTLI: "brotli"}
    for name in ("internal_compression", "tile_compression"):
        header[name] = names.get(header[name], "")
    for name in ("root_offset", "root_length", "leaf_directory_offset", "leaf_directory_length", "tile_data_offset"):
        if header[name] > MAX_OFFSET:
            raise ReadError("corrupt", f"{uri}: the {name} in its header is {header[name]}, which no file reaches")
    if header["tile_compression"] == "brotli":
        tiles.require_brotli()
    return header


class _Directories:
    """The directories of one archive.

    The zooms in its header are not used: if they are wrong, a selection must not lose tiles.
    """

    def __init__(
        self, uri: str, header: dict[str, Any], read_range: ReadRange, size_bytes: int, selection: Selection
    ) -> None:
        self.uri, self.header, self.selection = uri, header, selection
        self.read_range, self.size_bytes = read_range, size_bytes
        self.window, self.window_start = b"", 0

    def entries(self) -> Iterator[_Entries | Lost]:
        """The entries of the selected tiles, by tile id. Raises ReadError if the root directory is broken."""
        root = self._read(self.header["root_offset"], self.header["root_length"], self.header["root_length"])
        if isinstance(root, Lost):
            raise ReadError(root.error_type, f"{self.uri}: {root.message}")
        yield from self._walk(root, first_id(MAX_ZOOM + 1), 1)

    def _walk(self, directory: _Entries, end: int, depth: int) -> Iterator[_Entries | Lost]:
        """The entries of a directory and of its leaves. end: the first tile id after it."""
        is_leaf = directory.runs == 0
        ends = np.append(directory.ids[1:], end)
        cuts = np.flatnonzero(is_leaf[1:] != is_leaf[:-1]) + 1
        for group in np.split(np.arange(len(is_leaf)), cuts):
            if not len(group):
                continue
            if not is_leaf[group[0]]:
                yield from self._tiles(directory.take(group))
                continue
            yield from self._leaves(directory, group, ends, depth)

    def _tiles(self, entries: _Entries) -> Iterator[_Entries | Lost]:
        """The selected parts of entries of tiles, without those that stand for more tiles than there are."""
        count = self.header["addressed_tiles_count"]
        is_broken = (entries.runs > count) if count else np.zeros(len(entries.ids), bool)
        for tile_id, run in zip(entries.ids[is_broken].tolist(), entries.runs[is_broken].tolist(), strict=True):
            z, x, y = (int(column[0]) for column in tiles_of_ids([tile_id]))
            yield Lost(f"the entry of tile {z}/{x}/{y} stands for {run} tiles, more than the {count} of its header")
        entries = entries.take(~is_broken)
        if not self.selection.is_all:
            entries = _within(entries, id_ranges(self.selection, entries.ids, entries.ids + entries.runs))
        if len(entries.ids):
            yield entries

    def _leaves(self, directory: _Entries, group: Numbers, ends: Numbers, depth: int) -> Iterator[_Entries | Lost]:
        """The entries of the leaves with selected tiles. group: indices of leaves; ends: of the directory's entries."""
        starts, stops = directory.ids[group], ends[group]
        if not self.selection.is_all:
            ranges = id_ranges(self.selection, starts, stops, is_exact=False)
            group = group[_overlaps(starts, stops, ranges)]
        _, first = np.unique(directory.offsets[group], return_index=True)
        if len(first) < len(group):  # the same tiles cannot be in two places, and reading them again takes long
            yield Lost(f"{len(group) - len(first)} of its directories are another one again")
        for index in group[np.sort(first)].tolist():
            yield from self._leaf(directory, index, int(ends[index]), depth)

    def _leaf(self, directory: _Entries, index: int, end: int, depth: int) -> Iterator[_Entries | Lost]:
        offset, size = int(directory.offsets[index]), int(directory.sizes[index])
        if depth == MAX_DEPTH:
            yield Lost(f"the directory at {offset} is more than {MAX_DEPTH} levels deep")
            return
        section = self.header["leaf_directory_offset"]
        ahead = self.header["leaf_directory_length"] - offset
        leaf = self._read(section + offset, size, min(ahead, DIRECTORY_BYTES))
        if isinstance(leaf, Lost):
            yield leaf
        elif len(leaf.ids) and not (directory.ids[index] <= leaf.ids[0] and leaf.ids[-1] + leaf.runs[-1] <= end):
            yield Lost(f"the directory at {section + offset} has tiles of another one")
        else:
            yield from self._walk(leaf, end, depth + 1)

    def _read(self, offset: int, size: int, ahead: int) -> _Entries | Lost:
        """Read a directory. ahead: bytes to fetch, if it is not among those of the last request."""
        name = f"the directory at {offset}"
        if size > MAX_DIRECTORY_BYTES:
            return Lost(f"{name} has {size} bytes; the limit is {MAX_DIRECTORY_BYTES}", "too_large")
        if size <= 0 or offset + size > self.size_bytes:
            return Lost(f"{name} lies outside of the file, which may have been cut short")
        start = offset - self.window_start
        if not 0 <= start <= start + size <= len(self.window):
            stop = min(offset + max(size, ahead), self.size_bytes)
            try:
                self.window, self.window_start, start = self.read_range(offset, stop), offset, 0
            except OSError as error:
                return Lost(f"{name} cannot be read: {error}", "unreadable")
        try:
            data = self.window[start : start + size]
            compression = self.header["internal_compression"]
            return _decode(decompress(data, compression, MAX_DIRECTORY_BYTES) if compression else data)
        except Oversized as error:
            return Lost(f"{name}: {error}", "too_large")
        except ValueError as error:
            return Lost(f"{name} is broken: {error}")


def _decode(data: bytes) -> _Entries:
    """Decode a directory: the number of entries, then four columns of that many numbers. Raises ValueError."""
    numbers = _varints(data)
    count = int(numbers[0]) if len(numbers) else -1
    if len(numbers) != 1 + 4 * count:
        raise ValueError(f"it has {len(numbers)} numbers for {count} entries")
    steps, runs, sizes, places = numbers[1:].reshape(4, count)
    if count and (max(runs.max(), sizes.max()) > MAX_NUMBER or places.max() > MAX_OFFSET):
        raise ValueError("the size, length or offset of an entry is larger than any archive has")
    ids = np.cumsum(steps)
    # A place of 0 continues at the end of the entry before it; any other one is an offset plus 1.
    ends = np.cumsum(sizes)
    anchors = np.maximum.accumulate(np.where(places > 0, np.arange(count), 0))
    offsets = places[anchors] - 1 + (ends - sizes) - (ends - sizes)[anchors]
    next_ids = np.append(ids[1:], first_id(MAX_ZOOM + 1))
    if (offsets < 0).any() or (ids < 0).any() or (np.maximum(runs, 1) > next_ids - ids).any():
        raise ValueError("its tiles overlap or are not sorted")
    return _Entries(ids, runs, sizes, offsets)


def _varints(data: bytes) -> Numbers:
    """Decode unsigned LEB128 numbers below 2^63. Raises ValueError."""
    values = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(values < 128)
    if not len(values) or not len(ends) or ends[-1] != len(values) - 1:
        raise ValueError("it ends within a number")
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > 9:
        raise ValueError("it holds a number of more than 63 bits")
    shifts = 7 * (np.arange(len(values)) - np.repeat(starts, lengths))
    return np.add.reduceat((values & 127).astype(np.int64) << shifts, starts)


def _overlaps(starts: Numbers, stops: Numbers, ranges: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each [start, stop) overlaps one of the sorted ranges."""
    first = np.searchsorted(ranges[:, 1], starts, side="right")
    return first < np.searchsorted(ranges[:, 0], stops, side="left")


def _within(entries: _Entries, ranges: NDArray[np.int64]) -> _Entries:
    """The parts of entries that lie within the sorted ranges."""
    stops = entries.ids + entries.runs
    first = np.searchsorted(ranges[:, 1], entries.ids, side="right")
    counts = np.maximum(np.searchsorted(ranges[:, 0], stops, side="left") - first, 0)
    index = np.repeat(np.arange(len(counts)), counts)
    chosen = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(len(index))
    parts = entries.take(index)
    starts = np.maximum(parts.ids, ranges[chosen, 0])
    return parts._replace(ids=starts, runs=np.minimum(stops[index], ranges[chosen, 1]) - starts)


def _cut(pieces: Iterator[_Entries | Lost]) -> Iterator[_Entries | Lost]:
    """Join entries and cut them after TILES_PER_SHARD tiles each, also within a run."""
    waiting = _Entries(*(np.empty(0, np.int64) for _ in range(4)))
    for piece in pieces:
        if isinstance(piece, Lost):
            yield piece
            continue
        waiting = _Entries(*(np.concatenate(columns) for columns in zip(waiting, piece, strict=True)))
        while int(waiting.runs.sum()) >= TILES_PER_SHARD:
            first, waiting = _split(waiting, TILES_PER_SHARD)
            yield first
    if len(waiting.ids):
        yield waiting


def _split(entries: _Entries, rows: int) -> tuple[_Entries, _Entries]:
    """The entries of the first `rows` tiles, and the others."""
    ends = np.cumsum(entries.runs)
    last = int(np.searchsorted(ends, rows))
    first, rest = entries.take(slice(last + 1)), entries.take(slice(last, None))
    used = rows - int(ends[last] - entries.runs[last])
    first = first._replace(runs=np.append(first.runs[:-1], used))
    rest = rest._replace(ids=np.append(rest.ids[0] + used, rest.ids[1:]))
    rest = rest._replace(runs=np.append(rest.runs[0] - used, rest.runs[1:]))
    return first, rest.take(rest.runs > 0)


def _contents(entries: _Entries, header: dict[str, Any]) -> Contents:
    runs = entries.runs
    numbers = np.arange(int(runs.sum())) - np.repeat(np.cumsum(runs) - runs, runs)
    ids, sizes, offsets = (np.repeat(column, runs) for column in (entries.ids, entries.sizes, entries.offsets))
    _, contents = np.unique(np.stack([offsets, sizes], axis=1), axis=0, return_inverse=True)
    run = TileRun.of(ids + numbers, contents.ravel(), offsets + header["tile_data_offset"], sizes)
    return Contents(len(ids), {}, replace(run, compression=header["tile_compression"]), sum(run.sizes))


def _read(shard: Shard, contents: list[int]) -> Iterator[bytes | ReadError]:
    """The stored bytes of contents, several neighbours per request."""
    run = shard.payload
    assert isinstance(run, TileRun)
    places = [(run.places[content], run.places[content] + run.sizes[content]) for content in contents]
    with access.open_read(shard.uri, shard.etag) as file:
        size_bytes = file.seek(0, os.SEEK_END)
        read_range = _range_reader(file)

        def read_span(span: list[tuple[int, int]]) -> list[bytes | ReadError]:
            start, stop = span[0][0], span[-1][1]
            if stop - start > MAX_MEMBER_BYTES:
                return [too_large(shard.uri, f"the tile at {start}", stop - start)]
            if stop > size_bytes:
                return [ReadError("corrupt", f"{shard.uri} was cut short: the tile at {start} ends after its end")]
            data = read_range(start, stop)
            return [data[first - start : last - start] for first, last in span]

        if isinstance(getattr(file, "raw", None), RawReader):
            spans = ordered_map(read_span, _spans(places, size_bytes), THREADS, THREADS)
        else:
            spans = map(read_span, ([place] for place in places))
        for span in spans:
            yield from span


def _spans(places: list[tuple[int, int]], size_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """Group the places of tiles that one request reads. A tile that ends after `size_bytes` is alone."""
    span: list[tuple[int, int]] = []
    for start, stop in places:
        if span:
            is_near = 0 <= start - span[-1][1] <= GAP_BYTES and stop - span[0][0] <= SPAN_BYTES
            if not is_near or stop > size_bytes or span[-1][1] > size_bytes:
                yield span
                span = []
        span.append((start, stop))
    if span:
        yield span


def _range_reader(file: BinaryIO) -> ReadRange:
    """Reads exactly the bytes asked for; a buffered file would read 8 MiB around them."""
    raw = getattr(file, "raw", None)
    if isinstance(raw, RawReader):
        return lambda start, stop: bytes(raw.read_range(start, stop))

    def read_range(start: int, stop: int) -> bytes:
        file.seek(start)
        data = file.read(stop - start)
        if len(data) != stop - start:
            raise OSError(f"the file was cut short: {len(data)} of {stop - start} bytes were read")
        return data

    return read_range


def _tiles(keys: Numbers) -> tiles.Tiles:
    return tiles_of_ids(keys)


ARCHIVE = TileArchive(shards, _tiles, _read)


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the tiles by their offsets. The contract is in `pipeline.sources.base`."""
    return tiles.read(ARCHIVE, shard, todo, options)


SOURCE = Source(
    "pmtiles",
    (".pmtiles",),
    read,
    shards=shards,
    reads_header=True,
    payload=TileRun,
    columns=tiles.COLUMNS,
    planned_columns=partial(tiles.planned_columns, ARCHIVE.tiles),
    selects=("zoom", "bbox"),
    content_column="tile_hash",
    own_title="PMTiles",
)
