"""Lists of image URIs (text, CSV, Parquet) → virtual shards of kind "objects". Streamed, once, on the driver."""

import itertools
import json
import logging
import os
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline import storage
from pipeline.errors import InputRefused, message_line
from pipeline.parquet import open_parquet
from pipeline.plan import OBJECTS_PER_SHARD, Shard
from pipeline.sources.base import is_image
from pipeline.sources.objects import IMAGE_ID, keep_json
from pipeline.sources.records import only, rows_of, values_of

log = logging.getLogger(__name__)

LIST_SUFFIXES = (".txt", ".csv")
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


class Seen:
    """The image_ids given so far, of the whole archive: their 64-bit hashes, in 12 to 24 bytes each, 36 while it grows.

    An open-addressing table, of which at most two thirds are taken; 0 is a free place.
    """

    def __init__(self) -> None:
        self._make(1024)

    def add(self, image_id: str) -> bool:
        """Note an image_id; False if it was there already."""
        table, mask = self._table, self._mask
        value = hash(image_id) or 1
        place = value & mask
        while taken := table[place]:
            if taken == value:
                return False
            place = (place + 1) & mask
        table[place] = value
        self._left -= 1
        if not self._left:
            self._grow()
        return True

    def _make(self, places: int) -> None:
        self._table, self._mask = array("q", [0]) * places, places - 1
        self._left = 2 * places // 3

    def _grow(self) -> None:
        before = self._table
        self._make(2 * len(before))
        table, mask = self._table, self._mask
        for value in filter(None, before):
            place = value & mask
            while table[place]:
                place = (place + 1) & mask
            table[place] = value
            self._left -= 1


def find_uri_column(schema: pa.Schema, uri_column: str | None, uri: str) -> str:
    """The column of image URIs: the one named, one with a usual name, or the only one of strings."""
    names = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    if uri_column:
        if uri_column in names:
            return uri_column
        if uri_column in schema.names:
            type_ = schema.field(uri_column).type
            raise InputRefused(f"--uri-column {uri_column}: it is {type_} in {uri}, URIs are text in UTF-8")
        raise InputRefused(f"{uri} has no column {uri_column!r} (--uri-column); it has {', '.join(schema.names)}")
    for name in URI_NAMES:
        if name in names:
            return name
    if len(names) == 1:
        return str(names[0])
    raise InputRefused(
        f"{uri}: no column looks like image URIs; name one of {', '.join(schema.names)} with --uri-column"
    )


def list_shards(
    uri: str, uri_column: str | None, keep: Iterable[str], keep_types: dict[str, pa.DataType], seen: Seen
) -> Iterator[Shard]:
    """Cut a list of URIs into virtual shards, in its own order; adds the kept columns' types to `keep_types`.

    seen: the image_ids given so far, added to here. A URI named a second time is an image of its own: its
    image_id is `<uri>#row=<its place in the list>`, with the list's URI before it if even that was given already.
    """
    keys: list[str] = []
    kept: list[str] = []
    withheld = False
    for place, (name, values) in enumerate(_rows(uri, uri_column, list(keep), keep_types)):
        full = _absolute(name, uri)
        key = image_id = storage.redact(full)
        withheld |= key != full
        if not seen.add(image_id):
            image_id = f"{image_id}#row={place}"
            if not seen.add(image_id):
                image_id = f"{uri}#{image_id}"
                seen.add(image_id)
            values = {**values, IMAGE_ID: image_id}
        keys.append(key)
        kept.append(keep_json(values) if values else "{}")
        if len(keys) == OBJECTS_PER_SHARD:
            yield _shard(keys, kept, withheld)
            keys, kept, withheld = [], [], False
    if keys:
        yield _shard(keys, kept, withheld)


def signed_keys(planned: Iterable[Shard], lists: Iterable[str], uri_column: str | None) -> dict[int, tuple[str, ...]]:
    """The keys as they are read, by shard, of those whose credentials the plan leaves out.

    planned: the shards of these lists, in order. The lists are read again, so what was signed anew since is taken as it
    is now; raises InputRefused where they do not name the same images any more.
    """
    names = itertools.chain.from_iterable(_signed(uri, uri_column) for uri in lists)
    found = {}
    for shard in planned:
        assert shard.keys is not None
        keys = tuple(itertools.islice(names, len(shard.keys)))
        for was, now in itertools.zip_longest(shard.keys, keys, fillvalue="its end"):
            if was != storage.redact(now):
                raise InputRefused(
                    f"the list of URIs has changed since it was planned: {was} was where {storage.redact(now)} is now; "
                    "restore its lines (their signatures may be new), or name another --output"
                )
        if shard.withheld:
            found[shard.index] = keys
    return found


