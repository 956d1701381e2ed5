"""read → decode: the rows of a shard as Arrow tables with pixels. Imports neither Ray nor torch."""

import inspect
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import schema, sources
from pipeline.config import RunConfig
from pipeline.coverage import Ranges
from pipeline.errors import ImageError, SettingRefused
from pipeline.geo import sentinel2
from pipeline.geo.sentinel2 import Claim
from pipeline.images import pixels
from pipeline.images.decode import OffsetOf, decode, leave_encoded
from pipeline.images.measure import Measure, measured
from pipeline.images.phash import PHash, need_imagehash
from pipeline.images.pixels import RGB8, Decoded, Encoded, PixelFormat
from pipeline.images.quality import Quality
from pipeline.images.transform import Transform
from pipeline.images.values import DEFAULT, Values
from pipeline.images.windows import to_pixels
from pipeline.predictors.base import Allotment, Predictor
from pipeline.sources import ReadOptions, Record, ShardEnd
from pipeline.sources.shard import Shard
from pipeline.stages import usage
from pipeline.threads import GROUP_ITEMS, MemoryBudget, ordered_map

MIN_DECODE_BYTES = 128 << 20
"""A read task may always decode this many bytes of pixels at once."""
TABLE_BYTES = 1 << 30
"""Pixels that end a table: one Arrow column of bytes holds 2 GiB."""
ENCODED_TABLE_BYTES = 64 << 20
ENCODED_BATCH_BYTES = 1 << 30
"""For JPEGs that stay encoded: bytes that end a table, and bytes of a batch of the largest that are left. They wait for
the GPU in memory."""


