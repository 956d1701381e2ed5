"""Clusters of an output's images: their centres from a sample, then the cluster of every image."""

import math
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import SettingRefused
from pipeline.explore.choices import SEARCH_EXTRA
from pipeline.explore.reference import SEED, Reference, distances
from pipeline.explore.vectors import Vectors, scaled

METHODS = ("kmeans", "hdbscan")
MAX_CLUSTERS = 10_000
MAX_DEFAULT_CLUSTERS = 100
ROWS_PER_CLUSTER = 256
"""Sampled rows per cluster. FAISS uses no more."""
ITERATIONS, RESTARTS = 20, 3
HDBSCAN_SAMPLE, MAX_HDBSCAN_SAMPLE = 5000, 20_000
"""HDBSCAN compares all pairs: its time and its memory grow with the square of the sample, 3.2 GB for the largest."""
SHARE_OF_SMALLEST = 0.005
"""The smallest cluster of HDBSCAN, as a share of the sample."""
MIN_CLUSTER_ROWS = 5
NOISE = -1
EXEMPLARS = 5
PURE = 0.5
"""A cluster is named after one class if this share of its images has it, otherwise after its two most frequent."""
SCHEMA = pa.schema(
    [
        ("cluster", pa.int32()),
        ("name", pa.string()),
        ("images", pa.int64()),
        ("share", pa.float64()),
        ("mean_distance", pa.float32()),
        ("label", pa.string()),
        ("label_share", pa.float32()),
        ("exemplars", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Clusters:
    """centres: float32 [clusters, dim], of length 1, the cluster with most sampled images first.

    examples, cluster_of: for HDBSCAN, the sampled vectors and the cluster of each, NOISE for none; an image belongs to
    the cluster of the nearest one. how: the method and its sample, in words.
    """

    centres: Vectors
    how: str
    examples: Vectors | None = None
    cluster_of: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def count(self) -> int:
        return len(self.centres)

    def assign(self, vectors: Vectors) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Cluster of each vector [N, dim] of length 1, and its distance to the centre; NaN in no cluster."""
        if self.examples is None:
            products = vectors @ self.centres.T
            cluster = products.argmax(axis=1)
            return cluster, distances(products[np.arange(len(cluster)), cluster])
        import faiss

        _, nearest = faiss.knn(
            np.ascontiguousarray(vectors), self.examples, 1, metric=faiss.METRIC_INNER_PRODUCT
        )  # computes by blocks, so that memory is flat
        cluster = self.cluster_of[nearest[:, 0]]
        distance = np.full(len(cluster), np.nan, np.float32)
        is_in = cluster != NOISE
        distance[is_in] = distances(np.einsum("nd,nd->n", vectors[is_in], self.centres[cluster[is_in]]))
        return cluster, distance


def check(method: str, clusters: int | None, sample: int | None) -> None:
    """Raise SettingRefused for a method or numbers that cannot work."""
    if method not in METHODS:
        raise SettingRefused(f"--method is {method!r}: it must be one of {', '.join(METHODS)}")
    if clusters is not None and not 1 <= clusters <= MAX_CLUSTERS:
        raise SettingRefused(f"--clusters is {clusters}: it must be a number from 1 to {MAX_CLUSTERS:,}")
    if method == "hdbscan":
        if clusters is not None:
            raise SettingRefused("--clusters is of k-means: HDBSCAN finds the number of clusters; leave it out")
        if find_spec("sklearn") is None:
            raise SettingRefused(f"--method hdbscan needs scikit-learn: {SEARCH_EXTRA}")
    elif sample is not None:
        raise SettingRefused("--sample is of HDBSCAN: add --method hdbscan, or leave it out")
    if sample is not None and not MIN_CLUSTER_ROWS <= sample <= MAX_HDBSCAN_SAMPLE:
        raise SettingRefused(f"--sample is {sample}: it must be from {MIN_CLUSTER_ROWS} to {MAX_HDBSCAN_SAMPLE:,}")


def find_clusters(reference: Reference, method: str, clusters: int | None, sample: int | None) -> Clusters:
    """Cluster a sample. clusters: of k-means; None for a number that grows with the output. sample: of HDBSCAN."""
    if method == "hdbscan":
        return _hdbscan(reference, sample or HDBSCAN_SAMPLE)
    count = clusters or min(MAX_DEFAULT_CLUSTERS, max(1, round(math.sqrt(reference.rows / 2))))
    return _kmeans(reference, min(count, len(reference)))


def _kmeans(reference: Reference, count: int) -> Clusters:
    """Spherical k-means. Clusters without an image of the sample are left out."""
    import faiss

    rows = reference.some(ROWS_PER_CLUSTER * count)
    vectors = reference.vectors if len(rows) == len(reference) else reference.vectors[rows]
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=ITERATIONS,
        nredo=RESTARTS,
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        spherical=True,
        seed=SEED,
        min_points_per_centroid=1,
    )
    kmeans.train(vectors)
    found = Clusters(scaled(np.asarray(kmeans.centroids, np.float32)), "")
    sizes = np.bincount(found.assign(vectors)[0], minlength=count)
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    how = f"{len(order):,} clusters by k-means of {len(vectors):,} images"
    return Clusters(found.centres[order], how)


def _hdbscan(reference: Reference, count: int) -> Clusters:
    from sklearn.cluster import HDBSCAN

    vectors = reference.vectors[reference.some(count)]
    smallest = max(MIN_CLUSTER_ROWS, round(SHARE_OF_SMALLEST * len(vectors)))
    how = f"by HDBSCAN of {len(vectors):,} images, at least {smallest} in each"
    if len(vectors) < smallest:
        return Clusters(vectors[:0], f"no clusters {how}", vectors, np.full(len(vectors), NOISE))
    found = HDBSCAN(min_cluster_size=smallest, algorithm="brute", copy=False).fit_predict(vectors)
    sizes = np.bincount(found[found >= 0])
    order = np.argsort(-sizes, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    cluster_of = np.where(found >= 0, place[found] if len(place) else NOISE, NOISE)
    centres = [vectors[cluster_of == number].mean(axis=0) for number in range(len(order))]
    stacked = scaled(np.array(centres, np.float32).reshape(-1, vectors.shape[1]))
    return Clusters(stacked, f"{len(order):,} clusters {how}", vectors, cluster_of)


class Tally:
    """Sizes, mean distances, exemplars and classes of clusters, of all blocks seen so far."""

    def __init__(self, clusters: Clusters) -> None:
        count = clusters.count
        self.clusters = clusters
        self.images = np.zeros(count, np.int64)
        self.noise = 0
        self.distance = np.zeros(count)
        self.labels: dict[tuple[int, str], int] = {}
        self._nearest: list[list[tuple[float, str]]] = [[] for _ in range(count)]

    def add(
        self, cluster: NDArray[np.int64], distance: NDArray[np.float32], ids: pa.Array, labels: pa.Array | None
    ) -> None:
        """Add a block. labels: strings or null, None without labels."""
        is_in = np.flatnonzero(cluster != NOISE)
        self.noise += len(cluster) - len(is_in)
        self.images += np.bincount(cluster[is_in], minlength=self.clusters.count)
        self.distance += np.bincount(cluster[is_in], distance[is_in], minlength=self.clusters.count)
        order = is_in[np.lexsort((distance[is_in], cluster[is_in]))]
        rank = np.arange(len(order)) - np.searchsorted(cluster[order], cluster[order])
        nearest = order[rank < EXEMPLARS]
        for row, name in zip(nearest.tolist(), ids.take(pa.array(nearest)).to_pylist(), strict=True):
            kept = self._nearest[cluster[row]]
            kept.append((float(distance[row]), name))
        for kept in self._nearest:
            kept.sort()
            del kept[EXEMPLARS:]
        if labels is not None:
            pairs = pa.table({"cluster": cluster, "label": labels}).group_by(["cluster", "label"])
            for row in pairs.aggregate([([], "count_all")]).to_pylist():
                if row["label"] is not None and row["cluster"] != NOISE:
                    key = row["cluster"], row["label"]
                    self.labels[key] = self.labels.get(key, 0) + row["count_all"]

    def sizes(self) -> dict[int, int]:
        """Images of each cluster, and of NOISE."""
        return {**{number: int(images) for number, images in enumerate(self.images)}, NOISE: self.noise}

    def table(self) -> pa.Table:
        """The clusters with SCHEMA. Those without an image are left out."""
        rows = []
        total = max(int(self.images.sum()) + self.noise, 1)
        by_cluster: dict[int, list[tuple[int, str]]] = {}
        for (cluster, label), images in self.labels.items():
            by_cluster.setdefault(cluster, []).append((-images, label))
        for cluster in np.flatnonzero(self.images).tolist():
            images, exemplars = int(self.images[cluster]), [name for _, name in self._nearest[cluster]]
            classes = [(label, -count / images) for count, label in sorted(by_cluster.get(cluster, []))]
            row = {
                "cluster": cluster,
                "name": _name(classes),
                "images": images,
                "share": images / total,
                "mean_distance": self.distance[cluster] / images,
                "label": classes[0][0] if classes else None,
                "label_share": classes[0][1] if classes else None,
                "exemplars": exemplars,
            }
            rows.append(row)
        return pa.Table.from_pylist(rows, schema=SCHEMA)


def _name(classes: list[tuple[str, float]]) -> str | None:
    """classes: with their shares of the cluster, the most frequent first."""
    if not classes:
        return None
    return classes[0][0] if classes[0][1] >= PURE else ", ".join(label for label, _ in classes[:2])
