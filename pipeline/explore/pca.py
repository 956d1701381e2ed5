"""Principal components of an output's vectors: fewer numbers per vector, whose cosines are nearly the same."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import InputRefused, SettingRefused
from pipeline.explore.table import Choice, Output
from pipeline.explore.vectors import COLUMN, Vectors, dim_of, scaled, view_vectors

SAMPLE = 100_000
"""Rows, evenly over the output, that the components are computed from."""
STEP_ROWS = 8192


@dataclass(frozen=True)
class Components:
    """basis: float32 [dim, count], with orthonormal columns. share: of the squared lengths that they keep.

    They are those of the vectors around zero, not around their mean: inner products and cosines of projected vectors
    are then the best approximation of those of the vectors (Eckart and Young 1936).
    """

    basis: Vectors
    share: float

    @property
    def count(self) -> int:
        return int(self.basis.shape[1])

    def project(self, vectors: Vectors) -> Vectors:
        """float32 [N, dim] → float32 [N, count]."""
        return np.ascontiguousarray(vectors @ self.basis, np.float32)

    def describe(self) -> str:
        """A few words: the number of components, and how much they keep."""
        return f"{self.count} of {len(self.basis):,} components, which keep {self.share:.1%} of the squared lengths"


def fit(output: Output, count: int, choices: Sequence[Choice] = ()) -> Components:
    """The components of a sample of the chosen rows, each scaled to length 1.

    Memory: two blocks of rows, and dim² numbers. Raises SettingRefused for a count that the vectors do not have,
    InputRefused if too few rows are chosen.
    """
    dim, step = dim_of(output), max(1, output.rows // SAMPLE)
    if not 1 <= count < dim:
        raise SettingRefused(f"--pca is {count}: it must be at least 1 and less than {dim}, the width of the vectors")
    blocks = output.blocks([COLUMN], choices)
    made, rows = of_pieces((view_vectors(b.table[COLUMN], dim)[b.positions % step == 0] for b in blocks), dim, count)
    if rows < count:
        raise InputRefused(f"--pca is {count}: {output.uri} has {rows:,} rows to compute components from; give fewer")
    return made


def of_pieces(pieces: Iterable[Vectors], dim: int, count: int) -> tuple[Components, int]:
    """The components of float32 [n, dim] each, and the number of their rows."""
    moment, rows = np.zeros((dim, dim)), 0
    for piece in pieces:
        for start in range(0, len(piece), STEP_ROWS):
            vectors = scaled(piece[start : start + STEP_ROWS])
            moment += vectors.T @ vectors
            rows += len(vectors)
    values, basis = np.linalg.eigh(moment)  # ascending
    share = float(values[-count:].sum() / max(values.sum(), np.finfo(float).tiny))
    return Components(np.ascontiguousarray(basis[:, ::-1][:, :count], np.float32), share), rows