@dataclass(frozen=True, slots=True)
class Loader:
    """How every shard of a run is read and decoded.

    keep: column of the shard → (column of the result, its type). rows_per_table: images in one table.
    decode_bytes: memory for the images that are decoded at once; a larger image is decoded alone.
    values: the bands, the range of values, and the format of the network's pixels.
    harmonize: --harmonize, if the network takes digital numbers of Sentinel-2.
    leave_jpegs: leave JPEGs encoded that a GPU can decode. measures: of each image, which become columns.
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
    values: Values = DEFAULT
    harmonize: str = ""
    measures: tuple[Measure, ...] = ()

    @property
    def kept(self) -> dict[str, pa.DataType]:
        """The columns of the results beside the predictor's: those of the shards, and those of the measures."""
        own = {column.name: column.type for measure in self.measures for column in measure.columns}
        return {**dict(self.keep.values()), **own}

    @property
    def pixel_format(self) -> PixelFormat:
        return self.values.pixel_format

    @staticmethod
    def of(
        config: RunConfig,
        predictor: Predictor,
        options: ReadOptions,
        *,
        rows_per_table: int,
        threads: int = 1,
        keep: pa.Schema | None = None,
        decode_bytes: int = MIN_DECODE_BYTES,
    ) -> "Loader":
        """For the settings of a run and its predictor. keep: the kept columns, by their names in the shards."""
        exact, aliases = config.decoder == "exact", config.keep_names()
        values, harmonize = _values(config, predictor), harmonize_of(config, predictor)
        return Loader(
            transform=predictor.transform,
            options=replace(
                options, network_bands=predictor.pixel_format.bands, wanted=values.wanted, harmonize=harmonize
            ),
            keep={column.name: (aliases.get(column.name, column.name), column.type) for column in keep or ()},
            max_pixels=config.max_pixels,
            exif_rotate=config.exif_rotate,
            exact=exact,
            keep_tiles=predictor.takes_tiles and not exact,
            rows_per_table=rows_per_table,
            threads=threads,
            decode_bytes=decode_bytes,
            leave_jpegs=config.decoder == "gpu" and predictor.takes_encoded,
            values=values,
            harmonize=harmonize,
            measures=measures_of(config),
        )

    def load(self, shard: Shard, todo: Ranges, wanted: Callable[[Record], bool] | None = None) -> Iterator[pa.Table]:
        """Yield the rows of `todo` in order, decoded, with the row that ends the shard last.

        wanted: of the records with data, those to decode; the others are left out.
        """
        if (tables := sources.read_tables(shard, todo, self.options)) is not None:
            yield from self._load_tables(shard, tables)
            return
        items = sources.read(shard, todo, self.options)
        if wanted:
            items = (item for item in items if not isinstance(item, Record) or item.data is None or wanted(item))
        batch: list[_Row] = []
        images = encoded_bytes = pixel_bytes = 0
        work = partial(self._decode, MemoryBudget(self.decode_bytes))
        for row in ordered_map(work, items, self.threads, 4 * self.threads, _size_bytes, GROUP_ITEMS):
            is_image = isinstance(row.item, Record)
            is_full = images == self.rows_per_table or encoded_bytes >= ENCODED_TABLE_BYTES
            # The end of the shard goes with the last images: alone it would take the place of an image in a batch.
            if is_image and (is_full or pixel_bytes >= TABLE_BYTES):
                yield self._table(shard, batch)
                batch, images, encoded_bytes, pixel_bytes = [], 0, 0, 0
            batch.append(row)
            images += is_image
            encoded_bytes += len(row.image.data) if isinstance(row.image, Encoded) else 0
            pixel_bytes += row.image.pixels.nbytes if isinstance(row.image, Decoded) else 0
        if batch:
            yield self._table(shard, batch)

    def _load_tables(self, shard: Shard, items: Iterator[pa.Table | Record | ShardEnd]) -> Iterator[pa.Table]:
        """The tables of a source that decodes; the row that ends the shard goes with the last of them."""
        waiting: pa.Table | None = None
        started = time.perf_counter()
        for item in items:
            seconds, started = time.perf_counter() - started, time.perf_counter()
            if isinstance(item, pa.Table):
                table = self._of_table(shard, item, seconds)
            else:
                error = item.error if isinstance(item, Record) else None
                table = self._table(shard, [_Row(item, None, error, 0.0, 0)])
            if waiting is not None and isinstance(item, pa.Table):
                yield waiting
                waiting = None
            waiting = table if waiting is None else pa.concat_tables([waiting, table])
        if waiting is not None:
            yield waiting.combine_chunks()

    def _of_table(self, shard: Shard, rows: pa.Table, seconds: float) -> pa.Table:
        count = len(rows)
        columns: dict[str, Any] = {name: rows[name] for name in rows.column_names if name != schema.VECTOR}
        columns |= {alias: rows[name].cast(type_) for name, (alias, type_) in self.keep.items() if name in columns}
        dim = 0
        if schema.VECTOR in rows.column_names:
            vectors = rows[schema.VECTOR].combine_chunks()
            dim = vectors.type.list_size
            columns |= pixels.vectors_to_columns(vectors)
        columns["shard"] = np.full(count, shard.index, np.int32)
        columns["read_seconds"] = np.full(count, seconds / count, np.float32)
        columns["size_bytes"] = np.full(count, 4 * dim, np.int64)
        columns["core_seconds"] = np.full(count, usage.take_core_seconds() / count, np.float32)
        zeros = np.zeros(count, np.float32)
        columns |= {name: zeros for name in ("decode_seconds", "predict_seconds", "gpu_seconds")}
        types = schema.loaded(self.kept)
        arrays = {each.name: columns.get(each.name, pa.nulls(count, each.type)) for each in types}
        return pa.table(arrays, schema=types)

    def _decode(self, budget: MemoryBudget, item: Record | ShardEnd) -> "_Row":
        if isinstance(item, ShardEnd) or item.data is None:
            return _Row(item, None, item.error if isinstance(item, Record) else None, 0.0, 0)
        size_bytes, record = _size_bytes(item), replace(item, data=None)  # stored bytes do not wait for their table
        started = time.perf_counter()
        try:
            image = self._image(item.data, item.image_id, budget)
            return _Row(record, image, None, time.perf_counter() - started, size_bytes)
        except ImageError as error:
            return _Row(record, None, error, time.perf_counter() - started, size_bytes)

    def offset_of(self, image_id: str) -> OffsetOf | None:
        """For `decode`: the offset of Sentinel-2 in the numbers of an image, by its name and its metadata."""
        return (lambda metadata: self.offset_claim(image_id, metadata).offset) if self.harmonize else None

    def offset_claim(self, image_id: str, metadata: Mapping[str, str]) -> Claim:
        """The offset to subtract from the numbers of an image, and why. Raises DecodeError (unsupported)."""
        claims = [*sentinel2.claims_of_name(image_id), *sentinel2.claims_of_file(metadata)]
        return sentinel2.harmonize(self.harmonize, claims, "the image")

    def _image(self, data: bytes | np.ndarray, image_id: str, budget: MemoryBudget) -> Decoded | Encoded:
        """Pixels that the predictor takes, or a JPEG for its GPU. Raises DecodeError."""
        if isinstance(data, np.ndarray):
            pixels = data
            if isinstance(data, np.ma.MaskedArray):
                pixels = to_pixels(data, self.transform, self.values)
            checked = self.pixel_format.check(pixels)
            return Decoded(checked, data.shape[1], data.shape[0], measured=measured(self.measures, checked))
        if encoded := self._leave(data):
            return encoded
        decoded = decode(
            data,
            self.transform,
            max_pixels=self.max_pixels,
            exif_rotate=self.exif_rotate,
            exact=self.exact,
            keep_tiles=self.keep_tiles,
            reserve=budget.reserve,
            values=self.values,
            offset_of=self.offset_of(image_id),
            measures=self.measures,
        )
        self.pixel_format.check(decoded.pixels)
        return decoded

    def _leave(self, data: bytes) -> Encoded | None:
        if not self.leave_jpegs or len(data) > ENCODED_BATCH_BYTES // self.rows_per_table:
            return None
        return leave_encoded(
            data, self.transform, max_pixels=self.max_pixels, exif_rotate=self.exif_rotate, values=self.values
        )

    def _table(self, shard: Shard, batch: "list[_Row]") -> pa.Table:
        columns: dict[str, Any] = {
            "shard": np.full(len(batch), shard.index, np.int32),
            **pixels.to_columns([row.image for row in batch]),
            "gpu_seconds": np.zeros(len(batch), np.float32),
        }
        rows = [row.columns() for row in batch]
        for name in rows[0]:
            columns[name] = [row[name] for row in rows]
        for name, (alias, type_) in self.keep.items():
            columns[alias] = pa.array([_kept(row.item, name) for row in batch], type_)
        for column in (column for measure in self.measures for column in measure.columns):
            columns[column.name] = pa.array([row.measured.get(column.name) for row in batch], column.type)
        columns[schema.REPEATS] = [self._repeats(row) for row in batch]
        columns["core_seconds"] = np.full(len(batch), usage.take_core_seconds() / len(batch), np.float32)
        types = schema.loaded(self.kept)
        return pa.table({name: columns[name] for name in types.names}, schema=types)

    def _repeats(self, row: "_Row") -> list[dict[str, Any]] | None:
        """The further rows of a record, with their kept columns."""
        item = row.item
        if isinstance(item, ShardEnd) or not item.repeats:
            return None
        kept = [(name, alias) for name, (alias, _) in self.keep.items()]
        return [
            {
                "image_id": each.image_id,
                "member": each.member,
                **{alias: each.kept.get(name) for name, alias in kept},
                **row.measured,
            }
            for each in item.repeats
        ]


