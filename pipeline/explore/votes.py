"""Results of windows → pixels of a map: each window votes, with its score, in the pixels whose centre it covers."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import OutputRefused
from pipeline.explore.scenes import WINDOW_COLUMNS, Grid
from pipeline.explore.table import Output

BLOCK = 512
MAX_VOTES = 4 << 20
"""Votes that are counted at a time, which bounds memory."""

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of a map: its first row and column, and its size."""

    row: int
    column: int
    height: int
    width: int


def blocks(height: int, width: int, size: int = BLOCK) -> Iterator[Block]:
    """Cut a raster into blocks, row by row."""
    for row in range(0, height, size):
        for column in range(0, width, size):
            yield Block(row, column, min(size, height - row), min(size, width - column))


class WindowValues:
    """One vector of float32 per window of a scene, in a temporary file. A window without a vector is missing.

    A context manager. Memory does not grow with the scene, because the operating system writes the pages back.
    """

    def __init__(self, grid: Grid, bands: int) -> None:
        self.grid = grid
        self.folder = tempfile.TemporaryDirectory(prefix="nightshift-map-")
        shape = grid.down.windows, grid.across.windows
        self.values = self._array("values", np.float32, (*shape, bands))
        self.is_valid = self._array("valid", np.bool_, shape)

    def _array(self, name: str, dtype: Any, shape: tuple[int, ...]) -> Any:
        if not all(shape):
            return np.zeros(shape, dtype)
        return np.memmap(Path(self.folder.name, name), dtype, "w+", shape=shape)

    def __enter__(self) -> "WindowValues":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        del self.values, self.is_valid
        self.folder.cleanup()

    def put(self, batch: Any, values: Any) -> None:
        """Store the vectors [rows, bands] of a batch that has WINDOW_COLUMNS."""
        rows, columns = self.grid.places(batch)
        self.values[rows, columns] = values
        self.is_valid[rows, columns] = True

    def covering(self, block: Block) -> tuple[Floats, Floats]:
        """The vectors over each pixel, [votes, height, width, bands], and their weights (without bands).

        A weight is the share of the pixel that the window covers, 0 if there is no such window.
        """
        down, across = self.grid.down, self.grid.across
        rows = slice(block.row, block.row + block.height)
        columns = slice(block.column, block.column + block.width)
        values = [np.zeros((block.height, block.width, self.values.shape[-1]), np.float32)]
        weights = [np.zeros((block.height, block.width), np.float32)]
        for below in range(down.overlap):
            row, high = down.covering(rows, below)
            for beside in range(across.overlap):
                column, wide = across.covering(columns, beside)
                place = np.ix_(row, column)
                values.append(self.values[place])
                weights.append((self.is_valid[place] * high[:, None] * wide[None, :]).astype(np.float32))
        first = 1 if len(values) > 1 else 0  # the zeros serve scenes without windows
        return np.stack(values[first:]), np.stack(weights[first:])

    def strips(self, block: Block) -> Iterator[Block]:
        """Cut a block into strips that have at most MAX_VOTES votes."""
        votes = max(1, self.grid.down.overlap * self.grid.across.overlap * block.width)
        height = max(1, MAX_VOTES // votes)
        for row in range(0, block.height, height):
            yield Block(block.row + row, block.column, min(height, block.height - row), block.width)


@dataclass
class Classes:
    """The classes of a scene: names by label_id, and numbers of windows."""

    names: dict[int, str] = field(default_factory=dict)
    windows: Counter[int] = field(default_factory=Counter)

    @property
    def max_id(self) -> int:
        return max(self.windows, default=0)

    def by_frequency(self) -> list[int]:
        """The label_ids, those of most windows first."""
        return sorted(self.windows, key=lambda label: (-self.windows[label], label))

    def add(self, labels: Labels, names: Any) -> None:
        """Count the classes of a batch. names: Arrow strings or None."""
        found, first, counts = np.unique(labels, return_index=True, return_counts=True)
        for label, place, count in zip(found.tolist(), first.tolist(), counts.tolist(), strict=True):
            self.windows[label] += count
            if label not in self.names:
                name = names[place].as_py() if names is not None else None
                self.names[label] = name or f"class {label}"


MAX_LABEL = 1 << 24
"""label_ids are stored as float32, which is exact up to here."""


def read_classes(output: Output, values: WindowValues) -> Classes:
    """Read label_id and score of the windows of a scene into `values`, which has these two bands.

    Without a column `score`, each window has one vote. Raises OutputRefused for negative scores that would have to be
    added up, and for a label_id that is negative or too large.
    """
    has_score, has_name = "score" in output.columns, "label" in output.columns
    columns = [*WINDOW_COLUMNS, "label_id", *["score"] * has_score, *["label"] * has_name]
    classes = Classes()
    uri = values.grid.scene.uri
    for batch in output.batches(columns, equal={"scene": uri}):
        rows = batch.filter(batch["label_id"].is_valid())
        labels = rows["label_id"].to_numpy(zero_copy_only=False).astype(np.int64)
        scores = rows["score"].to_numpy(zero_copy_only=False) if has_score else np.ones(len(labels), np.float32)
        if not len(labels):
            continue
        if labels.min() < 0 or labels.max() >= MAX_LABEL:
            raise OutputRefused(f"{uri} has a label_id outside of 0 to {MAX_LABEL - 1}, which a map cannot show")
        if not (scores >= 0).all():
            raise OutputRefused(f"{uri} has a score that is negative or missing; votes of windows must be 0 or more")
        classes.add(labels, rows["label"] if has_name else None)
        values.put(rows, np.column_stack([labels, scores]))
    return classes


def elect(values: WindowValues, block: Block) -> tuple[Labels, Floats]:
    """The class of each pixel, -1 without one, and its score, NaN without one.

    The class has the largest sum of scores. Its score is this sum, divided by the number of windows. A window counts by
    the share of the pixel that it covers.
    """
    labels, scores = [], []
    for strip in values.strips(block):
        vectors, weights = values.covering(strip)
        winner, score = _winners(vectors[..., 0].astype(np.int64), vectors[..., 1], weights)
        labels.append(winner)
        scores.append(score)
    return np.concatenate(labels), np.concatenate(scores)


def _winners(labels: Labels, scores: Floats, weights: Floats) -> tuple[Labels, Floats]:
    """Add up the scores of each class over axis 0. The smaller label_id wins a draw."""
    labels = np.where(weights > 0, labels, -1)
    order = np.argsort(labels, axis=0, kind="stable")
    labels = np.take_along_axis(labels, order, 0)
    scores = np.take_along_axis(scores * weights, order, 0).astype(np.float64)
    running = np.cumsum(scores, axis=0)
    is_first = np.ones(labels.shape, bool)
    is_first[1:] = labels[1:] != labels[:-1]
    before = np.maximum.accumulate(np.where(is_first, running - scores, 0), axis=0)
    votes = np.where(labels >= 0, running - before, -1)  # the last window of a class has all its votes
    best = votes.argmax(axis=0)[None]
    winner = np.take_along_axis(labels, best, 0)[0]
    won = np.take_along_axis(votes, best, 0)[0]
    total = weights.sum(axis=0, dtype=np.float64)
    score = np.divide(won, total, out=np.full(won.shape, np.nan), where=total > 0)
    return winner, score.astype(np.float32)


def mean(values: WindowValues, block: Block) -> Floats:
    """The mean vector over each pixel, weighted as in `elect`, [height, width, bands]; NaN without a window."""
    means = []
    for strip in values.strips(block):
        vectors, weights = values.covering(strip)
        total = (vectors * weights[..., None]).sum(axis=0)
        weight = weights.sum(axis=0)[..., None]
        means.append(np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0))
    return np.concatenate(means)
