"""Turns lists of image URIs (text, CSV, Parquet) into virtual shards of kind "objects". Runs on the driver."""

import itertools
import json
import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.errors import InputRefused, message_line
from pipeline.planning.plan import OBJECTS_PER_SHARD
from pipeline.sources.base import is_image
from pipeline.sources.objects import IMAGE_ID, LooseImages, keep_json
from pipeline.sources.records import check_unique, rows_of, values_of
from pipeline.sources.shard import Shard
from pipeline.storage import access, uris
from pipeline.storage.parquet import open_parquet

log = logging.getLogger(__name__)

LIST_SUFFIXES = (".txt", ".csv", ".tsv")
DELIMITERS = ",;\t|"
MAX_HEADER_BYTES = 1 << 20
URI_NAMES = (
    "uri",
    "url",
    "image_uri",
    "image_url",
    "path",
    "image_path",
    "file",
    "filename",
    "file_name",
    "image",
    "key",
)

Row = tuple[str, dict[str, Any]]


class HashSet64:
    """A set of strings that stores their 64-bit hashes: 12 to 24 bytes per string, 36 while the table grows.

    A hash table with open addressing, at most two thirds full. 0 marks a free slot. Two strings of the same hash count
    as equal.
    """

    def __init__(self) -> None:
        self._make(1024)

    def add(self, text: str) -> bool:
        """Add a string. Returns False if it was in the set."""
        table, mask = self._table, self._mask
        value = hash(text) or 1
        slot = value & mask
        while present := table[slot]:
            if present == value:
                return False
            slot = (slot + 1) & mask
        table[slot] = value
        self._free -= 1
        if not self._free:
            self._grow()
        return True

    def _make(self, slots: int) -> None:
        self._table, self._mask = array("q", [0]) * slots, slots - 1
        self._free = 2 * slots // 3

    def _grow(self) -> None:
        old_table = self._table
        self._make(2 * len(old_table))
        table, mask = self._table, self._mask
        for value in filter(None, old_table):
            slot = value & mask
            while table[slot]:
                slot = (slot + 1) & mask
            table[slot] = value
            self._free -= 1


def find_uri_column(schema: pa.Schema, uri_column: str | None, uri: str) -> str:
    """The column of image URIs: `uri_column`, or one with a usual name, or the only one of strings."""
    names = [field.name for field in schema if _is_text(field.type)]
    if uri_column:
        if uri_column in names:
            return uri_column
        if uri_column in schema.names:
            type_ = schema.field(uri_column).type
            raise InputRefused(f"--uri-column {uri_column}: it is {type_} in {uri}, not a string")
        raise InputRefused(f"--uri-column {uri_column}: {uri} has only the columns {', '.join(schema.names)}")
    for name in URI_NAMES:
        if name in names:
            return name
    if len(names) == 1:
        return str(names[0])
    raise InputRefused(
        f"{uri}: no column looks like image URIs; choose one of {', '.join(schema.names)} with --uri-column"
    )


def list_shards(
    uri: str, uri_column: str | None, keep: Iterable[str], keep_types: dict[str, pa.DataType], seen: HashSet64
) -> Iterator[Shard]:
    """Cut a list of URIs into virtual shards, in the order of the list.

    keep_types: receives the types of the `--keep` columns. seen: the image_ids so far; receives the new ones.
    A URI that occurs again is another image, with the image_id `<uri>#row=<n>`, or `<URI of the list>#<uri>#row=<n>` if
    that exists too. n counts the images of the list from 0.
    """
    keys: list[str] = []
    kept: list[str] = []
    hides_credentials = False
    for number, (name, values) in enumerate(_rows(uri, uri_column, list(keep), keep_types)):
        full = _absolute(name, uri)
        key = image_id = uris.redact(full)
        hides_credentials |= key != full
        if not seen.add(image_id):
            image_id = f"{image_id}#row={number}"
            if not seen.add(image_id):
                image_id = f"{uri}#{image_id}"
                seen.add(image_id)
            values = {**values, IMAGE_ID: image_id}
        keys.append(key)
        kept.append(keep_json(values) if values else "{}")
        if len(keys) == OBJECTS_PER_SHARD:
            yield _shard(keys, kept, hides_credentials)
            keys, kept, hides_credentials = [], [], False
    if keys:
        yield _shard(keys, kept, hides_credentials)


