"""All pairs of similar vectors: within memory, or by partitions that overlap, as tasks that can be repeated."""

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import SettingRefused
from pipeline.explore.choices import need_search
from pipeline.explore.search import NEARLY
from pipeline.explore.table import Choice, Output
from pipeline.explore.vectors import COLUMN, Vectors, dim_of, scaled, view_vectors
from pipeline.storage import access, uris

BLOCK_ROWS, BLOCK_COLUMNS = 1024, 4096
"""Rows and columns of the products that are in memory at once: they stay in the cache of a CPU."""
EXACT_PAIRS = 8192
MAX_PAIRS = 50_000_000
CELL_ROWS = 4096
"""Rows per partition, on average."""
PIECE_ROWS = 16_384
"""Rows that are sorted into partitions at a time: with their copies, MAX_OTHER_CELLS times as many are in memory."""
SAMPLE_PER_CELL = 64
MAX_SAMPLE = 250_000
MAX_OTHER_CELLS = 7
"""Partitions that a row is compared in, beside its own."""
ITERATIONS = 10
SEED = 0

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
        first, second, similarity = (np.concatenate([getattr(each, name) for each in pairs]) for name in _FIELDS)
        order = np.lexsort((second, first))
        first, second, similarity = first[order], second[order], similarity[order]
        is_new = np.ones(len(first), bool)
        is_new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        return Pairs(first[is_new], second[is_new], similarity[is_new])

    @staticmethod
    def none() -> "Pairs":
        nothing = np.empty(0, np.int64)
        return Pairs(nothing, nothing, np.empty(0, np.float32))


_FIELDS = ("first", "second", "similarity")


def read_all(output: Output, choices: tuple[Choice, ...] = ()) -> tuple[Vectors, NDArray[np.int64]]:
    """All chosen vectors, scaled to length 1, float32 [N, dim], and their positions."""
    dim = dim_of(output)
    vectors, positions = np.empty((output.rows, dim), np.float32), np.empty(output.rows, np.int64)
    count = 0
    for block in output.blocks([COLUMN], choices):
        stop = count + len(block.positions)
        vectors[count:stop] = scaled(view_vectors(block.table[COLUMN], dim))
        positions[count:stop] = block.positions
        count = stop
    return vectors[:count], positions[:count]


def pairs_within(vectors: Vectors, positions: NDArray[np.int64], threshold: float) -> Iterator[Pairs]:
    """The pairs of vectors of length 1 whose cosine is at least the threshold."""
    for start in range(0, len(vectors), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        for column in range(start, len(vectors), BLOCK_COLUMNS):
            columns = slice(column, column + BLOCK_COLUMNS)
            yield _similar(
                vectors[rows], vectors[columns], positions[rows], positions[columns], threshold, start, column
            )


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


# Partitions


@dataclass(frozen=True)
class Partitions:
    """The rows of an output by k-means cells, in files of a folder.

    A row is in its own cell, and is compared in each further cell that a vector as similar as the threshold may be in:
    one whose border is near enough, MAX_OTHER_CELLS at most. Only that limit can lose pairs.

    folder: URI. cells: number of cells. blocks: number of files. truncated: share of the rows with more such cells.
    """

    folder: str
    cells: int
    blocks: int
    dim: int
    threshold: float
    truncated: float


def pairs_by_partitions(
    output: Output,
    threshold: float,
    folder: str,
    key: str,
    run_all: RunAll = here,
    on_cell: Callable[[int, int], object] = lambda done, cells: None,
) -> tuple[Pairs, Partitions]:
    """The pairs of all rows, cell by cell. A repeated call continues: what the folder has is not computed again.

    folder: URI of a folder for temporary files, which the caller removes. key: of everything that the pairs depend on;
    files of another key are removed. on_cell: called after each cell, with the number of cells done and of all cells.
    """
    need_search("duplicates of more than 100,000 rows", "faiss")
    partitions = _load(folder, key) or _partition(output, threshold, folder, key)
    done = {int(info.uri.rpartition("-")[2].removesuffix(".npz")) for info in _files(folder, "pairs-")}
    work = partial(compute_cell, partitions)
    for count, _ in enumerate(run_all(work, [cell for cell in range(partitions.cells) if cell not in done])):
        on_cell(len(done) + count + 1, partitions.cells)
    return Pairs.joined(_read_pairs(folder, cell) for cell in range(partitions.cells)), partitions


def compute_cell(partitions: Partitions, cell: int) -> int:
    """Write the pairs of one cell. Returns their number. Runs on any machine that can read the folder."""
    own, own_positions = _read_cell(partitions, "own", cell)
    others, other_positions = _read_cell(partitions, "other", cell)
    found = Pairs.joined(
        [
            *pairs_within(own, own_positions, partitions.threshold),
            *pairs_between(own, own_positions, others, other_positions, partitions.threshold),
        ]
    )
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(found, name) for name in _FIELDS})
    access.write(uris.join(partitions.folder, f"pairs-{cell:06d}.npz"), buffer.getvalue())
    return len(found)


def _files(folder: str, prefix: str) -> list[Any]:
    try:
        infos = list(access.list_objects(folder))
    except FileNotFoundError:
        return []
    return [info for info in infos if info.uri.rpartition("/")[2].startswith(prefix)]


def remove(folder: str) -> None:
    """Remove the temporary files of partitions."""
    for info in _files(folder, ""):
        access.delete(info.uri)


def _load(folder: str, key: str) -> Partitions | None:
    try:
        record = json.loads(access.read(uris.join(folder, "partitions.json")))
    except (FileNotFoundError, ValueError):
        return None
    return Partitions(folder, **record["partitions"]) if record["key"] == key else None


