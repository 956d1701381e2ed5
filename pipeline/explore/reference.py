"""A random sample of an output's vectors, and the nearest neighbours of any image among it.

Its size has a limit, so the time per image and the memory do not grow with the output. Up to that limit it is the whole
output.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.explore.table import OnStep, Output, no_step
from pipeline.explore.vectors import COLUMN, Vectors, dim_of, scaled, view_vectors

MAX_ROWS = 50_000
MAX_BYTES = 128 << 20
MAX_FLAT = 10_000
"""Rows up to which all vectors are compared. Above, those of the nearest k-means cells are, which finds nearly all."""
TUNING_QUERIES, TUNING_COUNT, TARGET_RECALL = 200, 10, 0.98
SEED = 0

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Reference:
    """positions: of the sampled rows, in ascending order. vectors: float32 [n, dim], of length 1. table: other columns.

    rows: of the output that the sample was drawn from.
    """

    positions: Positions
    vectors: Vectors
    table: pa.Table
    rows: int

    @staticmethod
    def of(
        output: Output, columns: Sequence[str] = (), count: int = MAX_ROWS, on_step: OnStep = no_step
    ) -> "Reference":
        """Draw `count` rows at random, fewer if their vectors are too large. columns: further ones to keep."""
        dim = dim_of(output)
        count = max(1, min(count, MAX_BYTES // (4 * dim)))
        drawn = np.arange(output.rows)
        if output.rows > count:
            drawn = np.sort(np.random.default_rng(SEED).choice(output.rows, count, replace=False, shuffle=False))
        vectors, tables, filled = np.empty((len(drawn), dim), np.float32), [], 0
        for block in output.blocks([COLUMN, *columns]):
            start, stop = np.searchsorted(drawn, [block.positions[0], block.positions[-1] + 1])
            rows = pa.array(drawn[start:stop] - block.positions[0])
            chosen = block.table.take(rows)
            vectors[filled : filled + len(chosen)] = scaled(view_vectors(chosen[COLUMN], dim))
            filled += len(chosen)
            tables.append(chosen.select(list(columns)))
            on_step("sampling", int(block.positions[-1]) + 1, output.rows)
        return Reference(drawn, vectors, pa.concat_tables(tables), output.rows)

    def __len__(self) -> int:
        return len(self.positions)

    def describe(self) -> str:
        """ "all 5,000 images", or how many were drawn of how many."""
        if len(self) == self.rows:
            return f"all {self.rows:,} images"
        return f"{len(self):,} images drawn at random of {self.rows:,}"

    def some(self, count: int) -> NDArray[np.int64]:
        """`count` different row numbers of the sample, at random, in ascending order."""
        if count >= len(self):
            return np.arange(len(self))
        return np.sort(np.random.default_rng(SEED).choice(len(self), count, replace=False, shuffle=False))

    def neighbours(
        self, vectors: Vectors, positions: Positions | None, count: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The nearest sampled images of each vector, without the image itself: cosines and row numbers, [N, count].

        vectors: [N, dim] of length 1. positions: of their rows in the output, None for those of another output.
        count: fewer than there are sampled rows.
        """
        if positions is None:
            return self._search(vectors, count)
        cosines, found = self._search(vectors, count + 1)
        place = np.searchsorted(self.positions, positions).clip(max=len(self) - 1)
        own = np.where(self.positions[place] == positions, place, -2)
        is_left_out = found == own[:, None]
        is_left_out[~is_left_out.any(axis=1), -1] = True  # of rows that are not sampled
        return cosines[~is_left_out].reshape(-1, count), found[~is_left_out].reshape(-1, count)

    def _search(self, vectors: Vectors, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        cosines, found = self._index.search(np.ascontiguousarray(vectors), count)
        if (lacks := np.flatnonzero(found[:, -1] < 0)).size:  # the nearest cells have too few rows
            cosines[lacks], found[lacks] = self._flat.search(np.ascontiguousarray(vectors[lacks]), count)
        return np.clip(cosines, -1, 1), found

    @cached_property
    def _flat(self) -> Any:
        import faiss

        index: Any = faiss.IndexFlatIP(self.vectors.shape[1])
        index.add(self.vectors)
        return index

    @cached_property
    def _index(self) -> Any:
        """FAISS's index: flat for few rows, otherwise cells, of which enough are probed for TARGET_RECALL."""
        if len(self) <= MAX_FLAT:
            return self._flat
        import faiss

        index: Any = faiss.index_factory(
            self.vectors.shape[1], f"IVF{round(math.sqrt(len(self)))},Flat", faiss.METRIC_INNER_PRODUCT
        )
        index.train(self.vectors)
        index.add(self.vectors)
        queries = self.vectors[self.some(TUNING_QUERIES)]
        truth = self._flat.search(queries, TUNING_COUNT)[1]
        del self.__dict__["_flat"]  # a further copy of the vectors
        index.nprobe = 1
        while _recall(truth, index.search(queries, TUNING_COUNT)[1]) < TARGET_RECALL and index.nprobe < index.nlist:
            index.nprobe = min(2 * index.nprobe, index.nlist)
        return index


def _recall(truth: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    return float(np.mean([np.isin(row, others).mean() for row, others in zip(truth, found, strict=True)]))


def distances(cosines: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distances, 0 to 2, of vectors of length 1 with these cosines."""
    return np.asarray(np.sqrt(np.maximum(2 - 2 * cosines, 0)), np.float32)