def keys_with_credentials(
    planned: Iterable[Shard], lists: Iterable[str], uri_column: str | None
) -> dict[int, tuple[str, ...]]:
    """Read the lists again and return the keys with credentials, by shard, for the shards that have them without.

    planned: the shards of these lists, in order. The signatures of the URIs may have changed since planning; raises
    InputRefused if the images have changed.
    """
    names = itertools.chain.from_iterable(_uris(uri, uri_column) for uri in lists)
    full_keys = {}
    for shard in planned:
        assert isinstance(shard.payload, LooseImages)
        planned_keys = shard.payload.keys
        keys = tuple(itertools.islice(names, len(planned_keys)))
        for before, now in itertools.zip_longest(planned_keys, keys, fillvalue="the end of the list"):
            if before != uris.redact(now):
                raise InputRefused(
                    f"the list of URIs has changed since it was planned: expected {before}, found {uris.redact(now)}; "
                    "restore its lines (signatures may differ), or use another --output"
                )
        if shard.payload.hides_credentials:
            full_keys[shard.index] = keys
    return full_keys


def _uris(uri: str, uri_column: str | None) -> Iterator[str]:
    return (_absolute(name, uri) for name, _ in _rows(uri, uri_column, [], {}))


def _shard(keys: list[str], kept: list[str], hides_credentials: bool) -> Shard:
    has_kept = any(text != "{}" for text in kept)
    images = LooseImages(tuple(keys), kept=tuple(kept) if has_kept else None, hides_credentials=hides_credentials)
    return Shard(0, "objects", "", len(keys), payload=images)


def _absolute(name: str, list_uri: str) -> str:
    """The full URI of a name, which may be relative to the folder of its list."""
    name = uris.with_lower_scheme(name)
    if name.startswith(("s3a://", "file://")):
        return uris.normalize(name)
    if "://" in name or os.path.isabs(name):
        return name
    while name.startswith("./"):  # the output of `find .`
        name = name[2:]
    return uris.join(list_uri.rpartition("/")[0], name)


def _rows(uri: str, uri_column: str | None, keep: list[str], keep_types: dict[str, pa.DataType]) -> Iterator[Row]:
    """Yield the name and the `--keep` values of each line that names an image."""
    with access.open_read(uri) as file:
        if not uri.lower().endswith(".txt"):
            yield from _table_rows(uri, file, uri_column, keep, keep_types)
        elif keep:
            raise InputRefused(f"--keep {','.join(keep)}: {uri} is plain text and has no columns; use CSV or Parquet")
        else:
            lines = (line.decode("utf-8", "replace").strip("\ufeff \t\r\n") for line in file)
            yield from ((line, {}) for line in lines if line)


def _table_rows(
    uri: str, file: Any, uri_column: str | None, keep: list[str], keep_types: dict[str, pa.DataType]
) -> Iterator[Row]:
    schema, delimiter = _schema(uri, file)
    column = find_uri_column(schema, uri_column, uri)
    if delimiter and (is_image(column) or "://" in column):
        raise InputRefused(f"the first line of {uri} names an image, {column}: it must name the columns")
    types = _kept_types(schema, keep, uri, is_csv=bool(delimiter))
    for name, type_ in types.items():
        add_keep_type(keep_types, name, type_, uri)
    check_unique(schema, column, uri)
    text_columns = [name for name, type_ in types.items() if pa.types.is_string(type_)]
    without_uri = 0
    for batch in _batches(uri, file, list(dict.fromkeys([column, *keep])), delimiter):
        kept = rows_of(batch, keep)
        for values in kept if text_columns else ():
            values.update((name, _text(values[name])) for name in text_columns)
        names = values_of(batch.column(column).cast(pa.large_string()))
        without_uri += sum(not name for name in names)
        yield from ((str(name).strip(), values) for name, values in zip(names, kept, strict=True) if name)
    if without_uri:
        log.warning("%s: skipped %d rows without a URI in the column %r", uri, without_uri, column)


