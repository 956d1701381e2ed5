"""InputSpec: the bands and numbers that a network was trained on, from a YAML file. Imports no torch.

The shipped files are in `input_specs/`; each names its source. A file of your own has the same keys:

    sensor: Sentinel-2                  # for people, as are product, source and weights
    bands: [B1, B2, B3]                 # in the order of the network's first convolution
    aliases: {B2: [blue]}               # other names in files; B02 and b2 are B2
    pixels: float32                     # or uint8, for 8-bit pictures and for --scale
    offset: 0                           # input = ((number - offset) / divisor, clipped, - mean) / std;
    divisor: 10000                      # one number, or one for each band
    clip: [0, 1]                        # after the divisor; absent by default
    mean: 0
    std: 1
    size: 256                           # of the resize; 0 keeps the image's own size
    squash: false                       # true: resize both sides to `size`; false: the short side
    crop: 224
    interpolation: bilinear             # nearest, bilinear, bicubic, lanczos; with antialiasing
    missing: {B10: 0}                   # bands that files may lack, and the number to use instead
    nodata: 0                           # the number to use for pixels without data
    expected: [0, 1]                    # where most numbers lie, after the divisor
    harmonize: true                     # Sentinel-2: the numbers must not contain the offset of baseline 04.00
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.errors import SettingRefused
from pipeline.geo.bands import Band
from pipeline.images.pixels import PixelFormat
from pipeline.images.transform import Transform
from pipeline.models.overrides import INTERPOLATIONS, MAX_SIDE
from pipeline.storage import access, strict_yaml, uris

FOLDER = Path(__file__).with_name("input_specs")
SUFFIXES = (".yaml", ".yml")
NUMBER_TYPES = ("float32", "uint8")
MAX_FLOAT32 = float(np.finfo(np.float32).max)
MIN_DIVISOR = 1e-30
"""Of divisor and std. Smaller ones are no numbers in float32, or make infinity of others."""
TEXTS = ("sensor", "product", "source", "weights")
KEYS = (
    *TEXTS,
    *("bands", "aliases", "pixels", "offset", "divisor", "clip", "mean", "std", "size", "squash", "crop"),
    *("interpolation", "missing", "nodata", "expected", "harmonize"),
)


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What a network takes: its bands in order, and how stored numbers become its input.

    input = (clip((number - offset) / divisor) - mean) / std, in float32; these have one value for each band. clip: None
    without one. pixels: number type between decoding and the network. nodata: number for pixels without data.
    expected: (low, high) after the divisor. harmonize: Sentinel-2's offset must not be in the numbers.
    sensor, product, source, weights: for people.
    """

    name: str
    sensor: str
    product: str
    source: tuple[str, ...]
    weights: tuple[str, ...]
    bands: tuple[Band, ...]
    pixels: str
    offset: tuple[float, ...]
    divisor: tuple[float, ...]
    clip: tuple[float, float] | None
    transform: Transform
    nodata: float
    expected: tuple[float, float] | None
    harmonize: bool

    @property
    def pixel_format(self) -> PixelFormat:
        return PixelFormat(self.pixels, len(self.bands))

    @property
    def band_names(self) -> tuple[str, ...]:
        return tuple(band.names[0] for band in self.bands)

    def scaled(self, numbers: np.ndarray) -> np.ndarray:
        """float64 [..., bands]: after the divisor, before the clip."""
        result: np.ndarray = (numbers.astype(np.float64) - self.offset) / self.divisor
        return result

    def settings(self) -> dict[str, Any]:
        """Everything that changes results, as JSON, except for the transform."""
        return {
            "bands": [list(band.names) for band in self.bands],
            "missing": {band.names[0]: band.filler for band in self.bands if band.filler is not None},
            "pixels": self.pixels,
            "offset": list(self.offset),
            "divisor": list(self.divisor),
            "clip": self.clip and list(self.clip),
            "nodata": self.nodata,
            "harmonize": self.harmonize,
        }


def shipped() -> list[str]:
    """Names of the shipped specifications."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def shown(name: str) -> str:
    """A shipped specification's name, or the URI of a file, without credentials: it holds in other folders too."""
    return uris.redact(uris.normalize(name)) if _is_file(name) else name


def _is_file(name: str) -> bool:
    return uris.redact(name).lower().endswith(SUFFIXES)