def _partition(output: Output, threshold: float, folder: str, key: str) -> Partitions:
    remove(folder)
    cells = max(1, math.ceil(output.rows / CELL_ROWS))
    centroids = _centroids(output, cells)
    dim, blocks, truncated = dim_of(output), 0, 0
    for vectors, positions in _pieces(output, dim):
        own, (rows, others), cut = _assign(vectors, centroids, threshold)
        truncated += cut
        _write_cells(folder, f"own-{blocks:06d}", vectors, positions, own)
        _write_cells(folder, f"other-{blocks:06d}", vectors[rows], positions[rows], others)
        blocks += 1
    made = Partitions(folder, cells, blocks, dim, threshold, truncated / max(output.rows, 1))
    fields = {name: value for name, value in vars(made).items() if name != "folder"}
    access.write(uris.join(folder, "partitions.json"), json.dumps({"key": key, "partitions": fields}).encode())
    return made


def _pieces(output: Output, dim: int) -> Iterator[tuple[Vectors, NDArray[np.int64]]]:
    """All vectors, scaled to length 1, and their positions, PIECE_ROWS at a time."""
    for block in output.blocks([COLUMN]):
        vectors = view_vectors(block.table[COLUMN], dim)
        for start in range(0, len(vectors), PIECE_ROWS):
            stop = start + PIECE_ROWS
            yield scaled(vectors[start:stop]), block.positions[start:stop]


def _centroids(output: Output, cells: int) -> Vectors:
    """float32 [cells, dim], of length 1: spherical k-means of a sample."""
    import faiss

    sample = sample_vectors(output, min(MAX_SAMPLE, SAMPLE_PER_CELL * cells))
    kmeans = faiss.Kmeans(
        sample.shape[1], min(cells, len(sample)), niter=ITERATIONS, spherical=True, seed=SEED, verbose=False,
        min_points_per_centroid=1, max_points_per_centroid=10**9,
    )  # fmt: skip
    kmeans.train(sample)
    return scaled(np.asarray(kmeans.centroids, np.float32))


def sample_vectors(output: Output, count: int) -> Vectors:
    """About `count` vectors, evenly over the output's rows, scaled to length 1."""
    dim, step = dim_of(output), max(1, output.rows // max(count, 1))
    parts = [np.empty((0, dim), np.float32)]
    for block in output.blocks([COLUMN]):
        chosen = np.flatnonzero(block.positions % step == 0)
        parts.append(view_vectors(block.table[COLUMN], dim)[chosen])
    return scaled(np.concatenate(parts))


def _assign(
    vectors: Vectors, centroids: Vectors, threshold: float
) -> tuple[NDArray[np.int64], tuple[NDArray[np.int64], NDArray[np.int64]], int]:
    """The own cell of each row; rows and further cells; number of rows with more further cells than are allowed.

    Two vectors of length 1 with a cosine of the threshold are sqrt(2 - 2 * threshold) apart. If a border is between
    them, one of them is at most half as far from it.
    """
    reach = math.sqrt(max(0.0, 2 - 2 * threshold)) / 2
    products = vectors @ centroids.T
    own = products.argmax(axis=1)
    between = np.sqrt(np.maximum(2 - 2 * (centroids @ centroids.T), 1e-12))  # distances of the centroids
    np.subtract(products[np.arange(len(own)), own][:, None], products, out=products)
    products /= between[own]
    products[np.arange(len(own)), own] = np.inf
    limit = min(MAX_OTHER_CELLS, products.shape[1])
    near = np.argpartition(products, limit - 1, axis=1)[:, :limit]
    is_near = np.take_along_axis(products, near, axis=1) <= reach
    rows, places = np.nonzero(is_near)
    truncated = int(((products <= reach).sum(axis=1) > limit).sum())
    return own, (rows, near[rows, places]), truncated


def _write_cells(
    folder: str, name: str, vectors: Vectors, positions: NDArray[np.int64], cells: NDArray[np.int64]
) -> None:
    """Write rows sorted by cell: one file of vectors, and one of cells and positions."""
    order = np.argsort(cells, kind="stable")
    access.write(uris.join(folder, f"{name}.f32"), np.ascontiguousarray(vectors[order]).tobytes())
    buffer = io.BytesIO()
    np.savez(buffer, cells=cells[order], positions=positions[order])
    access.write(uris.join(folder, f"{name}.npz"), buffer.getvalue())


def _read_cell(partitions: Partitions, kind: str, cell: int) -> tuple[Vectors, NDArray[np.int64]]:
    vectors, positions = [np.empty((0, partitions.dim), np.float32)], [np.empty(0, np.int64)]
    for block in range(partitions.blocks):
        name = uris.join(partitions.folder, f"{kind}-{block:06d}")
        with np.load(io.BytesIO(access.read(f"{name}.npz"))) as rows:
            start, stop = np.searchsorted(rows["cells"], [cell, cell + 1])
            positions.append(rows["positions"][start:stop])
        if start < stop:
            with access.open_read(f"{name}.f32") as file:
                file.seek(int(start) * partitions.dim * 4)
                data = file.read(int(stop - start) * partitions.dim * 4)
            vectors.append(np.frombuffer(data, np.float32).reshape(-1, partitions.dim))
    return np.concatenate(vectors), np.concatenate(positions)


def _read_pairs(folder: str, cell: int) -> Pairs:
    with np.load(io.BytesIO(access.read(uris.join(folder, f"pairs-{cell:06d}.npz")))) as stored:
        return Pairs(*(stored[name] for name in _FIELDS))