def measures_of(config: RunConfig) -> tuple[Measure, ...]:
    """The measures that the settings ask for, in the order of their columns."""
    return (*([PHash()] if config.phash else []), *([Quality()] if config.quality else []))


def harmonize_of(config: RunConfig, predictor: Predictor) -> str:
    """--harmonize, "" if the network does not take digital numbers of Sentinel-2."""
    return config.harmonize if predictor.specification and predictor.specification.harmonize else ""


def _values(config: RunConfig, predictor: Predictor) -> Values:
    """How the numbers of a run are read."""
    specification, nodata_fill = predictor.specification, config.nodata_fill
    if specification and nodata_fill is None and specification.pixels != "uint8":
        nodata_fill = specification.nodata
    wanted = specification.bands if specification else ()
    return Values(config.band_names(), config.scale_range(), nodata_fill, predictor.pixel_format, wanted)


@dataclass(frozen=True, slots=True)
class _Row:
    item: Record | ShardEnd
    image: Decoded | Encoded | None
    error: ImageError | None
    decode_seconds: float
    size_bytes: int

    @property
    def measured(self) -> Mapping[str, Any]:
        return self.image.measured if isinstance(self.image, Decoded) else {}

    def columns(self) -> dict[str, Any]:
        item, error = self.item, self.error
        record = item if isinstance(item, Record) else None
        left_out = dict(item.left_out) if isinstance(item, ShardEnd) else None
        return {
            "image_id": record and record.image_id,
            "source": record and record.source,
            "member": record and record.member,
            "row": record.row if record else item.rows,  # type: ignore[union-attr]
            "width": self.image and self.image.width,
            "height": self.image and self.image.height,
            "stage": error and error.stage,
            "error_type": error and error.error_type,
            "message": error and error.message,
            schema.SHARD_ROWS: item.rows if isinstance(item, ShardEnd) else None,
            schema.SHARD_LEFT_OUT: json.dumps(left_out) if left_out else None,
            schema.IS_EMPTY: record is not None and record.is_empty,
            "read_seconds": record.read_seconds if record else 0.0,
            "decode_seconds": self.decode_seconds,
            "predict_seconds": 0.0,
            "size_bytes": self.size_bytes,
            schema.CONSTANT: isinstance(self.image, Decoded) and self.image.is_constant if record else None,
        }


def _size_bytes(item: Record | ShardEnd) -> int:
    """Size of an image as its source gave it."""
    return item.size_bytes if isinstance(item, Record) else 0


