"""Folders of tiles, given as a template: `…/{z}/{x}/{y}.png`. `{-y}` counts from the south, as TMS does."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import InputRefused
from pipeline.geo.tiles import Selection, flip, is_tile
from pipeline.planning.listing import Misfit
from pipeline.sources import is_image
from pipeline.storage import access, uris
from pipeline.storage.base import ObjectInfo

MAX_DIGITS_OF_ZOOM = 4
WEB = ("http://", "https://")
_FIELD = re.compile(r"(\{-?[zxy]\})")
_GROUPS = {
    "{z}": rf"(?P<z>[0-9]{{1,{MAX_DIGITS_OF_ZOOM}}})",
    "{x}": r"(?P<x>[0-9]{1,20})",
    "{y}": r"(?P<y>[0-9]{1,20})",
    "{-y}": r"(?P<tms>[0-9]{1,20})",
}
"""Numbers may have zeros in front."""


@dataclass(frozen=True, slots=True)
class TileImage(ObjectInfo):
    """A loose image that is a tile. tile: z, x and y in the XYZ scheme."""

    tile: tuple[int, int, int]


def is_template(name: str) -> bool:
    """True for an input with the fields of a template, unless a local file has this name.

    Raises InputRefused if a field is missing or repeated, or if the tiles cannot be listed.
    """
    fields = _FIELD.findall(name)
    if not fields or (uris.is_local(name) and os.path.exists(name)):
        return False
    if sorted(fields) not in (["{x}", "{y}", "{z}"], ["{-y}", "{x}", "{z}"]):
        raise InputRefused(f"--input {name}: a template of tiles has {{z}}, {{x}} and {{y}} (or {{-y}}) once each")
    if not is_image(name):
        raise InputRefused(f"--input {name}: a template of tiles ends as an image does, as in {{z}}/{{x}}/{{y}}.png")
    if uris.is_glob(name):
        raise InputRefused(f"--input {name}: a template of tiles has no * ? [: write {{a,b}} for several names")
    if name.startswith(WEB):
        raise InputRefused(
            f"--input {name}: a web server does not list its tiles; give a bucket, a folder or a .pmtiles file"
        )
    return True


def list_tiles(template: str, selection: Selection) -> Iterator[TileImage | Misfit]:
    """The selected tiles of a template, and files that do not fit it, sorted by URI.

    Raises FileNotFoundError, and InputRefused for no valid tile, and for numbers that are written in two ways, so that
    two files could be one tile.
    """
    parts = _FIELD.split(template)
    pattern = re.compile("".join(_GROUPS.get(part) or re.escape(part) for part in parts))
    digits = _Digits(template)
    for folder in _folders(parts, selection):
        for info in access.list_objects(folder):
            if match := pattern.fullmatch(info.uri):
                tile = _tile(match, template)
                digits.add(tile[0], match)
                if selection.contains(*tile):
                    yield TileImage(info.uri, info.size_bytes, info.etag, tile)
            else:
                yield Misfit(info.uri, info.size_bytes, info.etag)


def _folders(parts: list[str], selection: Selection) -> Iterator[str]:
    """The folders to list, sorted: those of the selected zooms if the template begins with `{z}/`."""
    folder, _, rest = parts[0].rpartition("/")
    if rest or parts[1] != "{z}" or not parts[2].startswith("/") or selection.selects_all_zooms:
        yield folder
        return
    zooms = {
        form
        for z in range(selection.min_zoom, selection.max_zoom + 1)
        for form in (str(z).zfill(digits) for digits in range(1, MAX_DIGITS_OF_ZOOM + 1))
    }
    for z in sorted(zooms, key=lambda z: f"{z}/"):
        if not uris.is_local(folder) or os.path.isdir(f"{folder}/{z}"):
            yield f"{folder}/{z}"


class _Digits:
    """How the numbers of a zoom are written: either none has zeros in front, or all have as many digits."""

    def __init__(self, template: str) -> None:
        self.template = template
        self.forms: dict[tuple[int, str], tuple[int, bool]] = {}
        """Zoom and field → digits of all numbers so far (0 if they differ), and whether one has zeros in front."""

    def add(self, z: int, match: re.Match[str]) -> None:
        """Raises InputRefused."""
        for name, text in match.groupdict().items():
            length, is_padded = self.forms.get((z, name), (len(text), False))
            length = length if length == len(text) else 0
            is_padded |= text[0] == "0" and len(text) > 1
            if not length and is_padded:
                raise InputRefused(
                    f"--input {self.template}: {match.string} has the number {text}, and other tiles of zoom {z} write "
                    "such numbers with fewer or more zeros in front, so two files could be one tile; rename or move "
                    "one kind of them"
                )
            self.forms[z, name] = length, is_padded


def _tile(match: re.Match[str], template: str) -> tuple[int, int, int]:
    fields = {name: int(text) for name, text in match.groupdict().items()}
    z, x = fields["z"], fields["x"]
    y = fields["y"] if "y" in fields else flip(z, fields["tms"])
    if not is_tile(z, x, y):
        raise InputRefused(
            f"--input {template}: {match.string} is no tile, at zoom {z} x and y end at {(1 << z) - 1}; is the order "
            "of the fields right?"
        )
    return z, x, y
