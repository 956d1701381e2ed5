"""Vectors as int8 with one scale each: a quarter of the bytes of float32."""

import torch
from torch import Tensor

LARGEST = 127


def to_int8(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """float [N, dim] → int8 [N, dim] and float32 scales [N]: vector ≈ int8 · scale, within half a scale.

    Symmetric: the largest magnitude of a vector becomes 127. So inner products and cosines of the int8 vectors are
    those of the vectors, but for one factor. The scale of a vector with NaN or infinity is not finite.
    """
    vectors = vectors.float()
    scales = vectors.abs().amax(1) / LARGEST
    divisors = scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return (vectors / divisors).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales
