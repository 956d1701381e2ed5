"""Shared by the readers of tar, zip and Parquet: row numbers, image_ids, lost rows, and `--keep` values."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO, Generic, TypeVar, cast

import pyarrow as pa

from pipeline.coverage import END, Ranges, intersect
from pipeline.errors import InputRefused, ReadError
from pipeline.sources.base import Record, ShardEnd, is_image
from pipeline.sources.shard import Shard
from pipeline.sources.suffixes import NO_END_MARK, LeftOut
from pipeline.storage import base

MAX_MEMBER_BYTES = 1 << 30
"""Limit of a member's uncompressed size, against decompression bombs. A larger member is an error and is not read."""

TRANSIENT = ("not_found", "changed", "unreadable")
"""error_types of a shard that a later run may be able to read. All others come from its bytes and are permanent."""


T = TypeVar("T")


class UniqueIds:
    """image_ids of one shard: `<uri>#<member>`, with `#row=<row>` appended if that was used before.

    Stores 64-bit hashes instead of names. The only effect of a hash collision is a needless `#row=`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._used: set[int] = set()

    def new(self, member: str, row: int) -> str:
        image_id = f"{self.uri}#{member}"
        while hash(image_id) in self._used:
            image_id += f"#row={row}"
        self._used.add(hash(image_id))
        return image_id


class Rows:
    """Counts the rows of one read, from 0, while a reader iterates over its shard.

    For each image call `begin`, then `record` if `begin` returned True, then `advance`. At the end always call
    `finish`: it yields an error for each row that the plan or `todo` expects and that could not be read.

    row: the current row. stop: end of the last row to read. total: number of rows if the shard's directory gives it.
    """

    def __init__(self, shard: Shard, todo: Ranges) -> None:
        self.uri = shard.uri
        self.planned = shard.rows
        self.todo = intersect(todo, ((0, END if shard.rows is None else shard.rows),))
        self.stop = self.todo[-1][1] if self.todo else 0
        self.total = 0
        self.row = 0
        self.member: str | None = None
        self._image_id = ""
        self._ids = UniqueIds(self.uri)
        self._range = 0
        self._started = time.perf_counter()

    def begin(self, member: str, *, is_unique: bool = False) -> bool:
        """Set the member name of the current row; return True if the row is in `todo`.

        is_unique: no other member of the shard can have this name.
        """
        self.member = member
        self._image_id = f"{self.uri}#{member}" if is_unique else self._ids.new(member, self.row)
        return self._is_wanted()

    def wants(self, stop: int) -> bool:
        """True if `todo` contains a row from the current one up to `stop`."""
        return bool(intersect(self.todo, ((self.row, stop),)))

    def record(self, data: bytes | ReadError, kept: Mapping[str, Any]) -> Record:
        """The record of the current row: its bytes, or its error."""
        seconds = time.perf_counter() - self._started
        if isinstance(data, ReadError):
            return Record(self.row, self._image_id, self.uri, self.member, None, data, kept, seconds)
        return Record(self.row, self._image_id, self.uri, self.member, data, None, kept, seconds)

    def advance(self, rows: int = 1) -> None:
        """Move on by one row, or by several rows without member names."""
        if self._is_wanted():
            self._started = time.perf_counter()
        self.row += rows
        self.member = None

    def finish(
        self, fault: ReadError | None = None, left_out: Mapping[str, int] = MappingProxyType({})
    ) -> Iterator[Record | ShardEnd]:
        """Yield an error for each lost row, then the `ShardEnd`.

        fault: the error that ended the shard at the current row; None at its regular end. left_out: see `ShardEnd`.

        A lost row is a row of `todo` that was not read and is known to exist: from the plan, from the shard's
        directory, or from a range of `todo` that begins or ends after it. A fault loses at least the current row. If
        `todo` is open-ended, a transient fault loses at least the first row of the open range, so that an open-ended
        read always yields at least one row.
        """
        end = self._end(fault)
        reason = f"the shard holds only {max(self.row, self.total)} images, {end} were planned"
        error = fault or ReadError("not_found", f"{self.uri}: {reason}")
        for start, stop in intersect(self.todo, ((self.row, end),)):
            for row in range(start, stop):
                is_named = row == self.row and self.member is not None
                image_id = self._image_id if is_named else f"{self.uri}#row={row}"
                yield Record(row, image_id, self.uri, self.member if is_named else None, None, error)
        yield ShardEnd(end, left_out)

    def _end(self, fault: ReadError | None) -> int:
        if self.planned is not None:
            return self.planned
        known = [start for start, _ in self.todo] + [stop for _, stop in self.todo if stop != END]
        if fault and fault.error_type in TRANSIENT and self.stop == END:
            known.append(self.todo[-1][0] + 1)
        return max(self.row + (fault is not None), self.total, *known)

    def _is_wanted(self) -> bool:
        while self._range < len(self.todo) and self.todo[self._range][1] <= self.row:
            self._range += 1
        return self._range < len(self.todo) and self.todo[self._range][0] <= self.row


class WatchedFile:
    """A file that remembers its own error.

    zipfile and pyarrow report a failed read as broken bytes, and bz2 raises OSError for broken bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.fault: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, size: int = -1) -> bytes:
        try:
            return self.file.read(size)
        except OSError as error:
            self.fault = error
            raise

    def check(self) -> None:
        """Raise the error of the storage, if there was one."""
        if self.fault:
            raise self.fault


