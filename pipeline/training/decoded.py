"""The images of an archive, decoded once to a file that is mapped into memory, so that epochs do not decode again."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import schema
from pipeline.config import RunConfig
from pipeline.coverage import END, Ranges, count, from_rows, intersect
from pipeline.errors import InputRefused, SettingRefused
from pipeline.images.pixels import PixelTable
from pipeline.planning import plan as plans
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan
from pipeline.predictors.base import Predictor
from pipeline.sources import Record
from pipeline.sources.objects import LooseImages, with_keys
from pipeline.sources.shard import Shard
from pipeline.stages import value_sample
from pipeline.stages.load import Loader, check_settings, harmonize_of
from pipeline.storage import uris

PIXELS, ROWS, ERRORS, DONE = "pixels.raw", "images.parquet", "errors.parquet", "done.json"
MAX_THREADS = 8
IMAGES_PER_TABLE = 64
SPARE_BYTES = 256 << 20
"""Bytes of a disk that decoded pixels leave free."""

Fits = Callable[[str], bool]
"""Whether an image_id is wanted."""


@dataclass(frozen=True)
class DecodedImages:
    """Decoded images in a folder, and the images that could not be decoded.

    uri: the archive, in messages. table: one row per image, with image_id, source, member, width, height and the kept
    columns. failed: one row per error, with the columns of `schema.ERRORS`. shape: (N, side, side, bands), of `dtype`.
    empty: number of windows without data. config: the settings that read them, with the measured range of --scale.
    """

    config: RunConfig
    uri: str
    folder: Path
    fingerprint: str
    table: pa.Table
    failed: pa.Table
    shape: tuple[int, int, int, int]
    dtype: str
    empty: int = 0

    @property
    def rows(self) -> int:
        """Number of decoded images."""
        return len(self.table)

    @property
    def size_bytes(self) -> int:
        """Size of the pixels on disk."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def file(self) -> str:
        """The file of pixels, for `open_pixels`."""
        return str(self.folder / PIXELS)

    def require(self, columns: Sequence[str]) -> None:
        """Raise InputRefused if the images lack one of these columns."""
        if missing := [name for name in columns if name not in self.table.column_names]:
            raise InputRefused(
                f"--input {self.uri} has no column {', '.join(missing)}; its columns are "
                f"{', '.join(self.table.column_names)}"
            )

    def batches(self, columns: Sequence[str], /) -> Iterator[pa.RecordBatch]:
        """The rows of all images."""
        yield from self.table.select(list(columns)).to_batches()

    def errors(self, columns: Sequence[str], /) -> Iterator[pa.RecordBatch]:
        """The rows of the errors."""
        yield from self.failed.select(list(columns)).to_batches()


def open_pixels(file: str, shape: tuple[int, int, int, int], dtype: str) -> NDArray[Any]:
    """The pixels [N, side, side, bands] of a file, mapped into memory and not writable.

    Raises SettingRefused if this machine does not have the file.
    """
    if not os.path.isfile(file):
        raise SettingRefused(
            f"{file} does not exist on {os.uname().nodename}: with several machines, --work-dir must be a folder that "
            "all of them share"
        )
    return np.memmap(file, dtype, "r", shape=shape)


def archive_of(config: RunConfig, predictor: Predictor) -> Archive:
    """The images of --input. The bands of an input specification are known already."""
    archive = Archive(config)
    if predictor.specification:
        archive.use_bands(predictor.specification.bands, harmonize_of(config, predictor))
    return archive


def decode_images(
    config: RunConfig, predictor: Predictor, folder: Path, fits: Fits | None, say: Callable[[str], None]
) -> DecodedImages:
    """Decode the images of an archive into a folder, or open them if the same images are there already.

    config: of the archive; `output` is the folder. predictor: prepared; its `transform` and `pixel_format` say what the
    pixels are. fits: which images are wanted; None for all. Raises InputRefused, and SettingRefused if the pixels do
    not fit on the disk.
    """
    check_settings(config, predictor)
    archive = archive_of(config, predictor)
    archive.use_for(predictor.pixel_format.bands, takes_8_bits=predictor.pixel_format.dtype == "uint8")
    shutil.rmtree(folder / plans.FOLDER, ignore_errors=True)
    plan = plans.make(str(folder), archive.shards(), archive.keep_types, archive.left_out.counts)
    for line in archive.notices.lines():
        say(line)
    if value_sample.is_needed(config, predictor):
        config, notes = value_sample.settle(config, predictor, archive.options(), plan)
        for note in notes:
            say(note)
    return _Decoding(config, predictor, folder, plan, archive, fits, say).result()


