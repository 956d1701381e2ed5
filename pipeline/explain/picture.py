"""The picture of an explanation: the pixels that the network saw, and where it found its evidence."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pipeline.errors import printable

SIDE_INCHES = 3.2
DPI = 150
MAX_OPACITY = 0.65
STRETCH = (2.0, 98.0)
MAX_TEXT = 112
MAX_TITLE = 60
INK, GREY = "#222222", "#555555"


def draw(
    path: Path,
    pixels: NDArray[np.number],
    saliency: NDArray[np.float32],
    title: str,
    lines: tuple[str, ...],
    bands: tuple[int, ...] = (0, 1, 2),
) -> None:
    """Write a PNG: the picture at the left, and at the right the saliency over it.

    pixels: [crop, crop, bands]. saliency: [crop, crop] from 0 to 1. lines: below the title. bands: those that are shown
    as red, green and blue.
    """
    figure = Figure(figsize=(2 * SIDE_INCHES + 0.45, SIDE_INCHES + 0.35 + 0.2 * (len(lines) + 1)), dpi=DPI)
    picture = shown(pixels, bands)
    height = SIDE_INCHES / float(figure.get_size_inches()[1])
    width = SIDE_INCHES / float(figure.get_size_inches()[0])
    left, right = (figure.add_axes((x, 0.03, width, height)) for x in (0.02, 0.98 - width))
    _show(left, picture)
    _show(right, over(picture, saliency))
    figure.text(
        0.02, 0.985, _short(title, MAX_TITLE), fontsize=11, fontweight="bold", color=INK, va="top", parse_math=False
    )
    for number, line in enumerate(lines):
        y = 0.985 - (0.24 + 0.18 * number) / float(figure.get_size_inches()[1])
        figure.text(0.02, y, _short(line), fontsize=7.5, color=GREY, va="top", parse_math=False)
    figure.savefig(path, format="png")


def shown(pixels: NDArray[np.number], bands: tuple[int, ...] = (0, 1, 2)) -> NDArray[np.float32]:
    """Float [H, W, 3] from 0 to 1. Numbers other than 8-bit RGB are stretched between two percentiles of each band."""
    chosen = pixels[..., list(bands[: pixels.shape[2]])] if pixels.shape[2] >= 3 else pixels[..., [0, 0, 0]]
    if chosen.dtype == np.uint8 and pixels.shape[2] == 3:
        return np.asarray(chosen / 255, np.float32)
    numbers = chosen.astype(np.float64)
    low, high = np.nanpercentile(numbers, STRETCH, axis=(0, 1))
    return np.asarray(np.nan_to_num((numbers - low) / np.maximum(high - low, 1e-12)).clip(0, 1), np.float32)


def over(picture: NDArray[np.float32], saliency: NDArray[np.float32]) -> NDArray[np.float32]:
    """The saliency in colour over a grey copy of the picture; places without evidence stay grey."""
    grey = (picture @ np.array([0.299, 0.587, 0.114], np.float32))[..., None].repeat(3, 2)
    opacity = MAX_OPACITY * saliency[..., None]
    return np.asarray(grey * (1 - opacity) + colormaps["inferno"](saliency)[..., :3] * opacity, np.float32)


def _show(axes: Axes, picture: NDArray[np.float32]) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()


def _short(text: str, length: int = MAX_TEXT) -> str:
    """One line of printable text, without its middle if it is long."""
    line = printable(text)
    return line if len(line) <= length else f"{line[: length // 3]}…{line[-(2 * length // 3) :]}"
