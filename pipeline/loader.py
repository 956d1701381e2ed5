"""read → decode: a shard's rows as Arrow tables of uint8 pixels. Decode workers need neither Ray nor torch for it."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline import schema, sources, usage
from pipeline.budget import MemoryBudget
from pipeline.config import RunConfig, Transform
from pipeline.coverage import Ranges
from pipeline.decode import Decoded, Encoded, decode, leave_encoded
from pipeline.errors import ImageError
from pipeline.plan import Shard
from pipeline.prefetch import TOGETHER, ordered_map
from pipeline.sources import ReadOptions, Record, ShardEnd

if TYPE_CHECKING:
    from pipeline.predictors import Predictor

LEAST_DECODE_BYTES = 128 << 20
"""A read task may always decode so much at once."""
LEFT_TABLE_BYTES = 64 << 20
LEFT_BATCH_BYTES = 1 << 30
"""JPEGs that are left encoded: so many bytes end a table, and a batch of the largest is this much. An Arrow column of
bytes ends at 2 GiB, and what waits for the GPU waits in memory."""


@dataclass(frozen=True, slots=True)
class Loader:
    """How every shard of a run is read and decoded.

    keep: column of the shard → (column of the result, its type). rows_per_table: images in one table.
    decode_bytes: what the images that are being decoded may take together; a larger one goes alone.
    leave_jpegs: the JPEGs that a GPU can decode stay as they are stored.
    """

    transform: Transform
    options: ReadOptions
    keep: Mapping[str, tuple[str, pa.DataType]]
    max_pixels: int
    exif_rotate: bool
    exact: bool
    keep_tiles: bool
    rows_per_table: int
    threads: int
    decode_bytes: int = 1 << 30
    leave_jpegs: bool = False

    @staticmethod
    def of(
        config: RunConfig,
        predictor: "Predictor",
        options: ReadOptions,
        *,
        rows_per_table: int,
        threads: int = 1,
        keep: pa.Schema | None = None,
        decode_bytes: int = LEAST_DECODE_BYTES,
    ) -> "Loader":
        """As the settings of a run and its predictor want it. keep: the kept columns, by their names in the shards."""
        exact, aliases = config.decoder == "exact", config.keep_names()
        return Loader(
            transform=predictor.transform,
            options=options,
            keep={column.name: (aliases[column.name], column.type) for column in keep or ()},
            max_pixels=config.max_pixels,
            exif_rotate=config.exif_rotate,
            exact=exact,
            keep_tiles=predictor.takes_tiles and not exact,
            rows_per_table=rows_per_table,
            threads=threads,
            decode_bytes=decode_bytes,
            leave_jpegs=config.decoder == "gpu" and predictor.takes_encoded,
        )

    def load(self, shard: Shard, todo: Ranges) -> Iterator[pa.Table]:
        """Yield the rows of `todo` in order, decoded, with the row that ends the shard last."""
        items = sources.read(shard, todo, self.options)
        batch: list[_Row] = []
        images = left_bytes = 0
        work = partial(self._decode, MemoryBudget(self.decode_bytes))
        for row in ordered_map(work, items, self.threads, 4 * self.threads, _encoded_bytes, TOGETHER):
            is_image = isinstance(row.item, Record)
            # The end of the shard goes along with the last images: alone it would take an image's place in a batch.
            if is_image and (images == self.rows_per_table or left_bytes >= LEFT_TABLE_BYTES):
                yield self._table(shard, batch)
                batch, images, left_bytes = [], 0, 0
            batch.append(row)
            images += is_image
            left_bytes += len(row.image.data) if isinstance(row.image, Encoded) else 0
        if batch:
            yield self._table(shard, batch)

    def _decode(self, budget: MemoryBudget, item: Record | ShardEnd) -> "_Row":
        if isinstance(item, ShardEnd) or item.data is None:
            return _Row(item, None, item.error if isinstance(item, Record) else None, 0.0, 0)
        size_bytes, record = len(item.data), replace(item, data=None)  # encoded images do not wait for their table
        started = time.perf_counter()
        try:
            image = self._leave(item.data) or decode(
                item.data,
                self.transform,
                max_pixels=self.max_pixels,
                exif_rotate=self.exif_rotate,
                exact=self.exact,
                keep_tiles=self.keep_tiles,
                reserve=budget.reserve,
            )
            return _Row(record, image, None, time.perf_counter() - started, size_bytes)
        except ImageError as error:
            return _Row(record, None, error, time.perf_counter() - started, size_bytes)

    def _leave(self, data: bytes) -> Encoded | None:
        if not self.leave_jpegs or len(data) > LEFT_BATCH_BYTES // self.rows_per_table:
            return None
        return leave_encoded(data, self.transform, max_pixels=self.max_pixels, exif_rotate=self.exif_rotate)

    def _table(self, shard: Shard, batch: "list[_Row]") -> pa.Table:
        columns: dict[str, Any] = {
            "shard": np.full(len(batch), shard.index, np.int32),
            schema.PIXELS: _pixel_column([row.image for row in batch]),
            "gpu_seconds": np.zeros(len(batch), np.float32),
        }
        rows = [row.columns() for row in batch]
        for name in rows[0]:
            columns[name] = [row[name] for row in rows]
        for name, (alias, type_) in self.keep.items():
            columns[alias] = pa.array([_kept(row.item, name) for row in batch], type_)
        columns["core_seconds"] = np.full(len(batch), usage.take_core_seconds() / len(batch), np.float32)
        types = schema.loaded(dict(self.keep.values()))
        return pa.table({name: columns[name] for name in types.names}, schema=types)


@dataclass(frozen=True, slots=True)
class _Row:
    item: Record | ShardEnd
    image: Decoded | Encoded | None
    error: ImageError | None
    decode_seconds: float
    size_bytes: int

    def columns(self) -> dict[str, Any]:
        item, error = self.item, self.error
        record = item if isinstance(item, Record) else None
        return {
            "image_id": record and record.image_id,
            "source": record and record.source,
            "member": record and record.member,
            "row": record.row if record else item.rows,  # type: ignore[union-attr]
            "width": self.image and self.image.width,
            "height": self.image and self.image.height,
            schema.ORIENTATION: self.image.orientation if isinstance(self.image, Encoded) else None,
            "stage": error and error.stage,
            "error_type": error and error.error_type,
            "message": error and error.message,
            schema.SHARD_ROWS: item.rows if isinstance(item, ShardEnd) else None,
            "read_seconds": record.read_seconds if record else 0.0,
            "decode_seconds": self.decode_seconds,
            "predict_seconds": 0.0,
            "size_bytes": self.size_bytes,
        }


def _encoded_bytes(item: Record | ShardEnd) -> int:
    return len(item.data or b"") if isinstance(item, Record) else 0


def _kept(item: Record | ShardEnd, name: str) -> Any:
    return item.kept.get(name) if isinstance(item, Record) else None


def _pixel_column(images: list[Decoded | Encoded | None]) -> pa.Array:
    """A binary column of uint8 [side, side, 3] or of whole JPEGs, null where there is no image; one copy an image."""
    found = [None if image is None else _bytes(image) for image in images]
    sizes = [0 if image is None else image.size for image in found]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    pixels = np.empty(offsets[-1], np.uint8)
    for image, start, stop in zip(found, offsets, offsets[1:], strict=False):
        if image is not None:
            pixels[start:stop].reshape(image.shape)[...] = image
    bitmap = np.packbits([image is not None for image in images], bitorder="little")
    return pa.Array.from_buffers(pa.binary(), len(images), [pa.py_buffer(each) for each in (bitmap, offsets, pixels)])


def _bytes(image: Decoded | Encoded) -> np.ndarray:
    return image.pixels if isinstance(image, Decoded) else np.frombuffer(image.data, np.uint8)
