"""3 × 3 convolutions in bfloat16 on a CPU, with 16 multiplications where 36 are usual: Winograd's F(2 × 2, 3 × 3).

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (https://arxiv.org/abs/1509.09308): patches of 4 × 4
pixels and the filters are both taken to where one product each makes 2 × 2 pixels of the output. Those products are
matrix products over channels, torch's own. Numba compiles the way there and back for this CPU and keeps it on disk.
"""

import weakref
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

FILTERS_TRANSFORM = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))

PATCHES_AT_ONCE = 800
"""What lies between the three steps stays in the caches so; with fewer, starting each step takes longer than that
saves (two cores of an EPYC, 64 to 256 channels)."""


def compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)


class Filters:
    """A convolution's filters and bias, transformed."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: bfloat16 [outputs, inputs, 3, 3]. bias: [outputs] or None."""
        transform = torch.tensor(FILTERS_TRANSFORM)
        products = torch.einsum("ij,oIjk,lk->ilIo", transform, weight.float(), transform)
        self.weight = products.flatten(0, 1).to(torch.bfloat16)
        self.bias = np.zeros(len(weight), np.float32) if bias is None else bias.float().numpy()
        self.key = id(self)
        ALIVE[self.key] = self


ALIVE: weakref.WeakValueDictionary[int, Filters] = weakref.WeakValueDictionary()
"""Filters by their key: what torch.compile can hand on to an operator are tensors and numbers."""


