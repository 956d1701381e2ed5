"""decode → predict: a predictor over Arrow tables. A row that cannot be predicted costs itself, never its batch."""

import math
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema, usage
from pipeline.decode import Encoded
from pipeline.errors import (
    DecodeError,
    ImageError,
    NightshiftError,
    PredictError,
    is_out_of_memory,
    message_line,
)
from pipeline.predictors import Predictor

OUT_OF_MEMORY = "out_of_memory"

MEMORY_PAUSES = (1.0, 5.0, 20.0)
"""Seconds for somebody else to give back the memory that he has taken."""


class Predict:
    """One model actor: loads the predictor once, then turns tables of pixels into tables of results."""

    def __init__(self, predictor: Predictor, keep: Mapping[str, pa.DataType]) -> None:
        self.predictor = predictor
        self.schema = schema.predicted(predictor.columns, keep)
        self.most: int | None = None  # images that fit the memory at once, where a batch did not
        self.busy = usage.BusyClock()
        self.refusal: NightshiftError | None = None
        try:
            predictor.load()
        except NightshiftError as error:  # raised here Ray would take it for a lost node, and try again elsewhere
            self.refusal = error

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replace the pixels of each row by the predictor's columns (null where the row is an error)."""
        if self.refusal:
            raise self.refusal
        with self.busy.at_work() as busy:
            started = time.perf_counter()
            places, pixels, errors = self._images(table)
            columns, found = self._predict(pixels)
            seconds = (time.perf_counter() - started) / max(len(places), 1)
            errors |= {int(places[i]): error for i, error in found.items()}
            merged = self._merge(table, columns, errors, places, seconds)
        return _with_usage(merged, usage.take_core_seconds(), busy.seconds * (self.predictor.gpu_share or 0.0))

    def _images(self, table: pa.Table) -> "tuple[np.ndarray, _Images, dict[int, ImageError]]":
        """The places of the images, their pixels, and the errors of JPEGs by their places.

        JPEGs that were left encoded become pixels here, on the network's device.
        """
        chunked = table[schema.PIXELS]
        column = chunked.chunk(0) if chunked.num_chunks == 1 else chunked.combine_chunks()  # which copies
        is_image = column.is_valid().to_numpy(zero_copy_only=False)
        is_jpeg = pc.is_valid(table[schema.ORIENTATION]).to_numpy(zero_copy_only=False)
        by_side = _by_side(column, np.flatnonzero(is_image & ~is_jpeg))
        groups: list[Any] = [_pixels(column, places) for places in by_side]
        errors: dict[int, ImageError] = {}
        if is_jpeg.any():
            jpegs = np.flatnonzero(is_jpeg)
            decoded, found = self._decoded(_jpegs(table, column, jpegs))
            errors = {int(jpegs[i]): error for i, error in found.items()}
            by_side.append(np.delete(jpegs, list(found)))
            groups += decoded
        places = np.concatenate([np.empty(0, np.int64), *by_side])
        return places, _Images([pixels for pixels in groups if len(pixels)]), errors

    def _decoded(self, jpegs: list[Encoded]) -> tuple[list[Any], dict[int, DecodeError]]:
        """Pixels of those that are images, in groups, and the errors of the others by place; halved as a batch is."""
        return self._decoded_halves(jpegs, iter(MEMORY_PAUSES))

    def _decoded_halves(
        self, jpegs: list[Encoded], pauses: Iterator[float]
    ) -> tuple[list[Any], dict[int, DecodeError]]:
        try:
            pixels, errors = self.predictor.decode(jpegs)
            return [pixels], errors
        except NightshiftError:  # the device decodes nothing at all
            raise
        except Exception as error:  # a predictor may be the user's own and raise anything
            self._stop_if_lost(error)
            if len(jpegs) == 1 and not self._is_others_fault(error):
                return [], {0: DecodeError(*_reason(error))}
            said = message_line(error)
        if len(jpegs) == 1:
            _wait_for_memory(pauses, said)
            return self._decoded_halves(jpegs, pauses)
        half = -(-len(jpegs) // 2)
        left, left_errors = self._decoded_halves(jpegs[:half], pauses)
        right, right_errors = self._decoded_halves(jpegs[half:], pauses)
        return left + right, left_errors | {half + i: error for i, error in right_errors.items()}

    def _predict(self, pixels: "_Images") -> tuple[dict[str, pa.Array], dict[int, PredictError]]:
        """Columns of as many rows as there are images, and the errors by image."""
        pieces: list[dict[str, pa.Array]] = []
        errors: dict[int, PredictError] = {}
        first, call = 0, _Call()
        while first < len(pixels):
            piece = pixels[first : first + (self.most or len(pixels))]
            columns, found = self._piece(piece, call)
            pieces.append(columns)
            errors |= {first + i: error for i, error in found.items()}
            first += len(piece)
        if call.one_was_too_large:  # that says nothing of how many others fit
            self.most = None
            self.predictor.limit_batch(max(len(pixels), self.predictor.batch_size or 0))
        return {
            field.name: pa.concat_arrays([pa.nulls(0, field.type), *(piece[field.name] for piece in pieces)])
            for field in self.predictor.columns
        }, errors

    def _piece(self, pixels: "_Images", call: "_Call") -> tuple[dict[str, pa.Array], dict[int, PredictError]]:
        """A batch that fails is halved until the images that it fails for stand alone.

        One that did not fit the memory is halved until it does; the batches after it are cut to that size at once.
        """
        try:
            columns = self._columns(self.predictor.predict(pixels.joined(self.predictor)), len(pixels))
            return columns, {i: _not_finite() for i in _find_not_finite(columns)}
        except Exception as error:  # a predictor may be the user's own and raise anything
            self._stop_if_lost(error)
            no_memory, said = is_out_of_memory(error), message_line(error)
            if len(pixels) == 1:
                call.one_was_too_large |= no_memory
                if not self._is_others_fault(error):
                    columns = {each.name: pa.nulls(1, each.type) for each in self.predictor.columns}
                    return columns, {0: PredictError(*_reason(error))}
        if len(pixels) == 1:
            _wait_for_memory(call.pauses, said)
            return self._piece(pixels, call)
        half = -(-len(pixels) // 2)
        if no_memory:
            self.most = min(half, self.most or half)
            self.predictor.limit_batch(self.most)  # outside of the handler: the error holds on to the batch's memory
        left, left_errors = self._piece(pixels[:half], call)
        right, right_errors = self._piece(pixels[half:], call)
        errors = left_errors | {half + i: error for i, error in right_errors.items()}
        return {name: pa.concat_arrays([left[name], right[name]]) for name in left}, errors

    def _is_others_fault(self, error: Exception) -> bool:
        """Whether one image does not fit the memory though any other takes as much: somebody else has taken it."""
        return self.predictor.images_are_alike and is_out_of_memory(error)

    def _stop_if_lost(self, error: Exception) -> None:
        """A dead GPU fails for every image, which says nothing of the images: raise NightshiftError, so that none is
        written off."""
        if self.predictor.lost():
            raise NightshiftError(
                f"the GPU of {socket.gethostname()} answers no more: {message_line(error)}; "
                "what was committed stays, run the same command again"
            ) from error

    def _columns(self, found: Mapping[str, Any], rows: int) -> dict[str, pa.Array]:
        columns = {}
        for each in self.predictor.columns:
            if each.name not in found or len(found[each.name]) != rows:
                got = {name: len(values) for name, values in found.items()}
                raise ValueError(f"predict() must return {rows} values of {each.name!r}; it returned {got}")
            columns[each.name] = _to_arrow(found[each.name], each.type)
        return columns

    def _merge(
        self,
        table: pa.Table,
        columns: Mapping[str, pa.Array],
        errors: Mapping[int, ImageError],
        places: np.ndarray,
        seconds: float,
    ) -> pa.Table:
        take = np.full(len(table), -1, np.int64)
        take[places] = np.arange(len(places))
        indices = pa.array(take, mask=take < 0)
        merged = {name: table[name] for name in table.column_names if name != schema.PIXELS}
        merged |= {name: array.take(indices) for name, array in columns.items()}
        merged["network"] = pa.repeat(self.predictor.describe(), len(table))
        merged["predict_seconds"] = pa.array(np.where(take >= 0, seconds, 0.0).astype(np.float32))
        for name in ("stage", "error_type", "message") if errors else ():
            values = merged[name].to_pylist()
            for place, error in errors.items():
                values[place] = getattr(error, name)
            merged[name] = pa.array(values, pa.string())
        return pa.table({name: merged[name] for name in self.schema.names}, schema=self.schema)


@dataclass(slots=True)
class _Call:
    """One call of the stage, of which a GPU has several at once.

    one_was_too_large: for the memory, alone. pauses: seconds to wait, one after the other, for others to give it back.
    """

    one_was_too_large: bool = False
    pauses: Iterator[float] = field(default_factory=lambda: iter(MEMORY_PAUSES))


def _wait_for_memory(pauses: Iterator[float], said: str) -> None:
    """No image is written off for memory that somebody else has taken. Raises NightshiftError where he keeps it."""
    pause = next(pauses, None)
    if pause is None:
        raise NightshiftError(
            f"the memory of {socket.gethostname()} does not hold one image: {said}; end what else has taken it, then "
            "run the same command again"
        )
    time.sleep(pause)


@dataclass(frozen=True, slots=True)
class _Images:
    """Pixels of images in groups of one side each, [N, side, side, 3]: most often all are of one."""

    groups: list[Any]

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def __getitem__(self, part: slice) -> "_Images":
        first, last, _ = part.indices(len(self))
        pieces, start = [], 0
        for group in self.groups:
            pieces.append(group[max(first - start, 0) : max(last - start, 0)])
            start += len(group)
        return _Images([piece for piece in pieces if len(piece)])

    def joined(self, predictor: Predictor) -> Any:
        """One batch, as the predictor takes it."""
        return self.groups[0] if len(self.groups) == 1 else predictor.join(self.groups)


def _with_usage(table: pa.Table, core_seconds: float, gpu_seconds: float) -> pa.Table:
    """What this process used for a table, added to what others did."""
    for name, seconds in {"core_seconds": core_seconds, "gpu_seconds": gpu_seconds}.items():
        used = pc.add(table[name], pa.scalar(seconds / max(len(table), 1), pa.float32()))
        table = table.set_column(table.schema.get_field_index(name), name, used)
    return table


def _reason(error: Exception) -> tuple[str, str]:
    """error_type and message of an image that cannot be computed."""
    return OUT_OF_MEMORY if is_out_of_memory(error) else "failed", f"{type(error).__name__}: {error}"


def _by_side(column: pa.BinaryArray, places: np.ndarray) -> list[np.ndarray]:
    """The places of images, those of one size together: most often all of them."""
    sizes = pc.binary_length(column).to_numpy(zero_copy_only=False)[places]
    return [places[sizes == size] for size in np.unique(sizes)]


def _pixels(column: pa.BinaryArray, places: np.ndarray) -> np.ndarray:
    """uint8 [N, side, side, 3] of images of one size, over the column's own memory where they stand side by side."""
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset :][: len(column) + 1]
    data = np.frombuffer(column.buffers()[2], np.uint8)
    size = int(offsets[places[0] + 1] - offsets[places[0]])
    side = math.isqrt(size // 3)
    first, last = offsets[places[0]], offsets[places[-1] + 1]
    if last - first == len(places) * size:  # what lies between are rows without pixels
        return data[first:last].reshape(-1, side, side, 3)
    return np.stack([data[start : start + size] for start in offsets[places]]).reshape(-1, side, side, 3)


def _jpegs(table: pa.Table, column: pa.BinaryArray, places: np.ndarray) -> list[Encoded]:
    """JPEGs that were left encoded, over the column's own memory."""
    names = ("width", "height", schema.ORIENTATION)
    sizes = [table[name].combine_chunks().take(pa.array(places)).to_pylist() for name in names]
    files = (memoryview(column[place].as_buffer()) for place in places.tolist())
    return [Encoded(*each) for each in zip(files, *sizes, strict=True)]


def _to_arrow(values: Any, type_: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values.cast(type_)
    if isinstance(values, np.ndarray) and values.ndim == 2 and pa.types.is_fixed_size_list(type_):
        flat = pa.array(np.ascontiguousarray(values).reshape(-1)).cast(type_.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, type=type_)
    return pa.array(list(values) if getattr(values, "ndim", 1) > 1 else values, type_)


def _find_not_finite(columns: Mapping[str, pa.Array]) -> list[int]:
    """Rows with a NaN or an infinity in any column of floats or vectors of floats."""
    bad: set[int] = set()
    for array in columns.values():
        width = array.type.list_size if pa.types.is_fixed_size_list(array.type) else 1
        flat = array.flatten() if width > 1 else array
        if pa.types.is_floating(flat.type) and not flat.null_count:
            finite = np.isfinite(flat.to_numpy(zero_copy_only=False)).reshape(len(array), width)
            bad.update(np.flatnonzero(~finite.all(axis=1)).tolist())
    return sorted(bad)


def _not_finite() -> PredictError:
    return PredictError("not_finite", "the network's output holds NaN or infinity")
