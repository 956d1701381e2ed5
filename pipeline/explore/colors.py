"""Colours of classes that people with a colour vision deficiency can tell apart."""

import colorsys
from collections.abc import Sequence

Color = tuple[int, int, int]

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
"""Okabe and Ito, Color Universal Design (2008), without black."""
TOL_MUTED = ("#332288", "#882255", "#44AA99", "#999933", "#AA4499", "#DDCC77", "#CC6677")
"""Paul Tol, Colour Schemes (2021), "muted", without its blue and green, which are near to those above."""
GOLDEN_ANGLE = 0.618033988749895


def _rgb(code: str) -> Color:
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:7], 16)


PALETTE: tuple[Color, ...] = tuple(map(_rgb, OKABE_ITO + TOL_MUTED))


def class_colors(by_frequency: Sequence[int]) -> dict[int, Color]:
    """The colour of each label_id.

    If all of them are smaller than the palette, a label_id has the same colour in every map. Otherwise the most
    frequent classes get the palette's colours. Further classes get other hues, which not everybody can tell apart.
    """
    is_small = max(by_frequency, default=0) < len(PALETTE)
    return {label: _color(label if is_small else rank) for rank, label in enumerate(by_frequency)}


def _color(number: int) -> Color:
    if number < len(PALETTE):
        return PALETTE[number]
    red, green, blue = colorsys.hsv_to_rgb(
        number * GOLDEN_ANGLE % 1, 0.45 + 0.2 * (number % 3), 0.95 - 0.15 * (number % 4)
    )
    return round(red * 255), round(green * 255), round(blue * 255)