def load(name: str) -> InputSpec:
    """Load a shipped specification by name, or a file by path or URI. Raises SettingRefused."""
    is_file = _is_file(name)
    if not is_file and name not in shipped():
        close = difflib.get_close_matches(name, shipped(), 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SettingRefused(
            f"--input-spec {name!r} is unknown: {hint}choose {', '.join(shipped())}, or a file that ends in .yaml"
        )
    shown = uris.redact(name) if is_file else name
    try:
        text = access.read(uris.normalize(name)) if is_file else (FOLDER / f"{name}.yaml").read_bytes()
        content = strict_yaml.load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise SettingRefused(f"--input-spec {shown} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SettingRefused(f"--input-spec {shown} must have one key per line, such as `bands: [B4, B3, B2]`")
    return _Reader(shown, content).spec()


class _Reader:
    """The content of a file, checked. Raises SettingRefused with the file, the key, the value and the remedy."""

    def __init__(self, file: str, content: Mapping[Any, Any]) -> None:
        self.file, self.content = file, content
        for key in content:
            if key not in KEYS:
                close = difflib.get_close_matches(str(key), KEYS, 1)
                raise self._refused(f"has the unknown key {key!r}" + (f"; did you mean {close[0]}?" if close else ""))

    def spec(self) -> InputSpec:
        names = self._names()
        pixels = self._choice("pixels", "float32", NUMBER_TYPES)
        bands = self._bands(names)
        if pixels == "uint8" and any(band.filler is not None for band in bands):
            raise self._refused("has `missing` with pixels: uint8; use pixels: float32")
        clip = self._pair("clip")
        nodata = self._numbers("nodata", 0.0, 1)[0]
        if pixels == "uint8" and nodata not in range(256):
            raise self._refused(f"has nodata {nodata:g} with pixels: uint8; it must be a whole number from 0 to 255")
        return InputSpec(
            name=self.file,
            sensor=self._text("sensor"),
            product=self._text("product"),
            source=self._list_of_text("source"),
            weights=self._list_of_text("weights"),
            bands=bands,
            pixels=pixels,
            offset=self._numbers("offset", 0.0, len(names)),
            divisor=self._numbers("divisor", 1.0, len(names), above=MIN_DIVISOR),
            clip=clip,
            transform=self._transform(len(names)),
            nodata=nodata,
            expected=self._pair("expected"),
            harmonize=self._boolean("harmonize"),
        )

    def _refused(self, fault: str) -> SettingRefused:
        return SettingRefused(f"--input-spec {self.file} {fault}")

    def _names(self) -> list[str]:
        names = self.content.get("bands")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
            raise self._refused(f"has bands {names!r}: it must be a list of names, as in bands: [B4, B3, B2]")
        return names

    def _bands(self, names: list[str]) -> tuple[Band, ...]:
        aliases, missing = self._mapping("aliases", names), self._mapping("missing", names)
        bands = []
        for name in names:
            more = aliases.get(name, [])
            if not isinstance(more, list) or not all(isinstance(alias, str) for alias in more):
                raise self._refused(f"has aliases {more!r} of {name}: they must be a list of names")
            filler = missing.get(name)
            if filler is not None and not _is_number(filler):
                raise self._refused(f"has {filler!r} for the missing band {name}: it must be a number")
            bands.append(Band((name, *more), None if filler is None else float(filler)))
        for place, band in enumerate(bands):
            for other in bands[:place]:
                if twice := next((name for name in band.names if other.is_called(name)), None):
                    raise self._refused(f"names two bands {twice}: each name must belong to one band")
        return tuple(bands)

    def _mapping(self, key: str, names: list[str]) -> dict[str, Any]:
        value = self.content.get(key) or {}
        unknown = [name for name in value if name not in names] if isinstance(value, dict) else [value]
        if unknown:
            raise self._refused(f"has {unknown[0]!r} in {key}: it must be one of the bands {', '.join(names)}")
        return dict(value)

    def _transform(self, count: int) -> Transform:
        resize, crop = self._side("size", 0), self._side("crop", None)
        if resize and crop > resize:
            raise self._refused(f"has crop {crop}, which is larger than size {resize}")
        interpolation = self._choice("interpolation", "bilinear", INTERPOLATIONS)
        mean = self._numbers("mean", 0.0, count)
        std = self._numbers("std", 1.0, count, above=MIN_DIVISOR)
        return Transform(resize, crop, interpolation, mean, std, self._boolean("squash"))

    def _side(self, key: str, default: int | None) -> int:
        value, lowest = self.content.get(key, default), 0 if default == 0 else 1
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= MAX_SIDE:
            raise self._refused(f"has {key} {value!r}: it must be a number of pixels from {lowest} to {MAX_SIDE}")
        return value

    def _numbers(self, key: str, default: float, count: int, above: float = -math.inf) -> tuple[float, ...]:
        value = self.content.get(key, default)
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count or not all(_is_number(each) and each > above for each in values):
            bound = " greater than 0" if above > -math.inf else ""
            many = f", or {count} of them, one for each band" if count > 1 else ""
            raise self._refused(f"has {key} {value!r}: it must be one number{bound}{many}")
        return tuple(map(float, values))

    def _pair(self, key: str) -> tuple[float, float] | None:
        value = self.content.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(map(_is_number, value)) or value[0] >= value[1]:
            raise self._refused(f"has {key} {value!r}: it must be two numbers, the lower one first, as in [0, 1]")
        return float(value[0]), float(value[1])

    def _choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.content.get(key, default)
        if value not in choices:
            raise self._refused(f"has {key} {value!r}: it must be one of {', '.join(choices)}")
        return str(value)

    def _boolean(self, key: str) -> bool:
        value = self.content.get(key, False)
        if not isinstance(value, bool):
            raise self._refused(f"has {key} {value!r}: it must be true or false")
        return value

    def _text(self, key: str) -> str:
        return str(self.content.get(key, ""))

    def _list_of_text(self, key: str) -> tuple[str, ...]:
        value = self.content.get(key) or []
        return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def _is_number(value: Any) -> bool:
    """Whether a value is a number that float32, in which the network computes, can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FLOAT32
