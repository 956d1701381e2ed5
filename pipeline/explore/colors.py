"""Colours of classes: those of a file, or some that people with a colour vision deficiency can tell apart."""

import colorsys
import csv
import io
from collections.abc import Mapping, Sequence

from PIL import ImageColor

from pipeline.errors import SettingRefused, message_line
from pipeline.storage import access, uris

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


MAX_SHOWN = 5


def read_colors(uri: str) -> dict[str, Color]:
    """Class → colour, from a CSV file with the columns label and color: `#RRGGBB` or a colour name of CSS.

    Raises SettingRefused.
    """
    flag = f"--colors {uris.redact(uri)}"
    try:
        reader = csv.DictReader(io.StringIO(access.read(uris.normalize(uri)).decode("utf-8-sig")))
        rows = [(reader.line_num, row.get("label"), row.get("color")) for row in reader]
    except FileNotFoundError as error:
        raise SettingRefused(f"{flag} does not exist") from error
    except (OSError, ValueError, csv.Error) as error:
        raise SettingRefused(f"{flag} cannot be read: {message_line(error)}") from error
    colors: dict[str, Color] = {}
    for line, label, color in rows:
        if not label or not color:
            raise SettingRefused(f"{flag}: line {line} has no label or no color; the first line must be label,color")
        if label in colors:
            raise SettingRefused(f"{flag}: line {line} gives {label} a second color")
        colors[label] = _parsed(color, f"{flag}: line {line}")
    return colors


def _parsed(color: str, where: str) -> Color:
    try:
        red, green, blue, *alpha = ImageColor.getrgb(color.strip())
    except ValueError:
        alpha = [0]
    if alpha:
        raise SettingRefused(f"{where}: {color!r} must be #RRGGBB or a colour name of CSS, such as steelblue")
    return red, green, blue


def chosen_colors(names: Mapping[int, str], given: Mapping[str, Color]) -> dict[int, Color]:
    """The given colour of each label_id. Raises SettingRefused if a class has none."""
    if missing := sorted(name for name in names.values() if name not in given):
        shown = ", ".join(missing[:MAX_SHOWN]) + (", …" if len(missing) > MAX_SHOWN else "")
        raise SettingRefused(f"--colors has no color for {len(missing)} classes of the map; add a line for: {shown}")
    return {label: given[name] for label, name in names.items()}
