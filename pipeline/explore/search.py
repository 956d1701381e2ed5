"""`nightshift search`: the images of an output that are most similar to some images, ids or vectors. Exact.

Similarity is the cosine of two vectors. The vectors are read one row group at a time, so memory does not grow with the
output. Neither Ray nor an index is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import schema
from pipeline.errors import InputRefused, SettingRefused, message_line
from pipeline.explore.choices import choices_of
from pipeline.explore.table import Choice, OnStep, Output, Part, ends_of, no_step
from pipeline.explore.vectors import COLUMN, MIN_LENGTH, Vectors, dim_of, lengths, network_of, space_of, view_vectors
from pipeline.storage import access, uris

COUNT = 20
MAX_COUNT = 10_000
MAX_QUERIES = 10_000
MAX_SHOWN = 5
MAX_PRODUCTS = 1 << 24
"""Products of queries and rows that are in memory."""
EXACT_ROWS = 4096
NEARLY = 1e-5
"""Products of float32 may differ by this much between two places of the same vector. What is this close to the best is
computed again in float64, so that equal vectors have equal similarities."""


@dataclass(frozen=True)
class Queries:
    """What to search for. names: of each query. vectors: float32 [len(names), dim], of length 1."""

    names: tuple[str, ...]
    vectors: Vectors


@dataclass(frozen=True)
class Hits:
    """The hits of some queries. table: query, rank (from 1), image_id, similarity, and the output's other columns.

    Sorted by query and rank. The vectors are left out.
    """

    table: pa.Table

    def to_list(self) -> list[dict[str, Any]]:
        """One dictionary per hit, without binary columns, which JSON cannot hold."""
        names = [column.name for column in self.table.schema if not pa.types.is_binary(column.type)]
        return list(self.table.select(names).to_pylist())


def search(
    output: Output,
    *,
    images: Sequence[str] = (),
    ids: Sequence[str] = (),
    vectors: Vectors | None = None,
    count: int = COUNT,
    where: str | None = None,
    bbox: str | None = None,
    exclude: str | None = None,
    index: bool = False,
    on_step: OnStep = no_step,
) -> Hits:
    """Find the `count` most similar images of each query: those of `images`, then of `ids`, then of `vectors`.

    images: paths or URIs, embedded by the output's own network. ids: image_ids of the output, or the end of one from a
    `/` or `#` on. vectors: [N, dim], of the output's embedding space, which cannot be checked. where, bbox, exclude: as
    the flags; only such rows are hits. index: use the index of `nightshift index`, which finds nearly all of them.
    on_step: called with the progress. Raises SettingRefused, InputRefused, OutputRefused and WeightsRefused.
    """
    if not 1 <= count <= MAX_COUNT:
        raise SettingRefused(f"-k is {count}: it must be a number from 1 to {MAX_COUNT:,}")
    choices = choices_of(output, where, bbox, exclude)
    queries = find_queries(output, images, ids, vectors)
    if index:
        from pipeline.explore.index import search_index

        similarities, positions = search_index(output, queries.vectors, count, choices)
    else:
        similarities, positions = nearest(output, queries.vectors, count, choices, on_step=on_step)
    return _hits(output, queries.names, similarities, positions)


def find_queries(output: Output, images: Sequence[str], ids: Sequence[str], vectors: Vectors | None) -> Queries:
    """The vectors of all queries. Raises as `search` does."""
    dim = dim_of(output)
    parts: list[Vectors] = []
    if not images and not ids and vectors is None:
        raise SettingRefused("nothing to search for: give --image FILE, --id IMAGE_ID or --vector FILE.npy")
    if images:
        parts.append(_embedded(output, images))
    if ids:
        parts.append(_vectors_of(output, ids, dim))
    if vectors is not None:
        parts.append(_checked(np.atleast_2d(np.asarray(vectors, np.float32)), dim, output))
    joined = np.concatenate(parts)
    names = (*images, *ids, *(f"vector {number}" for number in range(len(joined) - len(images) - len(ids))))
    if len(joined) > MAX_QUERIES:
        raise SettingRefused(f"there are {len(joined):,} queries: search for at most {MAX_QUERIES:,} at once")
    norms = lengths(joined)
    if (zero := np.flatnonzero(norms <= MIN_LENGTH)).size:
        raise InputRefused(f"the vector of {names[zero[0]]} is zero: it has no direction to compare")
    return Queries(names, np.asarray(joined / norms[:, None], np.float32))


def read_vectors(files: Sequence[str]) -> Vectors | None:
    """The vectors of .npy files, [dim] or [N, dim] each; None without files. Raises InputRefused."""
    return np.concatenate([_read_vector(uri) for uri in files]) if files else None


def _read_vector(uri: str) -> Vectors:
    try:
        with access.open_read(uris.normalize(uri)) as file:
            vectors = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputRefused(f"--vector {uris.redact(uri)} does not exist") from error
    except (OSError, ValueError) as error:
        raise InputRefused(f"--vector {uris.redact(uri)} is no .npy file of numbers: {message_line(error)}") from error
    if not isinstance(vectors, np.ndarray) or vectors.ndim not in (1, 2) or vectors.dtype.kind not in "fiu":
        shape = getattr(vectors, "shape", type(vectors).__name__)
        raise InputRefused(
            f"--vector {uris.redact(uri)} has shape {shape}: it must be numbers of shape [dim] or [N, dim]"
        )
    return np.atleast_2d(vectors).astype(np.float32)


def _checked(vectors: Vectors, dim: int, output: Output) -> Vectors:
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise InputRefused(f"--vector has width {vectors.shape[-1]}, but the vectors of {output.uri} have {dim}")
    if not np.isfinite(vectors).all():
        raise InputRefused("--vector holds NaN or infinity")
    return vectors


def _embedded(output: Output, images: Sequence[str]) -> Vectors:
    from pipeline.stages.query import embed  # imports torch when it runs

    return embed(output.settings, network_of(output), space_of(output), images)


def _vectors_of(output: Output, ids: Sequence[str], dim: int) -> Vectors:
    positions = find_ids(output, ids)
    return view_vectors(output.take(positions, [COLUMN])[COLUMN], dim)


def find_ids(output: Output, ids: Sequence[str]) -> NDArray[np.int64]:
    """Positions of the rows with these image_ids, or with one that ends in them from a `/` or `#` on.

    Raises InputRefused for a name of no image, or of several.
    """
    exact: dict[str, int] = {}
    ends: dict[str, list[tuple[int, str]]] = {name: [] for name in ids}
    for block in output.blocks(["image_id"]):
        column = block.table["image_id"].combine_chunks()
        for name in ends:
            if (same := pc.index(column, name).as_py()) >= 0:
                exact[name] = int(block.positions[same])
            if len(ends[name]) <= MAX_SHOWN:
                endings = [pc.ends_with(column, end).to_numpy(zero_copy_only=False) for end in ends_of(name)]
                rows = np.flatnonzero(np.any(endings, axis=0))
                ends[name] += [(int(block.positions[row]), column[int(row)].as_py()) for row in rows[: MAX_SHOWN + 1]]
    positions = [exact[name] if name in exact else _only(output, name, ends[name]) for name in ids]
    return np.array(positions, np.int64)


def _only(output: Output, name: str, candidates: list[tuple[int, str]]) -> int:
    if not candidates:
        raise InputRefused(f"--id {name} is no image_id of {output.uri}, nor the part of one after a / or #")
    if len(candidates) > 1:
        shown = ", ".join(image_id for _, image_id in candidates[:MAX_SHOWN])
        raise InputRefused(f"--id {name} is the end of several image_ids: {shown}; write more of it")
    return candidates[0][0]


def nearest(
    output: Output,
    queries: Vectors,
    count: int,
    choices: Sequence[Choice] = (),
    parts: Sequence[Part] | None = None,
    on_step: OnStep = no_step,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Similarities and positions of the most similar rows of each query, both [N, count], the best first.

    queries: float32 [N, dim] of length 1. Fewer than `count` rows leave positions of -1. Rows of equal similarity are
    in the order of their positions. parts: some of the output's parts (default: all of them).
    """
    dim = dim_of(output)
    best = Best(len(queries), count)
    for block in output.blocks([COLUMN], choices, parts):
        best.add(queries, view_vectors(block.table[COLUMN], dim), block.positions)
        on_step("searching", int(block.positions[-1]) + 1, output.rows)
    return best.similarities, best.positions