def _kept(item: Record | ShardEnd, name: str) -> Any:
    return item.kept.get(name) if isinstance(item, Record) else None


def check_settings(config: RunConfig, predictor: Predictor) -> None:
    """Raise SettingRefused for kept columns with taken names, batches too large for an Arrow column, an old load()."""
    of_sources = {name for source in sources.SOURCES.values() for name in source.columns.names}
    taken = {*schema.predicted(predictor.columns, {}).names, *schema.loaded({}).names, *of_sources}
    taken |= {name for measure in measures_of(config) for name in measure.columns.names}
    for name, alias in config.keep_names().items():
        if alias in taken:
            raise SettingRefused(
                f"--keep {name}: there is already a column {alias!r}; give it another name, "
                f"as in --keep {name}:own_{name}"
            )
        taken.add(alias)
    if not isinstance(predictor.pixel_format, PixelFormat):
        raise SettingRefused(
            f"{type(predictor).__qualname__}.pixel_format is {predictor.pixel_format!r}: it must be a PixelFormat, "
            'as in PixelFormat("uint8", 3)'
        )
    _check_values(config, predictor)
    _check_measures(config, predictor)
    max_batch = predictor.pixel_format.max_batch_size(predictor.transform)
    if config.batch_size is not None and config.batch_size > max_batch:
        raise SettingRefused(
            f"--batch-size is {config.batch_size}: with images of this size it can be at most {max_batch}"
        )
    try:
        inspect.signature(predictor.load).bind(Allotment())
    except (TypeError, ValueError) as error:
        raise SettingRefused(
            f"{type(predictor).__qualname__}.load() must take one argument, the Allotment of its actor (cores, "
            "batch_size, gpu_share, images): write def load(self, allotment)"
        ) from error


def _check_measures(config: RunConfig, predictor: Predictor) -> None:
    """Raise SettingRefused for measures of pixels that are no 8-bit RGB, or that are not on the CPU."""
    flags = {"--phash": config.phash, "--quality": config.quality}
    for flag in (name for name, is_set in flags.items() if is_set):
        if config.vectors:
            raise SettingRefused(
                f"{flag} is computed from images, and --from reads vectors: set it on `nightshift embed`"
            )
        if predictor.pixel_format != RGB8:
            raise SettingRefused(
                f"{flag} is computed from 8-bit pictures of 1 or 3 bands, and the network takes "
                f"{predictor.pixel_format}: leave it out"
            )
        if config.decoder == "gpu":
            raise SettingRefused(f"{flag} needs pixels on the CPU, and --decoder gpu leaves JPEGs to the GPU: use fast")
    if config.phash:
        need_imagehash("--phash")


def _check_values(config: RunConfig, predictor: Predictor) -> None:
    """Raise SettingRefused for bands and a range of values that the network cannot get."""
    format, specification = predictor.pixel_format, predictor.specification
    bands, counts_of_bands = len(config.band_names()), {format.bands}
    if specification:
        counts_of_bands.add(sum(band.filler is None for band in specification.bands))
    if config.harmonize != "auto" and not (specification and specification.harmonize):
        raise SettingRefused(
            f"--harmonize is {config.harmonize}: it needs an --input-spec for digital numbers of Sentinel-2"
        )
    if bands and bands not in counts_of_bands and not (bands == 1 and format == RGB8):
        counts = "1 or 3 bands" if format == RGB8 else f"{format.bands} bands"
        raise SettingRefused(f"--bands is {config.bands!r}: the network takes {counts}")
    if predictor.trained_scale and config.scale_range() != predictor.trained_scale:
        wanted = ":".join(f"{value:g}" for value in predictor.trained_scale)
        raise SettingRefused(
            f"--scale is {config.scale or 'not given'}, but the weights were trained with {wanted}: set it to that"
        )
    if config.scale is not None and format.dtype != "uint8":
        raise SettingRefused(
            f"--scale is {config.scale!r}: the network takes {format.dtype}, whose values stay as they are"
        )
    is_scaled = config.scale is not None or config.tile_size is not None
    if config.nodata_fill is not None and not is_scaled and format.dtype == "uint8":
        raise SettingRefused("--nodata-fill needs --scale, the range that the value lies in")
    if config.nodata_fill is not None and config.scale is None and format.dtype != "float32":
        high = np.iinfo(format.dtype).max
        if not 0 <= config.nodata_fill <= high or config.nodata_fill % 1:
            raise SettingRefused(
                f"--nodata-fill is {config.nodata_fill:g}: without --scale it must be a whole number from 0 to {high}"
            )
