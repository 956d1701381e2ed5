"""All pairs of similar vectors of a large output: k-means partitions that overlap, as tasks that can be repeated."""

import io
import json
import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.explore.choices import need_search
from pipeline.explore.pairs import FIELDS, Pairs, RunAll, here, pairs_between, pairs_within, sample_vectors
from pipeline.explore.table import OnStep, Output, no_step
from pipeline.explore.vectors import COLUMN, Vectors, dim_of, scaled, view_vectors
from pipeline.storage import access, uris

FORMAT = 1
RECORD = "partitions.json"
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


@dataclass(frozen=True)
class Partitions:
    """The rows of an output by k-means cells, in files of a folder.

    A row is in its own cell, and is compared in each further cell that a vector as similar as the threshold may be in:
    one whose border is near enough, MAX_OTHER_CELLS at most. Only that limit can lose pairs.

    folder: URI. cells: number of cells. blocks: number of files. truncated: share of the rows with more such cells.
    old: ranges of positions whose rows are not compared with each other. note: of the caller.
    """

    folder: str
    cells: int
    blocks: int
    dim: int
    threshold: float
    truncated: float
    old: tuple[tuple[int, int], ...] = ()
    note: Mapping[str, Any] = field(default_factory=dict)

    def is_old(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each position is in a range of `old`."""
        ends = np.array(self.old, np.int64).reshape(-1)
        return np.asarray(np.searchsorted(ends, positions, side="right") % 2 == 1)


def pairs_by_partitions(
    output: Output,
    threshold: float,
    old: Set[str],
    folder: str,
    key: str,
    note: Mapping[str, Any] | None = None,
    run_all: RunAll = here,
    on_step: OnStep = no_step,
) -> tuple[Pairs, str]:
    """The pairs of all rows but those of two rows of old parts, cell by cell, and how they were found, in words.

    A repeated call continues: what the folder has is not computed again. old: paths of parts. folder: URI of a folder
    for temporary files, which the caller removes. key: of everything that the pairs depend on; files of another key are
    removed. note: JSON that `unfinished` returns.
    """
    need_search("duplicates of more than 100,000 rows", "faiss")
    partitions = _load(folder, key) or _partition(output, threshold, old, folder, key, note or {}, on_step)
    done = {int(info.uri.rpartition("-")[2].removesuffix(".npz")) for info in _files(folder, "pairs-")}
    work = partial(compute_cell, partitions)
    for count, _ in enumerate(run_all(work, [cell for cell in range(partitions.cells) if cell not in done])):
        on_step("comparing partitions", len(done) + count + 1, partitions.cells)
    how = (
        f"compared in {partitions.cells:,} overlapping partitions; {partitions.truncated:.1%} of the images are "
        "near the borders of more partitions than they were compared in"
    )
    return Pairs.joined(_read_pairs(folder, cell) for cell in range(partitions.cells)), how


def unfinished(folder: str, key: str) -> Mapping[str, Any] | None:
    """The note of a call with this key that was stopped; None if there is none."""
    partitions = _load(folder, key)
    return partitions.note if partitions else None


def compute_cell(partitions: Partitions, cell: int) -> int:
    """Write the pairs of one cell. Returns their number. Runs on any machine that can read the folder."""
    own, own_positions = _read_cell(partitions, "own", cell)
    others, other_positions = _read_cell(partitions, "other", cell)
    is_old, is_other_old = partitions.is_old(own_positions), partitions.is_old(other_positions)
    new, before = (own[~is_old], own_positions[~is_old]), (own[is_old], own_positions[is_old])
    other_new = others[~is_other_old], other_positions[~is_other_old]
    found = Pairs.joined(
        [
            *pairs_within(*new, partitions.threshold),
            *pairs_between(*new, *before, partitions.threshold),
            *pairs_between(*new, others, other_positions, partitions.threshold),
            *pairs_between(*before, *other_new, partitions.threshold),
        ]
    )
    buffer = io.BytesIO()
    np.savez(buffer, **{name: getattr(found, name) for name in FIELDS})
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
        record = json.loads(access.read(uris.join(folder, RECORD)))
        if record["format"] != FORMAT or record["key"] != key:
            return None
        fields = record["partitions"]
        return Partitions(folder, **{**fields, "old": tuple(map(tuple, fields["old"]))})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _partition(
    output: Output, threshold: float, old: Set[str], folder: str, key: str, note: Mapping[str, Any], on_step: OnStep
) -> Partitions:
    remove(folder)
    cells = max(1, math.ceil(output.rows / CELL_ROWS))
    centroids = _centroids(output, cells)
    dim, blocks, truncated = dim_of(output), 0, 0
    for vectors, positions in _pieces(output, dim):
        own, (rows, others), cut = _assign(vectors, centroids, threshold)
        truncated += cut
        _write_cells(folder, f"own-{blocks:06d}", vectors, positions, np.arange(len(own)), own)
        _write_cells(folder, f"other-{blocks:06d}", vectors, positions, rows, others)
        blocks += 1
        on_step("sorting into partitions", int(positions[-1]) + 1, output.rows)
    share = truncated / max(output.rows, 1)
    made = Partitions(folder, cells, blocks, dim, threshold, share, _ranges(output, old), note)
    fields = {name: value for name, value in vars(made).items() if name != "folder"}
    access.write(uris.join(folder, RECORD), json.dumps({"format": FORMAT, "key": key, "partitions": fields}).encode())
    return made


def _ranges(output: Output, parts: Set[str]) -> tuple[tuple[int, int], ...]:
    """The positions of some parts, as ranges in ascending order."""
    stops = np.cumsum([part.rows for part in output.parts]).tolist()
    return tuple(
        (stop - part.rows, stop)
        for part, stop in zip(output.parts, stops, strict=True)
        if part.path in parts and part.rows
    )


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
    folder: str,
    name: str,
    vectors: Vectors,
    positions: NDArray[np.int64],
    rows: NDArray[np.int64],
    cells: NDArray[np.int64],
) -> None:
    """Write some rows of vectors, sorted by cell: one file of vectors, and one of cells and positions."""
    order = np.argsort(cells, kind="stable")
    rows = rows[order]
    access.write(uris.join(folder, f"{name}.f32"), vectors[rows].tobytes())
    buffer = io.BytesIO()
    np.savez(buffer, cells=cells[order], positions=positions[rows])
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
        return Pairs(*(stored[name] for name in FIELDS))
