"""All pairs of similar vectors, within memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SettingRefused
from pipeline.explore.search import NEARLY
from pipeline.explore.table import OnStep, Output, Part, no_step
from pipeline.explore.vectors import COLUMN, Vectors, dim_of, scaled, view_vectors

BLOCK_ROWS, BLOCK_COLUMNS = 1024, 4096
"""Rows and columns of the products that are in memory at once: they stay in the cache of a CPU."""
EXACT_PAIRS = 8192
MAX_PAIRS = 50_000_000

RunAll = Callable[[Callable[[int], int], Iterable[int]], Iterator[int]]
"""Calls a function with each number, here or on a cluster, and yields its results in any order."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of similar rows, each once. first, second: their positions, first < second. similarity: their cosine."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    similarity: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.first)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows that are in a pair, in ascending order."""
        return np.unique(np.concatenate([self.first, self.second]))

    def at_least(self, similarity: float) -> "Pairs":
        """The pairs of at least this similarity."""
        return self._where(self.similarity >= similarity)

    def _where(self, is_chosen: NDArray[np.bool_]) -> "Pairs":
        return Pairs(self.first[is_chosen], self.second[is_chosen], self.similarity[is_chosen])

    @staticmethod
    def joined(parts: Iterable["Pairs"]) -> "Pairs":
        """All pairs, sorted, each once. Raises SettingRefused if they are more than MAX_PAIRS."""
        pairs, count = [Pairs.none()], 0
        for part in parts:
            pairs.append(part)
            if (count := count + len(part)) > MAX_PAIRS:
                raise SettingRefused(
                    f"more than {MAX_PAIRS:,} pairs are that similar, so they are no duplicates: give a larger "
                    "--threshold"
                )
        first, second, similarity = (np.concatenate([getattr(each, name) for each in pairs]) for name in FIELDS)
        order = np.lexsort((second, first))
        first, second = first[order], second[order]
        is_new = np.ones(len(first), bool)
        is_new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        return Pairs(first, second, similarity[order])._where(is_new)

    @staticmethod
    def none() -> "Pairs":
        nothing = np.empty(0, np.int64)
        return Pairs(nothing, nothing, np.empty(0, np.float32))


FIELDS = ("first", "second", "similarity")


def read_all(output: Output, parts: Sequence[Part] | None = None) -> tuple[Vectors, NDArray[np.int64]]:
    """All vectors, scaled to length 1, float32 [N, dim], and their positions. parts: some parts (default: all)."""
    dim, rows = dim_of(output), sum(part.rows for part in (output.parts if parts is None else parts))
    vectors, positions = np.empty((rows, dim), np.float32), np.empty(rows, np.int64)
    count = 0
    for block in output.blocks([COLUMN], parts=parts):
        stop = count + len(block.positions)
        vectors[count:stop] = scaled(view_vectors(block.table[COLUMN], dim))
        positions[count:stop] = block.positions
        count = stop
    return vectors[:count], positions[:count]


def pairs_of_new(
    output: Output, threshold: float, old: Set[str] = frozenset(), on_step: OnStep = no_step
) -> Iterator[Pairs]:
    """The pairs whose cosine is at least the threshold, but for those of two rows of old parts.

    old: paths of parts. The vectors of all other parts are in memory.
    """
    new = [part for part in output.parts if part.path not in old]
    if not new:
        return
    vectors, positions = read_all(output, new)
    others = output.rows - len(vectors)
    total = len(vectors) * (len(vectors) + 2 * others) // 2
    step = partial(on_step, "comparing vectors", total=total)
    yield from pairs_within(vectors, positions, threshold, lambda rows: step(rows * (2 * len(vectors) - rows) // 2))
    done, dim = len(vectors) ** 2 // 2, dim_of(output)
    for block in output.blocks([COLUMN], parts=[part for part in output.parts if part.path in old]) if others else ():
        rest = scaled(view_vectors(block.table[COLUMN], dim))
        yield from pairs_between(rest, block.positions, vectors, positions, threshold)
        done += len(rest) * len(vectors)
        step(done)


def pairs_within(
    vectors: Vectors,
    positions: NDArray[np.int64],
    threshold: float,
    on_rows: Callable[[int], object] = lambda rows: None,
) -> Iterator[Pairs]:
    """The pairs of vectors of length 1 whose cosine is at least the threshold.

    on_rows: called with the number of rows that have been compared with all later ones.
    """
    for start in range(0, len(vectors), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        for column in range(start, len(vectors), BLOCK_COLUMNS):
            columns = slice(column, column + BLOCK_COLUMNS)
            yield _similar(
                vectors[rows], vectors[columns], positions[rows], positions[columns], threshold, start, column
            )
        on_rows(min(start + BLOCK_ROWS, len(vectors)))


def pairs_between(
    vectors: Vectors,
    positions: NDArray[np.int64],
    others: Vectors,
    other_positions: NDArray[np.int64],
    threshold: float,
) -> Iterator[Pairs]:
    """The pairs of one vector of each of two groups that have no row in common."""
    for start in range(0, len(vectors), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        for column in range(0, len(others), BLOCK_COLUMNS):
            columns = slice(column, column + BLOCK_COLUMNS)
            yield _similar(vectors[rows], others[columns], positions[rows], other_positions[columns], threshold)


def _similar(
    a: Vectors,
    b: Vectors,
    of_a: NDArray[np.int64],
    of_b: NDArray[np.int64],
    threshold: float,
    start: int | None = None,
    column: int = 0,
) -> Pairs:
    """start, column: places of the blocks in the same vectors; of these only pairs with i < j count."""
    products = a @ b.T
    if products.max(initial=-1) < threshold - NEARLY:
        return Pairs.none()
    i, j = np.nonzero(products >= threshold - NEARLY)
    if start is not None:
        is_pair = i + start < j + column
        i, j = i[is_pair], j[is_pair]
    similarity = exact_pairs(a, b, i, j)
    is_similar = similarity >= threshold
    i, j, similarity = i[is_similar], j[is_similar], similarity[is_similar]
    return Pairs(np.minimum(of_a[i], of_b[j]), np.maximum(of_a[i], of_b[j]), similarity)


def exact_pairs(a: Vectors, b: Vectors, i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.float32]:
    """Cosines of pairs of vectors of length 1, in float64, which do not depend on the places of the vectors."""
    values = np.empty(len(i), np.float32)
    for start in range(0, len(i), EXACT_PAIRS):
        part = slice(start, start + EXACT_PAIRS)
        x, y = a[i[part]].astype(np.float64), b[j[part]].astype(np.float64)
        norms = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
        values[part] = np.clip((x * y).sum(axis=1) / np.maximum(norms, 1e-12), -1, 1)
    return values


def here(work: Callable[[int], int], numbers: Iterable[int]) -> Iterator[int]:
    """The RunAll of this process."""
    return map(work, numbers)


def sample_vectors(output: Output, count: int) -> Vectors:
    """About `count` vectors, evenly over the output's rows, scaled to length 1."""
    dim, step = dim_of(output), max(1, output.rows // max(count, 1))
    parts = [np.empty((0, dim), np.float32)]
    for block in output.blocks([COLUMN]):
        chosen = np.flatnonzero(block.positions % step == 0)
        parts.append(view_vectors(block.table[COLUMN], dim)[chosen])
    return scaled(np.concatenate(parts))
