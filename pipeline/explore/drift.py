"""Whether the vectors of two outputs have the same distribution, and which images show the difference."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.explore.reference import SEED
from pipeline.explore.vectors import Vectors

SAMPLE = 1000
"""Images of each output. The kernel has the square of twice as many numbers."""
PERMUTATIONS = 999
SIGNIFICANT = 0.01
EXAMPLES = 12


@dataclass(frozen=True)
class Drift:
    """The maximum mean discrepancy (MMD) of two samples, and its p-value.

    mmd: 0 if the distributions are equal, at most 1.4. p_value: the share of random divisions of both samples together
    that differ as much. sampled: images of each sample. typical: row numbers of the later sample, those first that are
    more frequent later than earlier.
    """

    mmd: float
    p_value: float
    sampled: tuple[int, int]
    typical: NDArray[np.int64]

    @property
    def is_significant(self) -> bool:
        return self.p_value <= SIGNIFICANT


def drift(earlier: Vectors, later: Vectors) -> Drift:
    """Compare two samples [n, dim] and [m, dim] of vectors of length 1 with a permutation test.

    The kernel is Gaussian, its width the median distance of the sampled vectors (Gretton et al., "A Kernel Two-Sample
    Test", JMLR 13, 2012). The images that most show a difference are those of the highest witness function.
    """
    both = np.concatenate([earlier, later]).astype(np.float32)
    squares = np.maximum(2 - 2 * both @ both.T, 0)
    kernel = np.exp(-squares / max(2 * _median(squares), 1e-12), dtype=np.float32)
    n, m = len(earlier), len(later)
    weights = np.concatenate([np.full(n, -1 / n), np.full(m, 1 / m)]).astype(np.float32)
    rng = np.random.default_rng(SEED)
    drawn = np.stack([weights, *(rng.permutation(weights) for _ in range(PERMUTATIONS))])
    statistics = np.einsum("pi,pi->p", drawn @ kernel, drawn, dtype=np.float64)
    as_large = int((statistics[1:] >= statistics[0] - 1e-9).sum())
    witness = kernel[n:] @ weights
    return Drift(
        mmd=float(np.sqrt(max(statistics[0], 0.0))),
        p_value=(1 + as_large) / (1 + PERMUTATIONS),
        sampled=(n, m),
        typical=np.argsort(-witness, kind="stable"),
    )


def _median(squares: NDArray[np.float32]) -> float:
    """Median of the squared distances of different vectors."""
    return float(np.median(squares[np.triu_indices(len(squares), 1)])) if len(squares) > 1 else 0.0