class Best:
    """The rows of the highest similarities of each query, of all blocks seen so far."""

    def __init__(self, queries: int, count: int) -> None:
        self.count = count
        self.similarities = np.full((queries, count), -np.inf, np.float32)
        self.positions = np.full((queries, count), -1, np.int64)

    def add(self, queries: Vectors, vectors: Vectors, positions: NDArray[np.int64]) -> None:
        """Add a block: float32 [n, dim], and the positions of its rows in ascending order."""
        step = max(1, MAX_PRODUCTS // len(queries))
        for start in range(0, len(vectors), step):
            piece = vectors[start : start + step]
            products = queries @ piece.T / lengths(piece)
            for number in range(len(queries)):
                self._merge(number, queries[number], products[number], piece, positions[start : start + step])

    def _merge(
        self,
        number: int,
        query: Vectors,
        products: Vectors,
        vectors: Vectors,
        positions: NDArray[np.int64],
    ) -> None:
        lowest = self.similarities[number, -1]
        if len(products) > self.count:
            lowest = max(lowest, np.partition(products, -self.count)[-self.count])
        rows = np.flatnonzero(products >= lowest - NEARLY)
        if len(rows):
            self.merge_exact(number, exact(query, vectors[rows]), positions[rows])

    def merge_exact(self, number: int, similarities: NDArray[np.float32], positions: NDArray[np.int64]) -> None:
        """Add rows with their final similarities to those of a query."""
        all_similarities = np.concatenate([self.similarities[number], similarities])
        all_positions = np.concatenate([self.positions[number], positions])
        order = np.lexsort((all_positions, -all_similarities))[: self.count]
        self.similarities[number], self.positions[number] = all_similarities[order], all_positions[order]


def exact(query: Vectors, vectors: Vectors) -> NDArray[np.float32]:
    """Cosines of a vector of length 1 and vectors [n, dim], each computed alike, wherever its vector stands.

    A matrix product is not: its last bits depend on a row's place. NumPy sums each row by itself.
    """
    wide = query.astype(np.float64)
    similarities = []
    for start in range(0, len(vectors), EXACT_ROWS):
        rows = vectors[start : start + EXACT_ROWS].astype(np.float64)
        norms = np.maximum(np.sqrt((rows * rows).sum(axis=1)), MIN_LENGTH)
        similarities.append((rows * wide).sum(axis=1) / norms)
    return np.asarray(np.clip(np.concatenate(similarities), -1, 1), np.float32)


def _hits(
    output: Output,
    names: Sequence[str],
    similarities: NDArray[np.float32],
    positions: NDArray[np.int64],
) -> Hits:
    others = [column.name for column in output.schema if not schema.is_vector(column.type)]
    others.remove("image_id")
    query, place = np.nonzero(positions >= 0)
    rows = output.take(positions[query, place], ["image_id", *others])
    values = similarities[query, place]
    ids = rows["image_id"].to_pylist()
    order = sorted(range(len(ids)), key=lambda row: (query[row], -values[row], ids[row]))
    ranks = np.concatenate([[0], *(np.arange(1, count + 1) for count in np.bincount(query, minlength=len(names)))])[1:]
    table = pa.table({"query": pa.array([names[query[row]] for row in order], pa.string())})
    table = table.append_column("rank", pa.array(ranks, pa.int32()))
    taken = rows.take(pa.array(order, pa.int64()))
    table = table.append_column("image_id", taken["image_id"])
    table = table.append_column("similarity", pa.array(values[order], pa.float32()))
    for name in others:
        own = f"own_{name}" if name in table.column_names else name  # a kept column may be named like one of these
        table = table.append_column(taken.schema.field(name).with_name(own), taken[name])
    return Hits(table)