def _signed(uri: str, uri_column: str | None) -> Iterator[str]:
    return (_absolute(name, uri) for name, _ in _rows(uri, uri_column, [], {}))


def _shard(keys: list[str], kept: list[str], withheld: bool) -> Shard:
    has_kept = any(text != "{}" for text in kept)
    kept_of = tuple(kept) if has_kept else None
    return Shard(0, "objects", "", len(keys), keys=tuple(keys), kept=kept_of, withheld=withheld)


def _absolute(name: str, list_uri: str) -> str:
    """Relative names are relative to the folder of their list."""
    if name.startswith(("s3a://", "file://")):
        return storage.normalize(name)
    if "://" in name or os.path.isabs(name):
        return name
    while name.startswith("./"):  # as `find .` writes them
        name = name[2:]
    return storage.join(list_uri.rpartition("/")[0], name)


def _rows(uri: str, uri_column: str | None, keep: list[str], keep_types: dict[str, pa.DataType]) -> Iterator[Row]:
    if uri.lower().endswith(".txt"):
        if keep:
            raise InputRefused(f"--keep {','.join(keep)}: {uri} is plain text and has no columns; use CSV or Parquet")
        with storage.open_read(uri) as file:
            lines = (line.decode("utf-8", "replace").strip("\ufeff \t\r\n") for line in file)
            yield from ((line, {}) for line in lines if line)
        return
    with storage.open_read(uri) as file:
        schema, batches = _open_table(uri, file)
        column = find_uri_column(schema, uri_column, uri)
        if uri.lower().endswith(".csv") and (is_image(column) or "://" in column):
            raise InputRefused(f"{uri} begins with an image, {column}: a CSV begins with the names of its columns")
        for name in keep:
            if name not in schema.names:
                raise InputRefused(f"--keep {name}: {uri} has the columns {', '.join(schema.names)}")
            only(schema, name, uri)
            add_keep_type(keep_types, name, _plain(schema.field(name).type), uri)
        only(schema, column, uri)
        texts = [name for name in keep if pa.types.is_string(_plain(schema.field(name).type))]
        without = 0
        for batch in _checked(uri, batches):
            kept = rows_of(batch, keep)
            for values in kept if texts else ():
                values.update((name, _text(values[name])) for name in texts)
            names = values_of(batch.column(column))
            without += sum(not name for name in names)
            yield from ((str(name).strip(), values) for name, values in zip(names, kept, strict=True) if name)
        if without:
            log.warning("%s: %d rows have nothing in the column %r and are left out", uri, without, column)


def _open_table(uri: str, file: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    try:
        if uri.lower().endswith(".csv"):
            reader = pa_csv.open_csv(
                file,
                read_options=pa_csv.ReadOptions(use_threads=False),
                parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            )
            return reader.schema, iter(reader)
        parquet = open_parquet(file)
        return parquet.schema_arrow, parquet.iter_batches(batch_size=4096, use_threads=False)
    except pa.ArrowException as error:
        raise _unreadable(uri, error) from error


def _checked(uri: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(uri, error) from error


def _unreadable(uri: str, error: Exception) -> InputRefused:
    return InputRefused(f"{uri} cannot be read as a list of images: {message_line(error)}")


def add_keep_type(keep_types: dict[str, pa.DataType], name: str, type_: pa.DataType, uri: str) -> None:
    """One type a kept column over the whole archive."""
    known = keep_types.setdefault(name, type_)
    if known != type_:
        raise InputRefused(f"--keep {name}: it is {type_} in {uri} but {known} in the shards before")


def _plain(type_: pa.DataType) -> pa.DataType:
    """What survives the plan's JSON as it is; anything else is kept as text."""
    is_plain = pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_)
    return type_ if is_plain else pa.string()


def _text(value: Any) -> str | None:
    """Lists and structs as JSON, anything else as Python writes it."""
    if isinstance(value, list | dict):
        return json.dumps(value, default=str)
    return None if value is None else str(value)
