"""Windows of raster scenes → the pixels that a network takes: range of values, pixels without data, size.

The bands are chosen by the source, which reads no others. A window that has another size than the network's is resized
as a whole, without a crop, so that its footprint is exactly what the network sees. With an input specification it is
resized and cropped as every image is, because that is how the weights were trained.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.errors import DecodeError
from pipeline.images.pixels import RGB8
from pipeline.images.raster import Raster
from pipeline.images.resize import resize_bands
from pipeline.images.transform import Transform
from pipeline.images.values import Values, missing_values, native


def to_pixels(numbers: np.ma.MaskedArray, transform: Transform, values: Values) -> np.ndarray:
    """Numbers [height, width, bands] → pixels [crop, crop, bands] of `values.pixel_format`.

    numbers: masked where there is no data. For RGB one band becomes three. No data becomes the network's
    mean, which is 0 after the normalization, or `values.nodata_fill`.
    Raises DecodeError (unsupported) for another number of bands, and for numbers whose range is not known.
    """
    missing = None if numbers.mask is np.ma.nomask else np.ma.getmaskarray(numbers)
    data = np.ma.getdata(numbers)
    raster = _raster(data, _wanted(data.shape[2], values))
    if missing is None and data.dtype.kind == "f":
        missing = missing_values(data, None)
    if missing is not None and not missing.all():
        data = np.where(missing, data[~missing].flat[0], data)  # a number in the range, for the message of a refusal
    pixels = native(raster, data, replace(values, nodata_fill=None))
    if missing is not None:
        fill = _fill(raster, transform, values)
        if values.pixel_format == RGB8 and len(fill) == 3 and pixels.shape[2] == 1:
            pixels, missing = pixels.repeat(3, axis=2), missing.repeat(3, axis=2)
        pixels = np.where(missing, np.asarray(fill, pixels.dtype), pixels)
    if values.pixel_format == RGB8 and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    if values.wanted:
        return resize_bands(pixels, transform)
    if pixels.shape[:2] == (transform.crop, transform.crop):
        return pixels
    return resize_bands(pixels, replace(transform, resize=transform.crop, squash=True))


def _wanted(bands: int, values: Values) -> int:
    """The number of bands. Raises DecodeError if the network takes another one."""
    wanted = values.pixel_format.bands
    if bands == wanted or (bands == 1 and values.pixel_format == RGB8):
        return bands
    example = ",".join(map(str, range(1, wanted + 1)))
    raise DecodeError(
        "unsupported",
        f"the scene gives {bands} bands, and the network takes {wanted}; choose them with --bands, as in "
        f"--bands {example}",
    )


def _raster(data: np.ndarray, bands: int) -> Raster:
    height, width, _ = data.shape
    bits = 8 * data.dtype.itemsize if data.dtype.kind == "u" else 0
    plural = "s" if bands != 1 else ""
    description = f"a window of {bands} band{plural} of {data.dtype}"
    return Raster(
        width=width,
        height=height,
        samples=bands,
        dtype=data.dtype,
        bits=bits,
        colour="grey",
        description=description,
        read=lambda samples: data[..., list(samples)],
    )


def _fill(raster: Raster, transform: Transform, values: Values) -> Sequence[float]:
    """The pixel value of no data, one for all bands or one per band."""
    is_8_bits = values.pixel_format.dtype == "uint8"
    if values.nodata_fill is None:
        if not is_8_bits or len(transform.mean) not in (1, values.pixel_format.bands):
            raise DecodeError(
                "unsupported",
                f"{raster.description} has pixels without data, and the network takes {values.pixel_format}, of which "
                "no mean is known; give the value that they get with --nodata-fill",
            )
        return [round(255 * mean) for mean in transform.mean]
    if is_8_bits and values.scale is not None and raster.bits != 8:
        low, high = values.scale
        return [round(255 * (values.nodata_fill - low) / (high - low))]
    return [min(max(round(values.nodata_fill), 0), 255)] if is_8_bits else [values.nodata_fill]