def _is_text(type_: pa.DataType) -> bool:
    """True for strings, also if a dictionary encodes them."""
    kind = type_.value_type if pa.types.is_dictionary(type_) else type_
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _kept_types(schema: pa.Schema, keep: list[str], uri: str, *, is_csv: bool) -> dict[str, pa.DataType]:
    """Types of the `--keep` columns in the output. Raises InputRefused if a column is missing or ambiguous.

    A CSV has no types, so its columns are text: as numbers or times, `007` and long numbers would be others.
    """
    for name in keep:
        if name not in schema.names:
            raise InputRefused(f"--keep {name}: {uri} has only the columns {', '.join(schema.names)}")
        check_unique(schema, name, uri)
    return {name: pa.string() if is_csv else _plain(schema.field(name).type) for name in keep}


def _schema(uri: str, file: Any) -> tuple[pa.Schema, str]:
    """Schema of a CSV or Parquet file, and the delimiter of a CSV, "" for Parquet. Raises InputRefused."""
    try:
        if not uri.lower().endswith(".parquet"):
            delimiter = _delimiter(file)
            return _open_csv(file, delimiter).schema, delimiter
        return open_parquet(file).schema_arrow, ""
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(uri, error) from error


def _delimiter(file: BinaryIO) -> str:
    """The delimiter of a CSV, from its first line: one that gives a column of URI_NAMES, or else the most frequent."""
    first = file.readline(MAX_HEADER_BYTES).decode("utf-8", "replace")
    outside = "".join(first.split('"')[::2])

    def score(delimiter: str) -> tuple[bool, int]:
        names = (name.strip().lower() for name in outside.split(delimiter))
        return any(name in URI_NAMES for name in names), outside.count(delimiter)

    return max(DELIMITERS, key=score)


def _open_csv(file: BinaryIO, delimiter: str, columns: Sequence[str] = ()) -> pa_csv.CSVStreamingReader:
    """Open a CSV. columns: to be read as text; by default all of them, with the types of their first values."""
    file.seek(0)
    return pa_csv.open_csv(
        file,
        read_options=pa_csv.ReadOptions(use_threads=False),
        parse_options=pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string())
        ),
    )


def _batches(uri: str, file: BinaryIO, columns: list[str], delimiter: str) -> Iterator[pa.RecordBatch]:
    """Yield the batches with these columns. Raises InputRefused if one cannot be read."""
    try:
        if delimiter:
            yield from _open_csv(file, delimiter, columns)
        else:
            yield from open_parquet(file).iter_batches(batch_size=4096, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(uri, error) from error


def _unreadable(uri: str, error: Exception) -> InputRefused:
    return InputRefused(f"{uri} cannot be read as a list of images: {message_line(error)}")


def add_keep_type(keep_types: dict[str, pa.DataType], name: str, type_: pa.DataType, uri: str) -> None:
    """Record the type of a `--keep` column. Raises InputRefused if it differs from that of an earlier shard."""
    known = keep_types.setdefault(name, type_)
    if known != type_:
        raise InputRefused(f"--keep {name}: it is {type_} in {uri}, but {known} in earlier shards")


def _plain(type_: pa.DataType) -> pa.DataType:
    """The type in the output: numbers and booleans keep theirs, all others become text, since the plan is JSON."""
    is_plain = pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_)
    return type_ if is_plain else pa.string()


def _text(value: Any) -> str | None:
    """Lists and structs as JSON, other values by `str`."""
    if isinstance(value, list | dict):
        return json.dumps(value, default=str)
    return None if value is None else str(value)
