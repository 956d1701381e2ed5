"""decode → predict: a predictor over Arrow tables. A row that cannot be predicted costs itself, never its batch."""

import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.errors import DecodeError, ImageError, NightshiftError, PredictError, is_out_of_memory, message_line
from pipeline.halving import Failure, by_halves
from pipeline.images.pixels import Encoded, Images, PixelTable, Places
from pipeline.predictors.base import Allotment, Predictor
from pipeline.stages import usage

OUT_OF_MEMORY = "out_of_memory"

MEMORY_PAUSES = (1.0, 5.0, 20.0)
"""Seconds to wait between retries while another process frees memory."""

NOT_FINITE = PredictError("not_finite", "the network's output holds NaN, infinity or null")

Arrays = Mapping[str, pa.Array]
R = TypeVar("R")


class Predict:
    """One model actor: loads the predictor once, then turns tables of pixels into tables of results."""

    def __init__(self, predictor: Predictor, keep: Mapping[str, pa.DataType], allotment: Allotment) -> None:
        self.predictor, self.allotment = predictor, allotment
        self.columns = schema.dense(predictor.columns)
        self.schema = schema.predicted(self.columns, keep)
        self.max_images: int | None = None  # per call of the predictor, once a batch has not fitted the memory
        self.busy = usage.BusyClock()
        self.refusal: NightshiftError | None = None
        try:
            predictor.load(allotment)
        except NightshiftError as error:  # raised here, Ray would take it for a lost node and try elsewhere
            self.refusal = error

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace the pixels of each row by the predictor's columns (null if the row is an error)."""
        if self.refusal:
            raise self.refusal
        with self.busy.at_work() as busy:
            started = time.perf_counter()
            places, images, errors = self._images(table)
            columns, failed = self._predict(images)
            seconds = (time.perf_counter() - started) / max(len(places), 1)
            errors |= {int(places[i]): error for i, error in failed.items()}
            merged = self._merge(table, columns, errors, places, seconds)
        gpu_seconds = busy.seconds * (self.allotment.gpu_share or 0.0)
        return _with_usage(merged, usage.take_core_seconds(), gpu_seconds)

    def _images(self, table: pa.Table) -> tuple[Places, Images, dict[int, ImageError]]:
        """The rows of the images, their pixels, and the errors of JPEGs by row.

        JPEGs that were left encoded become pixels here, on the network's device.
        """
        pixels = PixelTable(table)
        groups = list(pixels.groups())
        places, arrays = [rows for rows, _ in groups], [group for _, group in groups]
        errors: dict[int, ImageError] = {}
        if len(pixels.encoded):
            decoded, failed = self._decoded(pixels.jpegs())
            errors = {int(pixels.encoded[i]): error for i, error in failed.items()}
            places.append(np.delete(pixels.encoded, list(failed)))
            arrays += decoded
        return np.concatenate([np.empty(0, np.int64), *places]), Images([each for each in arrays if len(each)]), errors

    def _decoded(self, jpegs: list[Encoded]) -> tuple[list[Any], dict[int, DecodeError]]:
        """Pixels of the JPEGs that are images, in groups, and the errors of the others by index."""
        pauses = iter(MEMORY_PAUSES)

        def run(part: list[Encoded]) -> tuple[list[Any], dict[int, DecodeError]]:
            pixels, errors = self._unless_lost(lambda: self.predictor.decode(part))
            return [pixels], errors

        def alone(error: Exception) -> tuple[list[Any], dict[int, DecodeError]] | None:
            return None if self._is_others_fault(error) else ([], {0: DecodeError(*_reason(error))})

        def retry(failure: Failure) -> None:
            if failure.size == 1:
                _wait_for_memory(pauses, failure.message)

        groups: list[Any] = []
        errors: dict[int, DecodeError] = {}
        first = 0
        for size, (pixels, failed) in by_halves(jpegs, run, alone, retry):
            groups += pixels
            errors |= {first + i: error for i, error in failed.items()}
            first += size
        return groups, errors

    def _predict(self, images: Images) -> tuple[Arrays, dict[int, PredictError]]:
        """Columns with one value per image, and the errors by image.

        A batch that does not fit the memory is halved until it does; the batches after it are cut to that size.
        """
        pauses = iter(MEMORY_PAUSES)
        one_was_too_large = False

        def run(part: Images) -> tuple[Arrays, dict[int, PredictError]]:
            columns = self._unless_lost(lambda: self._columns(part))
            return columns, dict.fromkeys(_find_not_finite(columns), NOT_FINITE)

        def alone(error: Exception) -> tuple[Arrays, dict[int, PredictError]] | None:
            nonlocal one_was_too_large
            one_was_too_large |= is_out_of_memory(error)
            if self._is_others_fault(error):
                return None
            columns = {each.name: pa.nulls(1, each.type) for each in self.columns}
            return columns, {0: PredictError(*_reason(error))}

        def retry(failure: Failure) -> None:
            if failure.size == 1:
                _wait_for_memory(pauses, failure.message)
            elif failure.out_of_memory:
                half = -(-failure.size // 2)
                self.max_images = min(half, self.max_images or half)
                self.predictor.limit_batch(self.max_images)

        pieces: list[Arrays] = []
        errors: dict[int, PredictError] = {}
        first = 0
        while first < len(images):
            piece = images[first : first + (self.max_images or len(images))]
            for size, (columns, failed) in by_halves(piece, run, alone, retry):
                pieces.append(columns)
                errors |= {first + i: error for i, error in failed.items()}
                first += size
        if one_was_too_large:  # that says nothing of how many others fit
            self.max_images = None
            self.predictor.limit_batch(max(len(images), self.allotment.batch_size))
        return {
            field.name: pa.concat_arrays([pa.nulls(0, field.type), *(piece[field.name] for piece in pieces)])
            for field in self.columns
        }, errors

    def _is_others_fault(self, error: Exception) -> bool:
        """Whether one image does not fit the memory though others of its size did: another process has taken it."""
        return self.predictor.images_are_alike and is_out_of_memory(error)

    def _unless_lost(self, work: Callable[[], R]) -> R:
        """Call the predictor. A dead GPU fails for every image: raise NightshiftError, so that no image is blamed."""
        try:
            return work()
        except Exception as error:
            if not self.predictor.lost():
                raise
            raise NightshiftError(
                f"the GPU of {socket.gethostname()} no longer answers: {message_line(error)}; "
                "what was committed is kept, run the same command again"
            ) from error

    def _columns(self, images: Images) -> dict[str, pa.Array]:
        given = self.predictor.predict(images.joined(self.predictor.join))
        columns = {}
        for each in self.columns:
            if each.name not in given or len(given[each.name]) != len(images):
                sizes = {name: len(values) for name, values in given.items()}
                raise ValueError(f"predict() must return {len(images)} values of {each.name!r}; it returned {sizes}")
            columns[each.name] = _to_arrow(given[each.name], each.type)
        return columns

    def _merge(
        self,
        table: pa.Table,
        columns: Arrays,
        errors: Mapping[int, ImageError],
        places: Places,
        seconds: float,
    ) -> pa.Table:
        is_image = np.zeros(len(table), bool)
        is_image[places] = True
        merged = {name: table[name] for name in table.column_names if name not in schema.PIXEL_FIELDS.names}
        merged |= {name: _spread(array, places, len(table)) for name, array in columns.items()}
        merged["network"] = pa.repeat(self.predictor.describe(), len(table))
        merged["predict_seconds"] = pa.array(np.where(is_image, seconds, 0.0).astype(np.float32))
        for name in ("stage", "error_type", "message") if errors else ():
            values = merged[name].to_pylist()
            for place, error in errors.items():
                values[place] = getattr(error, name)
            merged[name] = pa.array(values, pa.string())
        return pa.table({name: merged[name] for name in self.schema.names}, schema=self.schema)


def _spread(array: pa.Array, places: Places, rows: int) -> pa.ChunkedArray:
    """The values at their places among `rows` rows, null elsewhere. Without a copy if they are the first rows."""
    if np.array_equal(places, np.arange(len(places))):
        return pa.chunked_array([array, pa.nulls(rows - len(places), array.type)])
    take = np.full(rows, -1, np.int64)
    take[places] = np.arange(len(places))
    return pa.chunked_array([array.take(pa.array(take, mask=take < 0))])


def _wait_for_memory(pauses: Iterator[float], message: str) -> None:
    """Wait for another process to free memory, so that no image is blamed for it.

    Raises NightshiftError when the retries are used up.
    """
    pause = next(pauses, None)
    if pause is None:
        raise NightshiftError(
            f"the memory of {socket.gethostname()} does not hold one image: {message}; end the processes that have "
            "taken it, then run the same command again"
        )
    time.sleep(pause)


def _with_usage(table: pa.Table, core_seconds: float, gpu_seconds: float) -> pa.Table:
    """Add what this process used for a table to what the stages before it used."""
    for name, seconds in {"core_seconds": core_seconds, "gpu_seconds": gpu_seconds}.items():
        used = pc.add(table[name], pa.scalar(seconds / max(len(table), 1), pa.float32()))
        table = table.set_column(table.schema.get_field_index(name), name, used)
    return table


def _reason(error: Exception) -> tuple[str, str]:
    """error_type and message of an image that cannot be computed."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY, f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    line = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return "failed", f"{type(error).__name__}: {error}{line}"


def _to_arrow(values: Any, type_: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values.cast(type_)
    if isinstance(values, np.ndarray) and values.ndim == 2 and pa.types.is_fixed_size_list(type_):
        flat = pa.array(np.ascontiguousarray(values).reshape(-1)).cast(type_.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, type=type_)
    return pa.array(list(values) if getattr(values, "ndim", 1) > 1 else values, type_)


def _find_not_finite(columns: Arrays) -> list[int]:
    """Rows with a NaN or an infinity in any column of floats, or with one of these or a null in a vector."""
    bad: set[int] = set()
    for array in columns.values():
        if schema.is_vector(array.type):
            bad.update(_find_bad_vectors(array))
        elif pa.types.is_floating(array.type) and not array.null_count:
            bad.update(np.flatnonzero(~np.isfinite(array.to_numpy(zero_copy_only=False))).tolist())
    return sorted(bad)


def _find_bad_vectors(vectors: pa.FixedSizeListArray) -> list[int]:
    valid = np.flatnonzero(vectors.is_valid().to_numpy(zero_copy_only=False))
    flat = vectors.flatten()  # without the vectors that are null
    good = np.ones(len(flat), bool)
    if flat.null_count:
        good = flat.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_floating(flat.type):
        good = good & np.isfinite(flat.to_numpy(zero_copy_only=False))
    is_good = good.reshape(len(valid), vectors.type.list_size).all(axis=1)
    return [int(row) for row in np.setdiff1d(np.arange(len(vectors)), valid[is_good])]
