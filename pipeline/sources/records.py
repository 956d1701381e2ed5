"""What the readers of physical shards (tar, zip, Parquet) share: row numbers, image_ids, and lost rows."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import pyarrow as pa

from pipeline import storage
from pipeline.coverage import END, Ranges, intersect
from pipeline.errors import InputRefused, ReadError
from pipeline.plan import Shard
from pipeline.sources.base import Record, ShardEnd, is_image

MAX_MEMBER_BYTES = 1 << 30
"""Inflated size in bytes above which a member is an error and not read, against decompression bombs."""

PASSING = ("not_found", "changed", "unreadable")
"""error_types of a shard that cannot be read now; the others come from its bytes, at the same row each time."""


class UniqueIds:
    """image_ids of one shard: `<uri>#<member>`, with `#row=<row>` appended where that was given before.

    Remembers 64-bit hashes, not names; a collision appends a `#row=` too many and no more.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._given: set[int] = set()

    def new(self, member: str, row: int) -> str:
        image_id = f"{self.uri}#{member}"
        while hash(image_id) in self._given:
            image_id += f"#row={row}"
        self._given.add(hash(image_id))
        return image_id


class Rows:
    """The rows of one read, counted from 0 while the reader walks over its shard.

    For each image: `begin`, then `record` if that said True, then `advance`. At last `finish`, whatever happened: each
    row that the plan or `todo` counts on is accounted for, as an error if it could not be read.

    row: of the image at hand. stop: end of the last row to read. total: rows of the shard where its directory tells.
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
        """Name the image of the next row; True if it is to be read. is_unique: no other member can be called so."""
        self.member = member
        self._image_id = f"{self.uri}#{member}" if is_unique else self._ids.new(member, self.row)
        return self._is_wanted()

    def wants(self, stop: int) -> bool:
        """True if one of the rows from the present one up to `stop` is to be read."""
        return bool(intersect(self.todo, ((self.row, stop),)))

    def record(self, data: bytes | ReadError, kept: Mapping[str, Any]) -> Record:
        """The image at hand, or what is wrong with it."""
        seconds = time.perf_counter() - self._started
        if isinstance(data, ReadError):
            return Record(self.row, self._image_id, self.uri, self.member, None, data, kept, seconds)
        return Record(self.row, self._image_id, self.uri, self.member, data, None, kept, seconds)

    def advance(self, rows: int = 1) -> None:
        """Go on to the next image, or over a run of images without names."""
        if self._is_wanted():
            self._started = time.perf_counter()
        self.row += rows
        self.member = None

    def finish(self, fault: ReadError | None = None) -> Iterator[Record | ShardEnd]:
        """The lost rows, then the end. fault: what ended the shard at the present row; None at its regular end.

        A lost row is one that is still to do and known to exist: from the plan, the shard's directory, or a `todo` that
        ends or begins behind it. A fault costs the row it happened at; a passing one the first row still to do, so that
        an open-ended `todo` never ends without a word.
        """
        end = self._end(fault)
        held = max(self.row, self.total)
        error = fault or ReadError("not_found", f"{self.uri}: the shard holds only {held} images, {end} were planned")
        for start, stop in intersect(self.todo, ((self.row, end),)):
            for row in range(start, stop):
                is_named = row == self.row and self.member is not None
                image_id = self._image_id if is_named else f"{self.uri}#row={row}"
                yield Record(row, image_id, self.uri, self.member if is_named else None, None, error)
        yield ShardEnd(end)

    def _end(self, fault: ReadError | None) -> int:
        if self.planned is not None:
            return self.planned
        known = [start for start, _ in self.todo] + [stop for _, stop in self.todo if stop != END]
        if fault and fault.error_type in PASSING and self.stop == END:
            known.append(self.todo[-1][0] + 1)
        return max(self.row + (fault is not None), self.total, *known)

    def _is_wanted(self) -> bool:
        while self._range < len(self.todo) and self.todo[self._range][1] <= self.row:
            self._range += 1
        return self._range < len(self.todo) and self.todo[self._range][0] <= self.row


def storage_fault(uri: str, fault: OSError) -> ReadError:
    """Why an object could not be opened or read."""
    if isinstance(fault, FileNotFoundError):
        return ReadError("not_found", f"there is no {uri}")
    if isinstance(fault, storage.Changed):
        return ReadError("changed", str(fault))
    return ReadError("unreadable", f"{uri}: {fault}")


def too_large(uri: str, member: str, size_bytes: int) -> ReadError:
    limit = f"the limit is {MAX_MEMBER_BYTES} bytes"
    return ReadError("too_large", f"{uri}: {member} has {size_bytes} bytes, {limit}")


def values_of(array: pa.Array) -> list[Any]:
    """As Python values; text that is not UTF-8, which Arrow takes unread from a file, with U+FFFD for what is wrong.

    None for what Python has no value for, such as a date of the year 0.
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
    """These columns of a batch, a dictionary a row."""
    columns = {name: values_of(batch.column(name)) for name in names}
    return [{name: values[row] for name, values in columns.items()} for row in range(len(batch))]


def only(schema: pa.Schema, name: str, uri: str) -> None:
    """Raise InputRefused where several columns bear a name that is asked for."""
    if schema.names.count(name) > 1:
        raise InputRefused(f"{uri} has {schema.names.count(name)} columns called {name!r}: name them apart")


def is_image_member(name: str) -> bool:
    """True for a member that is a row: not the resource forks that macOS puts beside its files."""
    folder, _, base = name.rpartition("/")
    return is_image(name) and not base.startswith("._") and "__MACOSX" not in folder.split("/")


def split_key(name: str) -> tuple[str, str]:
    """WebDataset's key and extension (in lower case): `dir/a.b.jpg` is the key `dir/a` with the extension `b.jpg`."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def kept_texts(member: str, keep: tuple[str, ...], find: Callable[[str, str], bytes | None]) -> dict[str, str]:
    """The text of a member's sidecars by extension. find: (key, extension) → bytes, None where there is no such one."""
    key, _ = split_key(member)
    found = {name: find(key, name.lower()) for name in keep}
    return {name: data.decode("utf-8", "replace") for name, data in found.items() if data is not None}
