"""The pixels of images between decode and predict: dtype, bands, height, width, and the Arrow columns that hold them.

This is the only module that knows how pixels are stored. A table may mix images of different dtypes and shapes.
Adjacent images of the same dtype and shape are read as one array, without a copy.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import schema
from pipeline.errors import DecodeError, SettingRefused
from pipeline.images.transform import Transform

DTYPES = ("uint8", "uint16", "float32")
MAX_COLUMN_BYTES = (1 << 31) - 1
"""Limit for one Arrow column of bytes, because its offsets are int32."""

Places = NDArray[np.int64]
"""Row numbers of a table."""


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """The dtype and the number of bands of pixels. The default is 8-bit RGB."""

    dtype: str = "uint8"
    bands: int = 3

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES or self.bands < 1:
            raise SettingRefused(
                f"pixels of {self} are not supported: use one of {', '.join(DTYPES)}, and at least 1 band"
            )

    def __str__(self) -> str:
        return f"{self.bands} × {self.dtype}"

    def shape(self, transform: Transform) -> tuple[int, int, int]:
        """The (height, width, bands) of an image after the transform."""
        return transform.crop, transform.crop, self.bands

    def image_bytes(self, transform: Transform) -> int:
        """The size in bytes of an image after the transform."""
        return math.prod(self.shape(transform)) * np.dtype(self.dtype).itemsize

    def max_batch_size(self, transform: Transform) -> int:
        """The largest number of images whose pixels fit in one Arrow column."""
        return MAX_COLUMN_BYTES // self.image_bytes(transform)

    def check(self, pixels: np.ndarray) -> np.ndarray:
        """Return the pixels if they are [H, W, bands] of this format, otherwise raise DecodeError (unsupported)."""
        if pixels.ndim == 3 and pixels.dtype == self.dtype and pixels.shape[2] == self.bands:
            return pixels
        raise DecodeError(
            "unsupported",
            f"the image is {pixels.dtype} {list(pixels.shape)}, but the network takes {self.dtype} "
            f"[height, width, {self.bands}]",
        )


RGB8 = PixelFormat()


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded JPEG, for a GPU to decode.

    width, height: as stored, before the rotation.
    orientation: the EXIF orientation, 1 to 8; 1 if the image must not be rotated.
    """

    data: bytes | memoryview
    width: int
    height: int
    orientation: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded image.

    pixels: [H, W, bands], of one of DTYPES.
    width, height: as stored, before the rotation and the resize.
    is_constant: `--scale` was applied, and all pixels are equal.
    measured: values of the run's measures, by column.
    """

    pixels: np.ndarray
    width: int
    height: int
    is_constant: bool = False
    measured: Mapping[str, Any] = field(default_factory=dict)


def to_columns(images: Sequence[Decoded | Encoded | None]) -> dict[str, pa.Array]:
    """Build the columns of `schema.PIXEL_FIELDS`; the rows without an image are null. Each image is copied once."""
    arrays = [None if image is None else _array(image) for image in images]
    shapes = [None if isinstance(image, Encoded) or image is None else image.pixels.shape for image in images]
    values: dict[str, list[Any]] = {
        "pixels.type": [image.pixels.dtype.name if isinstance(image, Decoded) else None for image in images],
        "pixels.height": [shape and shape[0] for shape in shapes],
        "pixels.width": [shape and shape[1] for shape in shapes],
        "pixels.bands": [shape and shape[2] for shape in shapes],
        schema.ORIENTATION: [image.orientation if isinstance(image, Encoded) else None for image in images],
    }
    columns = {name: pa.array(column, schema.PIXEL_FIELDS.field(name).type) for name, column in values.items()}
    return {schema.PIXELS: _binary(arrays), **columns}


def vectors_to_columns(vectors: pa.FixedSizeListArray) -> dict[str, pa.Array]:
    """Build the columns of `schema.PIXEL_FIELDS` of float32 vectors: images of one pixel, with a band per number.

    Does not copy the numbers.
    """
    count, dim = len(vectors), vectors.type.list_size
    offsets = pa.py_buffer(np.arange(count + 1, dtype=np.int32) * np.int32(4 * dim))
    data = pa.py_buffer(np.ascontiguousarray(vectors.flatten().to_numpy(zero_copy_only=False), np.float32))
    shape = {"pixels.type": "float32", "pixels.height": 1, "pixels.width": 1, "pixels.bands": dim}
    columns = {
        name: pa.repeat(pa.scalar(value, schema.PIXEL_FIELDS.field(name).type), count) for name, value in shape.items()
    }
    columns[schema.ORIENTATION] = pa.nulls(count, schema.PIXEL_FIELDS.field(schema.ORIENTATION).type)
    return {schema.PIXELS: pa.Array.from_buffers(pa.binary(), count, [None, offsets, data]), **columns}


def _array(image: Decoded | Encoded) -> np.ndarray:
    return image.pixels if isinstance(image, Decoded) else np.frombuffer(image.data, np.uint8)


def _binary(arrays: "list[np.ndarray | None]") -> pa.Array:
    """Copy the arrays to an Arrow binary array, with null for None."""
    sizes = [0 if array is None else array.nbytes for array in arrays]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    data = np.empty(offsets[-1], np.uint8)
    for array, start, stop in zip(arrays, offsets, offsets[1:], strict=False):
        if array is not None:
            data[start:stop].view(array.dtype).reshape(array.shape)[...] = array
    bitmap = np.packbits([array is not None for array in arrays], bitorder="little")
    return pa.Array.from_buffers(pa.binary(), len(arrays), [pa.py_buffer(buffer) for buffer in (bitmap, offsets, data)])


def mean_image_bytes(table: pa.Table) -> float:
    """The mean size in bytes of the images of a table, decoded or encoded."""
    return float(pc.mean(pc.binary_length(table[schema.PIXELS])).as_py())


@dataclass(frozen=True, slots=True)
class Images:
    """The pixels of a batch, in groups. Usually there is one group.

    A group is [N, H, W, bands], with one dtype and shape. It is a NumPy array, or a tensor on the network's device.
    """

    groups: list[Any]

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __getitem__(self, part: slice) -> "Images":
        first, last, _ = part.indices(len(self))
        pieces, start = [], 0
        for group in self.groups:
            pieces.append(group[max(first - start, 0) : max(last - start, 0)])
            start += len(group)
        return Images([piece for piece in pieces if len(piece)])

    def joined(self, join: Callable[[list[Any]], Any]) -> Any:
        """Return all images as one array or tensor. join: concatenates the groups if there are several."""
        return self.groups[0] if len(self.groups) == 1 else join(self.groups)


class PixelTable:
    """Reads the pixel columns of a table, without a copy if adjacent images have the same dtype and shape.

    decoded, encoded: the rows of the decoded images, and of the JPEGs that were left encoded.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        chunked = table[schema.PIXELS]
        self.column = chunked.chunk(0) if chunked.num_chunks == 1 else chunked.combine_chunks()  # a copy
        is_image = self.column.is_valid().to_numpy(zero_copy_only=False)
        is_jpeg = self._combined(schema.ORIENTATION).is_valid().to_numpy(zero_copy_only=False)
        self.decoded: Places = np.flatnonzero(is_image & ~is_jpeg)
        self.encoded: Places = np.flatnonzero(is_image & is_jpeg)

    def groups(self) -> Iterator[tuple[Places, np.ndarray]]:
        """Yield the decoded images in groups of one dtype and shape: their rows, and their pixels [N, H, W, bands]."""
        if not len(self.decoded):
            return
        names = ("pixels.type", "pixels.height", "pixels.width", "pixels.bands")
        types, *sizes = (self._combined(name) for name in names)
        codes = types.dictionary_encode()
        keys = [codes.indices, *sizes]
        table = np.stack([key.fill_null(-1).to_numpy(zero_copy_only=False)[self.decoded] for key in keys])
        is_one_group = (table == table[:, :1]).all()
        groups, group_of = (table[:, :1], None) if is_one_group else np.unique(table, axis=1, return_inverse=True)
        for number, (code, *shape) in enumerate(groups.T.tolist()):
            places = self.decoded if group_of is None else self.decoded[group_of.reshape(-1) == number]
            yield places, self._pixels(places, codes.dictionary[code].as_py(), tuple(shape))

    def jpegs(self) -> list[Encoded]:
        """Return the JPEGs that were left encoded. Their data are views of the column."""
        names = ("width", "height", schema.ORIENTATION)
        sizes = [self._combined(name).take(pa.array(self.encoded)).to_pylist() for name in names]
        files = (memoryview(self.column[place].as_buffer()) for place in self.encoded.tolist())
        return [Encoded(*fields) for fields in zip(files, *sizes, strict=True)]

    def _combined(self, name: str) -> pa.Array:
        return self.table[name].combine_chunks()

    def _pixels(self, places: Places, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        offsets = np.frombuffer(self.column.buffers()[1], np.int32)[self.column.offset :][: len(self.column) + 1]
        data = np.frombuffer(self.column.buffers()[2], np.uint8)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        first, last = offsets[places[0]], offsets[places[-1] + 1]
        if last - first == len(places) * size:  # adjacent; rows in between have no pixels
            flat = data[first:last]
        else:
            flat = np.concatenate([data[start : start + size] for start in offsets[places]])
        return _as_numbers(flat, dtype).reshape(-1, *shape)


def _as_numbers(flat: NDArray[np.uint8], dtype: str) -> np.ndarray:
    """View bytes as numbers. Copy them first if their address is not aligned for the dtype."""
    aligned = flat.ctypes.data % np.dtype(dtype).alignment == 0
    return (flat if aligned else flat.copy()).view(dtype)