def storage_fault(uri: str, fault: OSError) -> ReadError:
    """The ReadError for an object that could not be opened or read."""
    if isinstance(fault, FileNotFoundError):
        return ReadError("not_found", f"{uri} does not exist")
    if isinstance(fault, base.Changed):
        return ReadError("changed", str(fault))
    return ReadError("unreadable", f"{uri}: {fault}")


def too_large(uri: str, member: str, size_bytes: int) -> ReadError:
    """The ReadError for a member of more than MAX_MEMBER_BYTES."""
    limit = f"the limit is {MAX_MEMBER_BYTES} bytes"
    return ReadError("too_large", f"{uri}: {member} has {size_bytes} bytes, {limit}")


def values_of(array: pa.Array) -> list[Any]:
    """Convert a column to Python values.

    Arrow does not validate the text of a file, so bytes that are not UTF-8 become U+FFFD here. A value that Python
    cannot represent, such as a date in the year 0, becomes None.
    """
    try:
        return cast(list[Any], array.to_pylist())
    except (OverflowError, ValueError):
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            return [data and data.decode("utf-8", "replace") for data in array.cast(pa.large_binary()).to_pylist()]
        return list(map(_value, array))


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (OverflowError, ValueError):
        return None


def rows_of(batch: pa.RecordBatch, names: Iterable[str]) -> list[dict[str, Any]]:
    """The named columns of a batch as one dictionary per row."""
    columns = {name: values_of(batch.column(name)) for name in names}
    return [{name: values[row] for name, values in columns.items()} for row in range(len(batch))]


def check_unique(schema: pa.Schema, name: str, uri: str) -> None:
    """Raise InputRefused if several columns have this name."""
    if schema.names.count(name) > 1:
        raise InputRefused(f"{uri} has {schema.names.count(name)} columns named {name!r}: give them different names")


def is_image_member(name: str) -> bool:
    """True if a member is a row: an image, and no resource fork of macOS (`._name`, `__MACOSX/`)."""
    return is_image(name) and not is_resource_fork(name)


def is_resource_fork(name: str) -> bool:
    """True for the files that macOS adds to an archive."""
    folder, _, base = name.rpartition("/")
    return base.startswith("._") or "__MACOSX" in folder.split("/")


def split_key(name: str) -> tuple[str, str]:
    """Split a name into key and lower-case extension at the first dot of its base name, as WebDataset does.

    `dir/a.b.jpg` has the key `dir/a` and the extension `b.jpg`.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def keys_of(member: str) -> Iterator[str]:
    """The keys under which a member may have sidecars, the most specific first: `d/a.b` and `d/a` for `d/a.b.jpg`."""
    folder, slash, base = member.rpartition("/")
    if "." not in base:
        yield member
    while "." in base:
        base = base.rpartition(".")[0]
        yield folder + slash + base


def _extensions_of(member: str) -> Iterator[str]:
    """The extensions that a sidecar has for the keys of `keys_of`, in lower case."""
    return (member[len(key) + 1 :].lower() for key in keys_of(member))


class LeftOutMembers:
    """Counts the members of an archive that are neither rows nor sidecars of `--keep`, by suffix."""

    def __init__(self, keep: Iterable[str]) -> None:
        self._extensions = {name.lower() for name in keep}
        self._members = LeftOut()

    @property
    def counts(self) -> Mapping[str, int]:
        return dict(self._members.counts)

    def note_missing_end(self) -> None:
        """Note that the archive has no end mark."""
        self._members.counts[NO_END_MARK] = 1

    def add(self, member: str) -> None:
        """Count a file. Hidden files are not counted, as outside of archives."""
        is_hidden = member.rpartition("/")[2].startswith(".") or is_resource_fork(member)
        if not is_hidden and self._extensions.isdisjoint(_extensions_of(member)):
            self._members.add(member)


class Groups:
    """Numbers the samples of an archive as WebDataset does: neighbours with one key, each extension once."""

    def __init__(self) -> None:
        self.number = 0
        self._key = ""
        self._extensions: set[str] = set()

    def add(self, member: str) -> int:
        """The number of the next member's sample."""
        key, extension = split_key(member)
        if key != self._key or extension in self._extensions:
            self.number += 1
            self._key, self._extensions = key, set()
        self._extensions.add(extension)
        return self.number


class Sidecars(Generic[T]):
    """Where an archive's sidecars are, by key and extension.

    Several members may have one name. An image gets the sidecar of its own sample, or else the nearest one; of two as
    near, the earlier.
    """

    def __init__(self, keep: Iterable[str]) -> None:
        self._extensions = {name.lower() for name in keep}
        self._places: dict[tuple[str, str], list[tuple[int, T]]] = {}

    def add(self, member: str, group: int, place: T) -> None:
        """Add a member, if its extension is kept. `a.b.json` is the `json` of `a.b` and the `b.json` of `a`."""
        for key, extension in zip(keys_of(member), _extensions_of(member), strict=True):
            if extension in self._extensions:
                self._places.setdefault((key, extension), []).append((group, place))

    def find(self, member: str, group: int, extension: str) -> T | None:
        """The place of an image's sidecar; None if there is none."""
        for key in keys_of(member):
            if places := self._places.get((key, extension.lower())):
                return min(places, key=lambda place: abs(place[0] - group))[1]
        return None


def kept_texts(keep: tuple[str, ...], read: Callable[[str], bytes | None]) -> dict[str, str]:
    """The text of an image's sidecars by extension. read: extension → bytes, or None if there is none."""
    sidecars = {name: read(name) for name in keep}
    return {name: data.decode("utf-8", "replace") for name, data in sidecars.items() if data is not None}
