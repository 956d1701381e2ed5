"""Samples: the vectors, classes and groups of the labelled images, in memory or in a temporary file."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputRefused
from pipeline.explore.table import Output
from pipeline.explore.vectors import COLUMN, Vectors, as_vectors, scale_in_place, vector_type
from pipeline.training.labels import Labels

MEMORY_BYTES = 1 << 30
"""Vectors of more bytes are kept in a temporary file."""
CHUNK_BYTES = 64 << 20

Targets = NDArray[np.float32]
"""[N, C] of 0 and 1."""


@dataclass(frozen=True)
class VectorFile:
    """[rows, dim] in a temporary file, for more vectors than memory should hold. They are read as float32.

    dtype: float16 or float32, that of the output: the file takes no more space than the vectors.
    """

    file: Any
    rows: int
    dim: int
    dtype: Any = np.float32

    def __len__(self) -> int:
        return self.rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.dim

    def read(self, start: int, stop: int) -> Vectors:
        """The vectors from `start` up to `stop`, as a copy: pages of a mapped file would count as memory."""
        data = np.empty((min(stop, self.rows) - start, self.dim), self.dtype)
        self.file.seek(start * self.dim * data.itemsize)
        self.file.readinto(data.reshape(-1).view(np.uint8).data)
        return data.astype(np.float32, copy=False)

    def take(self, rows: NDArray[np.int64]) -> Vectors:
        """The vectors of some rows, in memory."""
        vectors = np.empty((len(rows), self.dim), np.float32)
        for place, row in enumerate(rows.tolist()):
            vectors[place] = self.read(row, row + 1)[0]
        return vectors


@dataclass(frozen=True)
class Samples:
    """The labelled images of an output.

    vectors: [N, dim] float32. targets: [N, C] of 0 and 1. names: of the C classes. image_ids: of each image.
    groups: number of each image's group, or None; images of one group are never on both sides of a split.
    normalize: scale vectors to length 1.
    """

    vectors: Vectors | VectorFile
    targets: Targets
    names: tuple[str, ...]
    image_ids: tuple[str, ...]
    groups: NDArray[np.int64] | None = None
    multi_label: bool = False
    normalize: bool = True

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of images per class."""
        return np.asarray(self.targets.sum(axis=0), np.int64)

    def classes(self, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """The class of each image; the first one with `multi_label`."""
        return np.asarray((self.targets if rows is None else self.targets[rows]).argmax(axis=1), np.int64)

    def take(self, rows: NDArray[np.int64]) -> Vectors:
        """float32 [len(rows), dim], in memory, scaled to length 1 if `normalize`."""
        vectors = self.vectors.take(rows) if isinstance(self.vectors, VectorFile) else self.vectors[rows]
        return scale_in_place(vectors) if self.normalize else vectors  # a copy in either case

    def chunks(self) -> Iterator[tuple[Vectors, Targets]]:
        """All vectors, scaled if `normalize`, and their targets, at most CHUNK_BYTES at a time."""
        step = max(1, CHUNK_BYTES // (4 * self.vectors.shape[1]))
        for start in range(0, len(self), step):
            is_file = isinstance(self.vectors, VectorFile)
            part = self.vectors.read(start, start + step) if is_file else self.vectors[start : start + step].copy()  # type: ignore[union-attr, index]
            yield scale_in_place(part) if self.normalize else part, self.targets[start : start + step]


def read_samples(
    output: Output,
    labels: Labels,
    *,
    group_by: str | None = None,
    multi_label: bool = False,
    normalize: bool = True,
    memory_bytes: int = MEMORY_BYTES,
) -> Samples:
    """Read the vectors of the labelled images. They may be in memory up to `memory_bytes`, and in a file beyond.

    group_by: a column of the output, whose values are the groups. Raises OutputRefused for a missing column, and
    InputRefused if the column of vectors is none, or if the output changed meanwhile.
    """
    output.require([group_by] if group_by else [])
    vectors, groups = _read(output, labels, group_by, vector_type(output), memory_bytes)
    index = {name: number for number, name in enumerate(labels.names)}
    targets = np.zeros((len(labels.rows), len(index)), np.float32)
    for row, classes in enumerate(labels.classes):
        targets[row, [index[name] for name in classes]] = 1
    numbers = None if group_by is None else np.unique(np.array(groups, object).astype(str), return_inverse=True)[1]
    return Samples(vectors, targets, labels.names, labels.image_ids, numbers, multi_label, normalize)


def _read(
    output: Output, labels: Labels, group_by: str | None, type_: Any, memory_bytes: int
) -> tuple[Vectors | VectorFile, list[Any]]:
    dim, size = type_.list_size, len(labels.rows) * type_.list_size * 4
    dtype = np.float16 if pa.types.is_float16(type_.value_type) else np.float32
    file = None if size <= memory_bytes else tempfile.TemporaryFile(prefix="nightshift-")  # noqa: SIM115
    parts: list[Vectors] = []
    groups: list[Any] = []
    for batch in _labelled(output, labels, [group_by] if group_by else []):
        vectors = as_vectors(batch.column(1), dim)
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise InputRefused(f"{output.uri}: the vector of {batch.column(0)[row]} has numbers that are not finite")
        if file:
            file.write(vectors.astype(dtype, copy=False).data)
        else:
            parts.append(vectors)
        groups += batch.column(2).to_pylist() if group_by else []
    if file:
        file.flush()
        return VectorFile(file, len(labels.rows), dim, dtype), groups
    return np.concatenate([np.empty((0, dim), np.float32), *parts]), groups


def _labelled(output: Output, labels: Labels, more: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The labelled rows of an output: image_id, vector, and further columns."""
    wanted = np.array(labels.rows, np.int64)
    first = done = 0
    for batch in output.batches(["image_id", COLUMN, *more]):
        stop = int(np.searchsorted(wanted, first + len(batch)))
        chosen = batch.take(pa.array(wanted[done:stop] - first))
        if chosen.column(0).to_pylist() != list(labels.image_ids[done:stop]):
            raise InputRefused(f"{output.uri} changed while it was read: run the same command again")
        yield chosen
        first, done = first + len(batch), stop
