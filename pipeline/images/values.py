"""From the numbers of a Raster to the pixels that a network takes: bands, range of values, pixels without data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.errors import DecodeError
from pipeline.geo.bands import FILLED, Band, are_named, match, with_fillers
from pipeline.images.pixels import RGB8, PixelFormat
from pipeline.images.raster import Raster

STRIP_VALUES = 1 << 20
"""Numbers are converted in strips of about this many, which bounds the memory."""
MAX_ALPHA_VALUES = 1 << 16
MAX_SOFT_SHARE, MAX_SOFT_VALUES = 0.5, 16
"""An alpha with a larger share of half-transparent pixels, and with more different values, is taken for a band."""


@dataclass(frozen=True, slots=True)
class Values:
    """How the numbers of a run are read.

    bands: numbers from 1, or names, of the bands that the network gets; () for all of them, which must then be as many
    as it takes. scale: the range of values that becomes 0 to 255; it applies to all numbers of more than 8 bits.
    nodata_fill: the value of pixels without data and of NaN; None for the middle of the scale.
    wanted: the bands of the network's input specification, in order; () without one. They are found by their names.
    subtract: a constant that a file's numbers contain; what it leaves below 0 becomes 0.
    """

    bands: tuple[str, ...] = ()
    scale: tuple[float, float] | None = None
    nodata_fill: float | None = None
    pixel_format: PixelFormat = RGB8
    wanted: tuple[Band, ...] = ()
    subtract: float = 0.0

    @property
    def is_default(self) -> bool:
        return self == DEFAULT

    @property
    def reads_all_bits(self) -> bool:
        """True if 16-bit pictures must be read with all their bits."""
        return self.scale is not None or self.pixel_format.dtype != "uint8"


DEFAULT = Values()


def select(raster: Raster, values: Values) -> list[int]:
    """The samples that become the network's bands, in order; one alone becomes all three of an RGB network.

    FILLED stands for a band that the file lacks. Raises DecodeError (unsupported).
    """
    wanted = values.pixel_format.bands
    if raster.colour in ("palette", "CMYK", "YCbCr"):
        return list(range({"palette": 1, "CMYK": 4, "YCbCr": 3}[raster.colour]))
    if values.bands and len(values.bands) == sum(band.filler is None for band in values.wanted) < wanted:
        found = [_band(name, raster.samples, raster.names, raster.description) for name in values.bands]
        return with_fillers(found, values.wanted)
    if values.wanted and not values.bands and has_names(raster):
        return match([(name,) for name in raster.names], values.wanted, raster.description)
    if values.wanted and not values.bands and raster.alpha is not None:
        raise DecodeError(
            "unsupported",
            f"{raster.description} marks band {raster.alpha + 1} as an alpha, which may be a band of a sensor; choose "
            f"the {wanted} bands of the input specification with --bands, as in "
            f"--bands {','.join(map(str, range(1, wanted + 1)))}",
        )
    if raster.samples == wanted and wanted != 3:
        default = list(range(raster.samples))
    else:
        default = raster.bands[:3] if raster.colour == "RGB" and wanted == 3 else raster.bands
    return _chosen(default, raster.samples, raster.names, values, raster.description)


def has_names(raster: Raster) -> bool:
    """Whether the file names its bands, and does not only count them."""
    return are_named(raster.names)


def pick(count: int, values: Values, description: str) -> list[int]:
    """The bands of a picture of colours that become the network's: `count` is 3, or 1 for a grey one.

    Raises DecodeError (unsupported).
    """
    bands = _chosen(list(range(count)), count, (), values, description)
    return bands * 3 if len(bands) == 1 and values.pixel_format == RGB8 else bands


def _chosen(default: list[int], samples: int, names: Sequence[str], values: Values, description: str) -> list[int]:
    """The samples of `--bands`, or the default; as many as the network takes, or one for all bands of RGB."""
    wanted = values.pixel_format.bands
    chosen = [_band(name, samples, names, description) for name in values.bands] or default
    if len(chosen) == wanted or (len(chosen) == 1 and values.pixel_format == RGB8):
        return chosen
    known = [name for name in names if name]
    named = f" (the file names them {', '.join(known[:20])})" if known else ""
    if samples >= wanted or values.pixel_format == RGB8:
        example = ",".join(map(str, range(1, wanted + 1))) if samples >= wanted else "1"
        remedy = f"choose them with --bands, as in --bands {example}"
    else:
        remedy = "use a network that takes as many"
    raise DecodeError(
        "unsupported",
        f"{description} gives {len(chosen)} bands{named}, and the network takes {wanted}; {remedy}",
    )


def _band(name: str, samples: int, names: Sequence[str], description: str) -> int:
    if name.isdecimal():
        number = int(name)
        if 1 <= number <= samples:
            return number - 1
        raise DecodeError("unsupported", f"{description} has no band {number}; --bands asks for it")
    if name in names:
        return list(names).index(name)
    alike = [sample for sample, other in enumerate(names) if Band((name,)).is_called(other)]
    if len(alike) == 1:
        return alike[0]
    known = ", ".join(each for each in names if each) or "none"
    raise DecodeError("unsupported", f"{description} has no band named {name!r} for --bands; its names: {known}")


# Numbers → 8 bits


def is_scaled(raster: Raster, values: Values) -> bool:
    """True if the range of values applies to this raster."""
    return values.scale is not None and not _has_known_range(raster)


def _has_known_range(raster: Raster) -> bool:
    return 0 < raster.bits <= 8 or (raster.colour in ("CMYK", "palette", "YCbCr") and raster.bits > 0)


def rgb_strips(
    raster: Raster, array: np.ndarray, alpha: np.ndarray | None, values: Values, multiple: int
) -> Iterator[tuple[int, Image.Image]]:
    """Yield strips (first row, image of 8 bits per sample) of the selected samples; their heights are multiples of
    `multiple`, except for the last."""
    to_8_bits = _to_8_bits(raster, array, values)
    if alpha is not None and alpha.max() == 0:
        alpha = None  # an alpha that hides every pixel was never meant
    if alpha is not None and raster.alpha_may_be_band and _looks_like_a_band(raster, alpha):
        raise DecodeError(
            "unsupported",
            f"{raster.description} marks its last band as an alpha, but its values are like those of a sensor; choose "
            "the bands with --bands, as in --bands 1,2,3",
        )
    for top, rows in row_strips(array, multiple):
        strip = to_8_bits(rows)
        opacity = None if alpha is None else _shift(raster, alpha[top : top + len(strip)])
        yield top, _image(raster, strip, opacity)


def _looks_like_a_band(raster: Raster, alpha: np.ndarray) -> bool:
    """Whether most values are neither opaque nor transparent, and there are many of them. Soft edges are few pixels."""
    opaque = (1 << raster.bits) - 1 if raster.bits else alpha.max()
    step = max(1, round((alpha.size / MAX_ALPHA_VALUES) ** 0.5))
    seen = alpha[::step, ::step]
    between = seen[(seen > 0) & (seen < opaque)]
    return between.size > seen.size * MAX_SOFT_SHARE and len(np.unique(between)) > MAX_SOFT_VALUES


def row_strips(array: np.ndarray, multiple: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cut [height, width, bands] into strips: (first row, rows)."""
    height, width, bands = array.shape
    rows = multiple * max(1, STRIP_VALUES // (width * bands * multiple))
    for top in range(0, height, rows):
        yield top, array[top : top + rows]


def _to_8_bits(raster: Raster, array: np.ndarray, values: Values) -> Callable[[np.ndarray], np.ndarray]:
    """The function that turns the raster's numbers into uint8. Raises DecodeError if their range is not known."""
    is_light = raster.colour != "white is zero"
    if _has_known_range(raster):
        convert = (lambda rows: _shift(raster, rows)) if raster.colour != "palette" else (lambda rows: rows)
    elif values.scale is not None:
        convert = _scaler(raster, values.scale, values.nodata_fill)
    elif raster.colour == "RGB" and 8 < raster.bits <= 16 and not (values.wanted or raster.is_georeferenced):
        convert = lambda rows: _shift(raster, rows)  # noqa: E731
    else:
        raise DecodeError("unsupported", f"{raster.description}: {_range(raster, array)}")
    return convert if is_light else lambda rows: 255 - convert(rows)


def _shift(raster: Raster, rows: np.ndarray) -> np.ndarray:
    """Unsigned integers of `bits` → uint8. The high byte of 16 bits is what Pillow takes."""
    if raster.bits == 8:
        return rows
    if raster.bits > 8:
        return (rows >> (raster.bits - 8)).astype(np.uint8)
    return (rows.astype(np.uint16) * 255 // ((1 << raster.bits) - 1)).astype(np.uint8)


def _scaler(raster: Raster, scale: tuple[float, float], fill: float | None) -> Callable[[np.ndarray], np.ndarray]:
    low, high = scale
    fill = (low + high) / 2 if fill is None else fill
    number = np.float32 if raster.dtype.itemsize <= 2 or raster.dtype == np.float32 else np.float64

    def convert(rows: np.ndarray) -> np.ndarray:
        missing = missing_values(rows, raster.nodata)
        with np.errstate(all="ignore"):  # infinity becomes an end of the range
            scaled = rows.astype(number)
            if missing is not None:
                scaled[missing] = fill
            np.subtract(scaled, number(low), out=scaled)
            np.multiply(scaled, number(255 / (high - low)), out=scaled)
        np.clip(scaled, 0, 255, out=scaled)
        rounded: np.ndarray = np.rint(scaled)
        return rounded.astype(np.uint8)

    return convert


def missing_values(rows: np.ndarray, nodata: float | None) -> np.ndarray | None:
    """True where there is no data: NaN, and the nodata value. None if there is no such place."""
    missing = np.isnan(rows) if rows.dtype.kind == "f" else None
    if nodata is not None and np.isfinite(nodata):
        with np.errstate(over="ignore"):
            stored = np.array(nodata).astype(rows.dtype)
        if rows.dtype.kind == "f" or float(stored) == nodata:
            equal = rows == stored
            missing = equal if missing is None else missing | equal
    return missing if missing is not None and missing.any() else None


def _range(raster: Raster, array: np.ndarray) -> str:
    """The sentence that shows the picture's own range of values, with the remedy."""
    lows, highs = [], []
    for _, rows in row_strips(array, 1):
        missing = missing_values(rows, raster.nodata)
        there = rows if missing is None else rows[~missing]
        there = there[np.isfinite(there)] if there.dtype.kind == "f" else there
        if there.size:
            lows.append(there.min())
            highs.append(there.max())
    own = f"its values go from {min(lows):g} to {max(highs):g}" if lows else "it holds no values"
    return (
        f"{own}, and nothing says which of them are black and white; set one range for the whole run, "
        "--scale MIN:MAX, or use a network that takes these numbers"
    )


def _image(raster: Raster, strip: np.ndarray, alpha: np.ndarray | None) -> Image.Image:
    """A Pillow image of uint8 [height, width, bands]."""
    if raster.colour == "palette":
        assert raster.palette is not None
        strip = raster.palette[strip[..., 0]]
    elif raster.colour in ("CMYK", "YCbCr"):
        image = Image.fromarray(np.ascontiguousarray(strip), raster.colour)
        if alpha is None:
            return image
        strip = np.asarray(image.convert("RGB"))
    strip = strip if alpha is None else np.concatenate([strip, alpha], axis=2)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[strip.shape[2]]
    if alpha is not None and raster.premultiplied:
        mode = {"LA": "La", "RGBA": "RGBa"}[mode]
    return Image.frombytes(mode, strip.shape[1::-1], np.ascontiguousarray(strip).tobytes())


# Numbers as they are, for networks of other formats than RGB


def native(raster: Raster, array: np.ndarray, values: Values) -> np.ndarray:
    """[height, width, bands] of the network's number type, which holds every number of the raster's type."""
    format = values.pixel_format
    if format.dtype == "uint8":
        to_8_bits = _to_8_bits(raster, array, values)
        eight = np.empty(array.shape, np.uint8)
        for top, rows in row_strips(array, 1):
            eight[top : top + len(rows)] = to_8_bits(rows)
        return eight
    if not (np.can_cast(raster.dtype, format.dtype) or (values.wanted and _fits(array, format.dtype))):
        raise DecodeError(
            "unsupported",
            f"{raster.description} does not fit without loss into the {format.dtype} that the network takes",
        )
    if raster.colour == "white is zero":
        if not raster.bits:
            raise DecodeError("unsupported", f"{raster.description}: white is zero, and these numbers have no black")
        array = ((1 << raster.bits) - 1 - array.astype(np.int64)).astype(raster.dtype)
    converted = array.astype(format.dtype)
    if values.subtract:
        converted = np.maximum(converted, np.array(values.subtract, format.dtype)) - np.array(
            values.subtract, format.dtype
        )
    if values.nodata_fill is not None:
        missing = missing_values(array, raster.nodata)
        if missing is not None:
            converted[missing] = values.nodata_fill
    return converted


def _fits(array: np.ndarray, dtype: str) -> bool:
    """Whether a type holds all these integers, or floats of more bits."""
    if array.dtype.kind == "f":
        return np.dtype(dtype).kind == "f"
    return bool(np.array_equal(array.astype(dtype).astype(np.float64), array.astype(np.float64)))


def filled(array: np.ndarray, samples: Sequence[int], wanted: Sequence[Band]) -> np.ndarray:
    """Insert the bands that a file lacks: [height, width, samples that it has] → [height, width, wanted]."""
    if FILLED not in samples:
        return array
    result = np.empty((*array.shape[:2], len(samples)), array.dtype)
    result[..., [place for place, sample in enumerate(samples) if sample != FILLED]] = array
    for place, band in enumerate(wanted):
        if samples[place] == FILLED:
            result[..., place] = band.filler
    return result
