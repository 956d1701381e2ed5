"""Column names and Arrow schemas: of the tables between the stages, and of every output."""

from collections.abc import Mapping

import pyarrow as pa

IDENTITY = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("member", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
"""The first columns of every result. width and height in pixels, as stored, before any rotation or resize."""

ERRORS = pa.schema(
    [
        ("image_id", pa.string()),
        ("source", pa.string()),
        ("member", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int64()),
        ("stage", pa.string()),
        ("error_type", pa.string()),
        ("message", pa.string()),
    ]
)
"""`_errors/`. stage: read, decode or predict."""

FAULT = pa.schema([("stage", pa.string()), ("error_type", pa.string()), ("message", pa.string())])
SECONDS = pa.schema(
    [("read_seconds", pa.float32()), ("decode_seconds", pa.float32()), ("predict_seconds", pa.float32())]
)
USAGE = pa.schema([("core_seconds", pa.float32()), ("gpu_seconds", pa.float32())])
"""What the workers used for a table, spread over its rows; see `pipeline.usage`."""

PIXELS = "pixels"
ORIENTATION = "jpeg_orientation"
"""EXIF orientation of a JPEG that was left encoded, so that `pixels` holds its bytes. Null on all other rows."""
SHARD_ROWS = "shard_rows"
"""Set on the one row that ends a shard and is no image: the shard's number of rows. Null on images."""


def loaded(keep: Mapping[str, pa.DataType]) -> pa.Schema:
    """Rows on their way from decode to predict. pixels: uint8 [side, side, 3] as bytes, or a whole JPEG that
    a GPU decodes; null where the row is an error or ends a shard."""
    pixels = pa.schema([(PIXELS, pa.binary()), (ORIENTATION, pa.int8())])
    return pa.schema(
        [
            *IDENTITY,
            *_kept(keep),
            *pixels,
            *FAULT,
            (SHARD_ROWS, pa.int64()),
            *SECONDS,
            *USAGE,
            ("size_bytes", pa.int64()),
        ]
    )


def predicted(columns: pa.Schema, keep: Mapping[str, pa.DataType]) -> pa.Schema:
    """Rows on their way from predict to the sink: the result columns in place of the pixels. network: how it ran."""
    rest = [(SHARD_ROWS, pa.int64()), *SECONDS, *USAGE, ("size_bytes", pa.int64()), ("network", pa.string())]
    return pa.schema([*result(columns, keep), *FAULT, *rest])


def result(columns: pa.Schema, keep: Mapping[str, pa.DataType]) -> pa.Schema:
    """A part: who it is, what the network says, what was kept of the shard's own columns."""
    return pa.schema([*IDENTITY, *columns, *_kept(keep)])


def _kept(keep: Mapping[str, pa.DataType]) -> list[pa.Field]:
    return [pa.field(name, type_) for name, type_ in keep.items()]