def convolve(x: Tensor, beside: Tensor | None, key: int, outputs: int, relu: bool) -> Tensor:
    """bfloat16 [N, inputs, H, W] → [N, outputs, H, W], channels last, zeros around it; with what is beside added, then
    the ReLU.

    key: of its Filters. Raises ValueError where what is beside is not like the output.
    """
    filters = ALIVE[key]
    images, inputs, height, width = x.shape
    found = _blank(x, beside, key, outputs, relu)
    if beside is not None and (beside.shape != found.shape or beside.dtype != found.dtype):
        raise ValueError(f"{beside.dtype} {list(beside.shape)} beside {found.dtype} {list(found.shape)}")
    pixels, summands, to = _lines(x), None if beside is None else _lines(beside), _lines(found)
    across = (width + 1) // 2
    lines, together = images * ((height + 1) // 2), max(1, PATCHES_AT_ONCE // across)
    for first in range(0, lines, together):
        patches = x.new_empty(16, min(together, lines - first) * across, inputs)
        _patches(pixels, first, _bits(patches))
        products = torch.bmm(patches, filters.weight)
        _outputs(_bits(products), filters.bias, summands, relu, first, to)
    return found


def _blank(x: Tensor, beside: Tensor | None, key: int, outputs: int, relu: bool) -> Tensor:
    images, _, height, width = x.shape
    return x.new_empty(images, height, width, outputs).permute(0, 3, 1, 2)


# torch.library.custom_op would import torch's compiler in every process, which takes a second.
LIBRARY: Any = torch.library.Library("nightshift", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define("winograd(Tensor x, Tensor? beside, int key, int outputs, bool relu) -> Tensor")
LIBRARY.impl("winograd", convolve, "CPU")
torch.library.register_fake("nightshift::winograd", _blank, lib=LIBRARY)


def _lines(x: Tensor) -> np.ndarray:
    """[N, C, H, W] → uint16 [N, H, W · C]; no copy where its channels are last."""
    return _bits(x.permute(0, 2, 3, 1).flatten(2).contiguous())


def _bits(x: Tensor) -> np.ndarray:
    """bfloat16 as uint16: NumPy has none."""
    found: np.ndarray = x.view(torch.uint16).numpy()
    return found


@compiled
def _wide(bits: Any) -> Any:
    """A bfloat16's bits → float32."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@compiled
def _narrow(number: Any) -> Any:
    """float32 → the nearest bfloat16's bits, the even one of two."""
    bits = np.float32(number).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


# Each innermost loop writes one array and reads few, along what lies together in memory: so LLVM makes it SIMD.


@compiled
def _patches(x: np.ndarray, first: int, out: np.ndarray) -> None:
    """The 4 × 4 patches, two pixels apart, of some lines of them, transformed.

    x: [N, H, W · C]. first: number of the first line, counted through all images. out: [16, lines · W / 2, C].
    """
    _, height, values = x.shape
    _, patches, channels = out.shape
    down, across = (height + 1) // 2, (values // channels + 1) // 2
    outside = np.zeros(values, np.uint16)
    rows = np.zeros((4, (2 * across + 2) * channels), np.float32)
    for line in range(patches // across):
        image, y = (first + line) // down, 2 * ((first + line) % down)
        a = x[image, y - 1] if y > 0 else outside
        b = x[image, y]
        c = x[image, y + 1] if y + 1 < height else outside
        d = x[image, y + 2] if y + 2 < height else outside
        row = rows[0, channels : channels + values]
        for i in range(values):
            row[i] = _wide(a[i]) - _wide(c[i])
        row = rows[1, channels : channels + values]
        for i in range(values):
            row[i] = _wide(b[i]) + _wide(c[i])
        row = rows[2, channels : channels + values]
        for i in range(values):
            row[i] = _wide(c[i]) - _wide(b[i])
        row = rows[3, channels : channels + values]
        for i in range(values):
            row[i] = _wide(b[i]) - _wide(d[i])
        for number in range(4):
            for column in range(across):
                patch, start = line * across + column, 2 * column * channels
                e = rows[number, start : start + channels]
                f = rows[number, start + channels : start + 2 * channels]
                g = rows[number, start + 2 * channels : start + 3 * channels]
                h = rows[number, start + 3 * channels : start + 4 * channels]
                to = out[4 * number, patch]
                for i in range(channels):
                    to[i] = _narrow(e[i] - g[i])
                to = out[4 * number + 1, patch]
                for i in range(channels):
                    to[i] = _narrow(f[i] + g[i])
                to = out[4 * number + 2, patch]
                for i in range(channels):
                    to[i] = _narrow(g[i] - f[i])
                to = out[4 * number + 3, patch]
                for i in range(channels):
                    to[i] = _narrow(f[i] - h[i])


@compiled
def _outputs(products: np.ndarray, bias: np.ndarray, beside: Any, relu: bool, first: int, out: np.ndarray) -> None:
    """What the products of some lines of patches make of the output, with the bias, what is beside, and the ReLU.

    products: [16, lines · W / 2, C]. beside: as out, or None. first: as in `_patches`. out: [N, H, W · C].
    """
    _, height, values = out.shape
    _, patches, channels = products.shape
    width = values // channels
    down, across = (height + 1) // 2, (width + 1) // 2
    lowest = np.float32(0) if relu else np.float32(-np.inf)
    rows = np.empty((2, 4, channels), np.float32)
    sums = np.empty(channels, np.float32)
    for patch in range(patches):
        line, x = first + patch // across, 2 * (patch % across)
        image, y = line // down, 2 * (line % down)
        for column in range(4):
            a, b = products[column, patch], products[4 + column, patch]
            c, d = products[8 + column, patch], products[12 + column, patch]
            to = rows[0, column]
            for i in range(channels):
                to[i] = _wide(a[i]) + _wide(b[i]) + _wide(c[i])
            to = rows[1, column]
            for i in range(channels):
                to[i] = _wide(b[i]) - _wide(c[i]) - _wide(d[i])
        for row in range(min(2, height - y)):
            for column in range(min(2, width - x)):
                e, f, g, h = rows[row, 0], rows[row, 1], rows[row, 2], rows[row, 3]
                if column == 0:
                    for i in range(channels):
                        sums[i] = e[i] + f[i] + g[i] + bias[i]
                else:
                    for i in range(channels):
                        sums[i] = f[i] - g[i] - h[i] + bias[i]
                place = slice((x + column) * channels, (x + column + 1) * channels)
                if beside is not None:
                    summands = beside[image, y + row, place]
                    for i in range(channels):
                        sums[i] += _wide(summands[i])
                pixel = out[image, y + row, place]
                for i in range(channels):
                    pixel[i] = _narrow(max(sums[i], lowest))
