"""Rows as points on a plane: a projection of their vectors, and their places on the Earth.

Both show a sample of a large output. The vectors of a sample are read from at most MAX_SAMPLE_BYTES of row groups.

The page draws them itself. embedding-atlas draws such plots well, but it is a server of its own that brings fourteen
packages, knows no archive and no marks, and needs every picture in its table.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.explore.serve.rows import Rows
from pipeline.explore.table import Positions
from pipeline.explore.vectors import COLUMN, Vectors, dim_of, scaled, view_vectors
from pipeline.output.geoparquet import BBOX, CORNERS

PCA, TSNE = "pca", "tsne"
METHODS = (PCA, TSNE)
SAMPLE = {PCA: 5000, TSNE: 2000}
"""Rows of a projection."""
MAX_PARTS = 64
MAX_SAMPLE_BYTES = 512 << 20
"""Row groups that are read for a projection."""
MAX_PLACES = 20_000
TSNE_DIMS = 30
"""Principal components that t-SNE starts from."""
PERPLEXITY = 30.0
MIN_TSNE = 10
TSNE_STEPS = 500
ITERATIONS = 8
EXTRA = 8
HALF_TURN = 180
"""Degrees. A wider box crosses the antimeridian, and has no place on a flat map."""


@dataclass(frozen=True)
class Projection:
    """Points of a sample. rows: positions. points: float32 [len(rows), 2], from 0 to 1.

    explained: their share of the variance; None if the method has none.
    """

    rows: Positions
    points: NDArray[np.float32]
    explained: float | None


@dataclass(frozen=True)
class Places:
    """Footprints of a sample: rows, float64 [len(rows), 4] of west, south, east, north, and how many have none."""

    rows: Positions
    boxes: NDArray[np.float64]
    without: int


def has_tsne() -> bool:
    """Whether scikit-learn is installed."""
    return find_spec("sklearn") is not None


def project(rows: Rows, method: str) -> Projection:
    """A projection of a sample of the vectors to two dimensions. Raises OutputRefused and InputRefused."""
    dim = dim_of(rows.output)
    positions = _sample(rows, SAMPLE[method])
    vectors = scaled(view_vectors(rows.output.take(positions, [COLUMN])[COLUMN], dim))
    components = TSNE_DIMS if method == TSNE and len(vectors) >= MIN_TSNE else 2
    points, explained = principal_components(vectors, components)
    if components > 2:
        points = _tsne(points)
    return Projection(positions, _within_one(points), explained if components == 2 else None)


def _tsne(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """t-SNE of principal components [N, d] as [N, 2], from the first two. One thread, beside those of the server."""
    from sklearn import manifold
    from threadpoolctl import threadpool_limits

    start = points[:, :2] / max(float(points[:, 0].std()), 1e-12) * 1e-4
    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    with threadpool_limits(1):
        return np.asarray(manifold.TSNE(init=start, perplexity=perplexity, max_iter=TSNE_STEPS).fit_transform(points))


def principal_components(vectors: Vectors, count: int) -> tuple[NDArray[np.float32], float]:
    """The first components of vectors [N, dim] as [N, count], and their share of the variance.

    Randomized subspace iteration (Halko, Martinsson and Tropp, 2011, algorithm 4.4), with a fixed seed. If there are
    fewer components, the last columns are 0.
    """
    centred = vectors - vectors.mean(axis=0)
    width = min(count + EXTRA, *centred.shape)
    basis = np.random.default_rng(0).standard_normal((centred.shape[1], width)).astype(np.float32)
    for _ in range(ITERATIONS):
        basis, _ = np.linalg.qr(centred.T @ (centred @ basis))
    _, _, axes = np.linalg.svd(centred @ basis, full_matrices=False)
    points = np.zeros((len(vectors), count), np.float32)
    found = min(count, len(axes))
    points[:, :found] = centred @ (basis @ axes[:found].T)
    total = float((centred**2).sum())
    return points, float((points[:, :2] ** 2).sum()) / total if total else 0.0


def places(rows: Rows) -> Places:
    """The boxes of a sample of the footprints."""
    total = rows.output.rows
    rng = np.random.default_rng(0)
    positions = np.arange(total) if total <= MAX_PLACES else np.sort(rng.choice(total, MAX_PLACES, replace=False))
    column = rows.output.take(positions, [BBOX])[BBOX].combine_chunks()
    corners = [pc.struct_field(column, name).to_numpy(zero_copy_only=False) for name in CORNERS]
    boxes = np.stack(corners, axis=1).astype(np.float64)
    is_known = np.isfinite(boxes).all(axis=1) & (boxes[:, 2] - boxes[:, 0] <= HALF_TURN)
    return Places(positions[is_known], boxes[is_known], int((~is_known).sum()))


def drawn(rows: Rows, positions: Positions) -> dict[str, Any]:
    """What colours the points of some rows: row, label (code) and score of each."""
    index = rows.index
    scores = None if index.scores is None else np.nan_to_num(index.scores[positions], nan=-1).round(4).tolist()
    return {"rows": positions.tolist(), "labels": index.codes[positions].tolist(), "scores": scores}


def _sample(rows: Rows, count: int) -> Positions:
    """Sorted positions, evenly among some row groups, which are chosen at random."""
    rng = np.random.default_rng(0)
    candidates: list[Positions] = []
    size_bytes = 0
    for part in rng.permutation(len(rows.output.parts))[:MAX_PARTS].tolist():
        for group in rows.groups_of(part):
            if candidates and size_bytes + group.size_bytes > MAX_SAMPLE_BYTES:
                break
            candidates.append(np.arange(group.first, group.first + group.rows))
            size_bytes += group.size_bytes
    joined = np.concatenate(candidates)
    return np.sort(rng.choice(joined, min(count, len(joined)), replace=False))


def _within_one(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale both axes alike to 0 … 1."""
    low, high = points.min(axis=0), points.max(axis=0)
    span = max(float((high - low).max()), 1e-12)
    return np.asarray(0.5 + (points - (low + high) / 2) / span, np.float32)
