"""Column names and Arrow schemas of every output and of the tables that the stages exchange."""

from collections.abc import Mapping

import numpy as np
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
"""The first columns of every result.

image_id: unique in the archive. source: URI of the object that holds the image. member: the image's name in that
object, null for a loose image. shard, row: the image's place in the plan. width, height: in pixels as stored, before
any rotation or resize.
"""

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
"""The files of `_errors/`. stage: read, decode or predict. error_type: see `pipeline.errors.ImageError`."""

FOOTPRINT = pa.schema(
    [
        ("geometry", pa.binary()),
        ("bbox", pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])),
    ]
)
"""Columns of images with a place on the Earth, in OGC:CRS84. geometry: WKB. bbox: range of its coordinates."""

FAULT = pa.schema([("stage", pa.string()), ("error_type", pa.string()), ("message", pa.string())])
SECONDS = pa.schema(
    [("read_seconds", pa.float32()), ("decode_seconds", pa.float32()), ("predict_seconds", pa.float32())]
)
CONSTANT = "scaled.is_constant"
"""True for an image whose pixels are all equal after `--scale`. Null at the end of a shard."""

USAGE = pa.schema([("core_seconds", pa.float32()), ("gpu_seconds", pa.float32())])
"""CPU and GPU seconds that the workers used for a table, spread over its rows. See `pipeline.stages.usage`."""

PIXELS = "pixels"
ORIENTATION = "jpeg_orientation"
"""EXIF orientation (1 to 8) of a JPEG that is still encoded: `pixels` then holds its bytes. Null on all other rows."""

PIXEL_FIELDS = pa.schema(
    [
        (PIXELS, pa.binary()),
        ("pixels.type", pa.string()),
        ("pixels.height", pa.int32()),
        ("pixels.width", pa.int32()),
        ("pixels.bands", pa.int32()),
        (ORIENTATION, pa.int8()),
    ]
)
"""The columns of an image's pixels. Only `pipeline.images.pixels` writes and reads them."""

REPEATS = "repeats"
"""Further rows with the same bytes, which the write stage adds: their image_id, member and kept columns, or null."""
EMBEDDING = "embedding"
EMBEDDING_SCALE = "embedding_scale"
"""float32: the factor of an `embedding` of int8, such that both multiplied are the vector. See `with_float_vectors`."""
VECTOR = "vector"
"""Column of the tables of a source whose rows are vectors and not images."""

SHARD_ROWS = "shard_rows"
"""The shard's number of rows, on the one row that marks the end of a shard. Null on the rows of images."""

SHARD_LEFT_OUT = "shard_left_out"
"""JSON on the same row: numbers of the shard's members that are not read, by suffix. Null if there are none."""
IS_EMPTY = "is_empty"
"""True on the row of an image without data, which is counted and not written."""


def loaded(keep: Mapping[str, pa.DataType]) -> pa.Schema:
    """Schema of the rows between decode and predict. Pixel columns are null on errors and at the end of a shard."""
    return pa.schema(
        [
            *IDENTITY,
            *_kept(keep),
            *PIXEL_FIELDS,
            *FAULT,
            (REPEATS, _repeats(keep)),
            (SHARD_ROWS, pa.int64()),
            (SHARD_LEFT_OUT, pa.string()),
            (IS_EMPTY, pa.bool_()),
            *SECONDS,
            *USAGE,
            ("size_bytes", pa.int64()),
            (CONSTANT, pa.bool_()),
        ]
    )


def predicted(columns: pa.Schema, keep: Mapping[str, pa.DataType]) -> pa.Schema:
    """Schema of the rows between predict and write: result columns instead of pixels.

    network: see `Predictor.describe`.
    """
    numbers = [(SHARD_ROWS, pa.int64()), (SHARD_LEFT_OUT, pa.string()), *SECONDS, *USAGE, ("size_bytes", pa.int64())]
    flags = [(IS_EMPTY, pa.bool_()), (CONSTANT, pa.bool_())]
    rest = [(REPEATS, _repeats(keep)), *numbers, *flags, ("network", pa.string())]
    return pa.schema([*result(columns, keep), *FAULT, *rest])


def vector(element: pa.DataType, size: int) -> pa.DataType:
    """A vector of numbers without nulls. Some readers, such as chDB, refuse nullable elements."""
    return pa.list_(pa.field("element", element, nullable=False), size)


def is_vector(type_: pa.DataType) -> bool:
    """True for fixed-size lists of numbers."""
    return bool(pa.types.is_fixed_size_list(type_) and pa.types.is_primitive(type_.value_type))


def has_scaled_vectors(columns: pa.Schema) -> bool:
    """Whether the embeddings are int8 with a scale each."""
    if not {EMBEDDING, EMBEDDING_SCALE} <= set(columns.names):
        return False
    type_ = columns.field(EMBEDDING).type
    is_float = columns.field(EMBEDDING_SCALE).type == pa.float32()
    return is_vector(type_) and type_.value_type == pa.int8() and is_float


def as_float_vectors(columns: pa.Schema) -> pa.Schema:
    """The columns of `with_float_vectors`."""
    if not has_scaled_vectors(columns):
        return columns
    type_ = vector(pa.float32(), columns.field(EMBEDDING).type.list_size)
    place, scale = (columns.get_field_index(name) for name in (EMBEDDING, EMBEDDING_SCALE))
    return columns.set(place, columns.field(EMBEDDING).with_type(type_)).remove(scale)


def with_float_vectors(table: pa.Table) -> pa.Table:
    """Embeddings of int8 with a scale each → float32, without the column of scales. Other tables stay as they are."""
    if not has_scaled_vectors(table.schema):
        return table
    columns = as_float_vectors(table.schema)
    type_ = columns.field(EMBEDDING).type
    column = table[EMBEDDING].combine_chunks()
    numbers = column.flatten().to_numpy().reshape(-1, type_.list_size).astype(np.float32)
    numbers *= table[EMBEDDING_SCALE].to_numpy()[:, None]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), type=type_)
    place = table.schema.get_field_index(EMBEDDING)
    return table.set_column(place, columns.field(EMBEDDING), vectors).drop_columns([EMBEDDING_SCALE])


def dense(columns: pa.Schema) -> pa.Schema:
    """The same columns, each vector as `vector` declares it."""
    return pa.schema([each.with_type(_dense(each.type)) for each in columns])


def _dense(type_: pa.DataType) -> pa.DataType:
    return vector(type_.value_type, type_.list_size) if is_vector(type_) else type_


def result(columns: pa.Schema, keep: Mapping[str, pa.DataType]) -> pa.Schema:
    """Schema of a part: identity, result columns, and the `--keep` columns of the shards."""
    return pa.schema([*IDENTITY, *dense(columns), *_kept(keep)])


def _repeats(keep: Mapping[str, pa.DataType]) -> pa.DataType:
    return pa.list_(pa.struct([("image_id", pa.string()), ("member", pa.string()), *_kept(keep)]))


def _kept(keep: Mapping[str, pa.DataType]) -> list[pa.Field]:
    return [pa.field(name, type_) for name, type_ in keep.items()]
