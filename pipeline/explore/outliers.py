"""Images that are far from all others, and images whose label their neighbours contradict."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.explore.reference import Reference, distances

SCALE_ROWS = 2000
FENCE = 3.0
"""An outlier's distance is this many interquartile ranges above the third quartile: Tukey's "far out"."""
NEIGHBOURS = 10
CONTRADICTED = 0.8
"""The least share of the neighbours that have the same other label, for a label to be listed as contradicted."""


@dataclass(frozen=True)
class Neighbourhoods:
    """Compares each image with its k nearest sampled images.

    count: k. labels: of the sampled images, strings or null; None without labels.
    """

    reference: Reference
    count: int
    labels: pa.Array | None = None

    @cached_property
    def scale(self) -> tuple[float, float]:
        """The median distance of an image to its k-th neighbour, and the outlier score from which it is far out."""
        rows = self.reference.some(SCALE_ROWS)
        positions = self.reference.positions[rows]
        cosines, _ = self.reference.neighbours(self.reference.vectors[rows], positions, self.count)
        first, median, third = np.quantile(distances(cosines[:, -1]), [0.25, 0.5, 0.75])
        typical = max(float(median), 1e-6)
        return typical, float(third + FENCE * (third - first)) / typical

    @cached_property
    def _codes(self) -> tuple[NDArray[np.int64], list[str], NDArray[np.bool_]]:
        """Code of each sampled image's label, -1 for null; the labels; whether the sample has enough of each."""
        assert self.labels is not None
        encoded = self.labels.dictionary_encode()
        codes = np.asarray(encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
        names = encoded.dictionary.to_pylist()
        counts = np.bincount(codes[codes >= 0], minlength=len(names))
        return codes, names, counts > self.count

    @property
    def not_judged(self) -> Sequence[str]:
        """Classes with too few sampled images for k neighbours of the same label."""
        if self.labels is None:
            return ()
        _, names, is_judged = self._codes
        return sorted(name for name, judged in zip(names, is_judged, strict=True) if not judged)

    def outliers(self, cosines: NDArray[np.float32]) -> NDArray[np.float32]:
        """Outlier score of each image: the distance to its k-th neighbour, in medians of that distance."""
        return np.asarray(distances(cosines[:, -1]) / self.scale[0], np.float32)

    def contradictions(
        self, found: NDArray[np.int64], own: pa.Array
    ) -> tuple[NDArray[np.float32], pa.Array, NDArray[np.bool_]]:
        """Share of the neighbours with another label (NaN if it is not judged), their most frequent label, and whether
        they contradict the image's own.

        found: rows of the sample [N, k]. own: labels of the images.
        """
        codes, names, is_judged = self._codes
        number = {name: code for code, name in enumerate(names) if is_judged[code]}
        mine = np.array([number.get(label, -1) for label in own.to_pylist()], np.int64)
        theirs = codes[found]
        votes = ((theirs[:, :, None] == theirs[:, None, :]) & (theirs >= 0)[:, None, :]).sum(axis=2)
        best = votes.argmax(axis=1)
        rows = np.arange(len(theirs))
        winner, share = theirs[rows, best], votes[rows, best] / self.count
        labelled = np.maximum((theirs >= 0).sum(axis=1), 1)
        other = ((theirs >= 0) & (theirs != mine[:, None])).sum(axis=1) / labelled
        contradiction = np.where(mine >= 0, other, np.nan).astype(np.float32)
        winners = pa.array(names, pa.string()).take(pa.array(winner, mask=winner < 0))
        return contradiction, winners, (mine >= 0) & (winner >= 0) & (winner != mine) & (share >= CONTRADICTED)