@dataclass
class _Decoding:
    config: RunConfig
    predictor: Predictor
    folder: Path
    plan: Plan
    archive: Archive
    fits: Fits | None
    say: Callable[[str], None]

    def result(self) -> DecodedImages:
        todo = [(shard, rows) for shard in plans.read_shards(self.plan) if (rows := self._rows(shard))]
        fingerprint = self._fingerprint(todo)
        if found := self._open(fingerprint):
            self.say(f"{found.rows:,} images are decoded already, in {self.folder}")
            return found
        known = sum(count(rows) for _, rows in todo if rows[-1][1] < END)
        image_bytes = self.predictor.pixel_format.image_bytes(self.predictor.transform)
        self._check_disk(known * image_bytes, known)
        self.say(f"decoding up to {known * image_bytes / 1e9:.2f} GB of pixels to {self.folder}" if known
                 else f"decoding images to {self.folder}")  # fmt: skip
        (self.folder / DONE).unlink(missing_ok=True)
        kept, failed, empty = self._decode(todo)
        pq.write_table(kept, self.folder / ROWS)
        pq.write_table(failed, self.folder / ERRORS)
        record = {"fingerprint": fingerprint, "images": len(kept), "empty": empty}
        (self.folder / DONE).write_text(json.dumps(record))
        found = self._open(fingerprint)
        assert found is not None
        self.say(f"{found.rows:,} images are decoded, {found.size_bytes / 1e9:.2f} GB; {len(failed):,} errors")
        return found

    def _rows(self, shard: Shard) -> Ranges:
        """The rows of a shard that may be wanted, as far as the names of loose images say it."""
        rows: Ranges = ((0, END if shard.rows is None else shard.rows),) if shard.rows != 0 else ()
        if self.fits is None or not isinstance(shard.payload, LooseImages) or shard.payload.kept is not None:
            return rows
        names = (uris.join(shard.uri, key) for key in shard.payload.keys)
        wanted = [row for row, name in enumerate(names) if self.fits(name) or self.fits(uris.redact(name))]
        return intersect(rows, from_rows(wanted))

    def _fingerprint(self, todo: list[tuple[Shard, Ranges]]) -> str:
        settings = {
            "config": self.config.result_settings(),
            "transform": asdict(self.predictor.transform),
            "pixels": str(self.predictor.pixel_format),
            "harmonize": harmonize_of(self.config, self.predictor),
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for shard, rows in todo:
            payload = "" if shard.payload is None else shard.payload.to_json()
            digest.update(repr((shard.kind, shard.uri, shard.size_bytes, shard.etag, rows, payload)).encode())
        return digest.hexdigest()[:16]

    def _open(self, fingerprint: str) -> DecodedImages | None:
        """The images of an earlier decoding, None if there are none of the same."""
        with suppress(OSError, ValueError, KeyError, pa.ArrowException):
            record = json.loads((self.folder / DONE).read_text())
            if record["fingerprint"] != fingerprint:
                return None
            form, side = self.predictor.pixel_format, self.predictor.transform.crop
            images = DecodedImages(
                self.config,
                " ".join(map(uris.redact, self.config.input)),
                self.folder,
                fingerprint,
                pq.read_table(self.folder / ROWS),
                pq.read_table(self.folder / ERRORS),
                (record["images"], side, side, form.bands),
                form.dtype,
                record["empty"],
            )
            if os.path.getsize(images.file) == images.size_bytes and images.rows == record["images"]:
                return images
        return None

    def _check_disk(self, needed_bytes: int, images: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed_bytes + SPARE_BYTES > free:
            raise SettingRefused(
                f"the decoded pixels of {images:,} images take {needed_bytes / 1e9:.2f} GB, and {self.folder} has "
                f"{free / 1e9:.2f} GB free: name a folder on a larger disk with --work-dir, or choose fewer images"
            )

    def _decode(self, todo: list[tuple[Shard, Ranges]]) -> tuple[pa.Table, pa.Table, int]:
        """Write the pixels. Returns the rows of images and of errors, and the number of empty windows."""
        threads = max(1, min(MAX_THREADS, len(os.sched_getaffinity(0))))
        loader = Loader.of(
            self.config,
            self.predictor,
            self.archive.options(),
            rows_per_table=IMAGES_PER_TABLE,
            threads=threads,
            keep=self.plan.keep,
            decode_bytes=1 << 30,
        )
        keys = self.archive.keys_with_credentials(self.plan)
        written = _Writer(self.folder / PIXELS, loader, self.predictor.pixel_format.shape(self.predictor.transform))
        with written:
            for shard, rows in todo:
                full = with_keys(shard, keys[shard.index]) if shard.index in keys else shard
                for table in loader.load(full, rows, self._is_wanted if self.fits else None):
                    written.add(table, self.fits)
                    self._check_disk(0, written.images)
        return (*written.tables(), written.empty)

    def _is_wanted(self, record: Record) -> bool:
        assert self.fits is not None
        return self.fits(record.image_id) or any(self.fits(each.image_id) for each in record.repeats)


class _Writer:
    """Appends the pixels of tables of the loader to a file, and collects their other columns."""

    def __init__(self, path: Path, loader: Loader, shape: tuple[int, int, int]) -> None:
        self.file = open(path, "wb")  # noqa: SIM115
        self.shape, self.images, self.empty = shape, 0, 0
        types = schema.loaded(loader.kept)
        self.columns = list(dict.fromkeys([*schema.IDENTITY.names, *loader.kept]))
        self.rows: list[pa.Table] = [types.empty_table().select(self.columns)]
        self.errors: list[pa.Table] = [types.empty_table().select(schema.ERRORS.names)]

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def tables(self) -> tuple[pa.Table, pa.Table]:
        return pa.concat_tables(self.rows), pa.concat_tables(self.errors)

    def add(self, table: pa.Table, fits: Fits | None) -> None:
        """Add the images, errors and empty windows of a table. The row that ends a shard is none of them."""
        self.empty += int(pc.sum(table[schema.IS_EMPTY]).as_py() or 0)
        self.errors.append(table.filter(pc.is_valid(table["stage"])).select(schema.ERRORS.names))
        for places, pixels in PixelTable(table).groups():
            if pixels.shape[1:] != self.shape:
                self._refuse(table.take(places), pixels)
                continue
            for place, image in zip(places.tolist(), pixels, strict=True):
                self._add_image(table.slice(place, 1), image, fits)

    def _add_image(self, row: pa.Table, image: NDArray[Any], fits: Fits | None) -> None:
        """Add an image, and the further rows with the same pixels."""
        own = row.select(self.columns).to_pylist()[0]
        repeats: list[Mapping[str, Any]] = row[schema.REPEATS][0].as_py() or []
        each = [own, *({**own, **more, "row": own["row"] + number} for number, more in enumerate(repeats, start=1))]
        wanted = [values for values in each if fits is None or fits(values["image_id"])]
        self.rows.append(pa.Table.from_pylist(wanted, schema=self.rows[0].schema))
        for _ in wanted:
            self.file.write(np.ascontiguousarray(image).data)
        self.images += len(wanted)

    def _refuse(self, rows: pa.Table, pixels: NDArray[Any]) -> None:
        message = f"the image has pixels {list(pixels.shape[1:])}, but the training takes {list(self.shape)}"
        fault = {"stage": "decode", "error_type": "unsupported", "message": message}
        self.errors.append(
            pa.Table.from_pylist(
                [{**row, **fault} for row in rows.select(schema.IDENTITY.names[:5]).to_pylist()],
                schema=self.errors[0].schema,
            )
        )
