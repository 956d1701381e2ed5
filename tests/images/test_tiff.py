"""TIFFs that Pillow misreads: every number type, layout and compression is read as tifffile wrote it, or refused."""

import io
import resource
import struct
import time
from pathlib import Path
from typing import Any

import images
import numpy as np
import pytest
import tifffile
from PIL import Image, TiffImagePlugin

from pipeline.errors import DecodeError
from pipeline.images import header, tiff
from pipeline.images.decode import TO_UPRIGHT, decode
from pipeline.images.pixels import PixelFormat
from pipeline.images.raster import Raster
from pipeline.images.transform import Transform
from pipeline.images.values import Values

FAULTS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "faults" / "images"
SAME = Transform(resize=48, crop=48)
"""Keeps a 48 × 48 image as it is."""
GEO = [(33550, "d", 3, (10.0, 10.0, 0.0), True), (33922, "d", 6, (0.0, 0.0, 0.0, 5e5, 5e6, 0.0), True)]
"""ModelPixelScale and ModelTiepoint."""


def numbers(dtype: str, *shape: int, seed: int = 0) -> np.ndarray:
    """All of the type's range, for integers."""
    random = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return (random.random(shape) * 200 - 100).astype(dtype)
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def written(array: np.ndarray, byteorder: str = "<", bigtiff: bool = False, **settings: Any) -> bytes:
    """A TIFF of one page of [height, width] or [height, width, bands], or of planes of it."""
    if settings.get("planarconfig") == "separate":
        array = np.moveaxis(array, 2, 0)
    elif array.ndim == 3:
        settings = {"planarconfig": "contig", **settings}
    buffer = io.BytesIO()
    settings = {"photometric": "minisblack", "metadata": None, **settings}
    with tifffile.TiffWriter(buffer, byteorder=byteorder, bigtiff=bigtiff) as file:  # type: ignore[arg-type]
        file.write(array, **settings)
    return buffer.getvalue()


def raster(data: bytes, max_pixels: int = 10**6) -> Raster:
    return tiff.open_raster(data, max_pixels, header.check_size)


def pixels(data: bytes, transform: Transform = SAME, exact: bool = True, **values: Any) -> np.ndarray:
    return decode(data, transform, exact=exact, values=Values(**values)).pixels


def error(data: bytes, **settings: Any) -> DecodeError:
    with pytest.raises(DecodeError) as caught:
        decode(data, SAME, **settings)
    return caught.value


DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"]
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "LZW": {"compression": "lzw"},
    "Deflate": {"compression": "zlib"},
    "Deflate, differences": {"compression": "zlib", "predictor": True},
    "Zstandard": {"compression": "zstd"},
    "LZMA": {"compression": "lzma"},
    "PackBits": {"compression": "packbits"},
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_type_is_read_as_it_was_written(dtype: str, compression: str) -> None:
    for byteorder in "<>":
        for layout in ({}, {"planarconfig": "separate"}, {"tile": (16, 32)}, {"rowsperstrip": 7}):
            array = numbers(dtype, 33, 49, 5)
            settings = COMPRESSIONS[compression] | layout
            if dtype in ("float16", "uint64", "int64") and "predictor" in settings:  # tifffile writes none
                continue
            opened = raster(written(array, byteorder, bigtiff=byteorder == ">", **settings))
            assert (opened.width, opened.height, opened.samples, opened.dtype) == (49, 33, 5, np.dtype(dtype))
            np.testing.assert_array_equal(opened.read(range(5)), array)
            np.testing.assert_array_equal(opened.read([3, 0, 3]), array[..., [3, 0, 3]])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("inner", [{}, {"compression": "deflate"}, {"compression": "zstd"}])
def test_lerc(dtype: str, inner: dict[str, str]) -> None:
    array = numbers(dtype, 40, 50) // 2
    settings = {"compression": "lerc", "compressionargs": inner} if inner else {"compression": "lerc"}
    np.testing.assert_array_equal(raster(written(array, **settings)).read([0])[..., 0], array)


@pytest.mark.parametrize("bits", [2, 4, 9, 10, 12, 14, 16, 24])
def test_packed_integers(bits: int) -> None:
    array = numbers("uint32", 20, 31) >> (32 - bits)
    array = array.astype("uint8" if bits <= 8 else "uint16" if bits <= 16 else "uint32")
    data = written(array, bitspersample=bits) if bits not in (16,) else written(array)
    opened = raster(data)
    assert opened.bits == bits
    np.testing.assert_array_equal(opened.read([0])[..., 0], array)


def test_webp_and_jpeg_2000_within_a_tiff() -> None:
    drawn = np.asarray(images.tile("urban", size=(48, 48)))
    lossless = written(drawn, photometric="rgb", compression="webp", compressionargs={"lossless": True})
    np.testing.assert_array_equal(pixels(lossless), drawn)
    array = numbers("uint16", 48, 48)
    data = written(array, compression="jpeg2000", compressionargs={"level": 0, "reversible": True}, tile=(48, 48))
    np.testing.assert_array_equal(raster(data).read([0])[..., 0], array)


def with_soft_edge(array: np.ndarray) -> np.ndarray:
    """Make the last band an alpha: transparent on the left, opaque on the right, with a soft edge."""
    largest = np.iinfo(array.dtype).max
    levels = np.linspace(-largest, 2 * largest, array.shape[1]).clip(0, largest).astype(array.dtype)
    return np.concatenate([array[..., :-1], np.broadcast_to(levels[:, None], (*array.shape[:2], 1))], axis=2)


def test_a_planar_twin_gives_the_pixels_of_the_interleaved_one() -> None:
    for dtype in ("uint8", "uint16"):
        for bands, settings in (
            (3, {}),
            (4, {"extrasamples": [2]}),
            (4, {"extrasamples": [0]}),
            (4, {"extrasamples": [1]}),
        ):
            array = with_soft_edge(numbers(dtype, 48, 48, bands)) if bands == 4 else numbers(dtype, 48, 48, bands)
            expected = np.asarray(over_white(Image.open(io.BytesIO(written(array, photometric="rgb", **settings)))))
            for byteorder in "<>":
                for layout in ({}, {"planarconfig": "separate"}, {"compression": "zlib", "tile": (16, 16)}):
                    data = written(array, byteorder, photometric="rgb", **settings, **layout)
                    np.testing.assert_array_equal(pixels(data), expected, f"{dtype} {settings} {layout}")


def over_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image).convert("RGB")


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("dtype", [each for each in DTYPES if each != "uint8"])
def test_one_band_is_scaled_by_one_range(dtype: str, byteorder: str) -> None:
    array = numbers("int8", 48, 48).astype(np.int16)
    array = (array.clip(0) if dtype.startswith("u") else array).astype(dtype)
    data = written(array, byteorder, compression="lzw")
    refused = error(data)
    assert refused.error_type == "unsupported"
    own = f"{float(array.min()):g} to {float(array.max()):g}"
    assert f"its values go from {own}" in refused.message
    assert "--scale MIN:MAX" in refused.message
    expected = np.rint((array.astype(np.float64) + 40).clip(0, 140) * (255 / 140))
    np.testing.assert_array_equal(pixels(data, scale=(-40.0, 100.0)), np.repeat(expected[..., None], 3, 2))


def test_one_odd_pixel_does_not_change_the_others() -> None:
    array = np.linspace(0, 1, 48 * 48, dtype=np.float32).reshape(48, 48)
    odd = array.copy()
    odd[0, 0], odd[0, 1], odd[0, 2] = 1.01, np.inf, -np.inf
    plain, changed = (pixels(written(each), scale=(0.0, 1.0)) for each in (array, odd))
    np.testing.assert_array_equal(plain[1:], changed[1:])
    assert changed[0, :3, 0].tolist() == [255, 255, 0]


@pytest.mark.parametrize(
    ("dtype", "nodata", "text"),
    [
        ("int16", -9999, "-9999"),
        ("float32", -3.4028234663852886e38, "-3.40282346638529e+38"),
        ("float32", np.nan, "nan"),
        ("uint16", 0, "0"),
        ("float64", 1e20, "1e20"),
    ],
)
def test_pixels_without_data_become_the_fill(dtype: str, nodata: float, text: str) -> None:
    array = np.full((48, 48), 1000, dtype)
    array[:8] = nodata
    data = written(array, extratags=[(42113, "s", 0, text, True)])
    assert (pixels(data, scale=(0.0, 1000.0))[:8] == 128).all()
    assert (pixels(data, scale=(0.0, 1000.0), nodata_fill=0.0)[:8] == 0).all()
    assert (pixels(data, scale=(0.0, 1000.0))[8:] == 255).all()
    assert "from 1000 to 1000" in error(data).message


@pytest.mark.parametrize(("dtype", "bits"), [("uint8", 8), ("uint16", 16), ("uint16", 12), ("uint8", 4)])
def test_white_is_zero(dtype: str, bits: int) -> None:
    array = numbers(dtype, 48, 48) >> (np.dtype(dtype).itemsize * 8 - bits)
    largest = 2**bits - 1
    data = written(array, photometric="miniswhite", bitspersample=bits if bits in (4, 12) else None)
    decoded = pixels(data, scale=(0.0, float(largest)))
    np.testing.assert_allclose(decoded[..., 0], 255 - array * (255.0 / largest), atol=0.51)
    network = pixels(data, pixel_format=PixelFormat("float32", 1))
    np.testing.assert_array_equal(network[..., 0], largest - array.astype(np.float32))


def test_white_is_zero_without_a_black_is_refused_for_other_networks() -> None:
    data = written(numbers("int16", 48, 48), photometric="miniswhite")
    refused = error(data, values=Values(pixel_format=PixelFormat("float32", 1)))
    assert "white is zero" in refused.message


# Bands


NAMES = '<GDALMetadata>' + "".join(
    f'<Item name="DESCRIPTION" sample="{i}" role="description">{name}</Item>'
    for i, name in enumerate(["B02", "B03 &amp; more", "B04", "B08"])
) + "</GDALMetadata>"  # fmt: skip


def test_bands_are_chosen_by_number_or_name() -> None:
    array = numbers("uint8", 48, 48, 4)
    for layout in ({}, {"planarconfig": "separate", "compression": "lzw"}):
        data = written(array, extratags=[(42112, "s", 0, NAMES, True)], **layout)
        refused = error(data)
        assert refused.error_type == "unsupported"
        for part in (
            "4 bands of 8-bit unsigned integer",
            "B02, B03 & more, B04, B08",
            "the network takes 3",
            "--bands 1,2,3",
        ):
            assert part in refused.message
        np.testing.assert_array_equal(pixels(data, bands=("3", "2", "1")), array[..., [2, 1, 0]])
        np.testing.assert_array_equal(pixels(data, bands=("B04", "B03 & more", "1")), array[..., [2, 1, 0]])
        np.testing.assert_array_equal(pixels(data, bands=("B08",)), array[..., [3, 3, 3]])
        four = pixels(data, pixel_format=PixelFormat("uint8", 4))
        np.testing.assert_array_equal(four, array)
        for wrong, message in (("5", "has no band 5"), ("B8A", "no band named 'B8A'.*B02, B03")):
            with pytest.raises(DecodeError, match=message):
                pixels(data, bands=("1", "2", wrong))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("bands", [2, 5, 13])
def test_other_numbers_of_bands_are_refused_by_name(dtype: str, bands: int) -> None:
    for settings in ({}, {"planarconfig": "separate"}):
        refused = error(written(numbers(dtype, 48, 48, bands), **settings))
        assert refused.error_type == "unsupported"
        assert f"{bands} bands of {np.dtype(dtype).itemsize * 8}-bit" in refused.message
        assert "--bands" in refused.message


def test_three_bands_without_a_colour_become_rgb() -> None:
    array = numbers("uint8", 48, 48, 3)
    np.testing.assert_array_equal(pixels(written(array)), array)
    deep = numbers("uint16", 48, 48, 3)
    assert "--scale" in error(written(deep)).message
    np.testing.assert_array_equal(pixels(written(deep), scale=(0.0, 65535.0)), np.rint(deep / 257))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_the_fourth_band_of_a_georeferenced_tiff_is_no_alpha(dtype: str) -> None:
    array = numbers(dtype, 48, 48, 4)
    eight = array[..., :3] if dtype == "uint8" else (array[..., :3] >> 8).astype(np.uint8)
    for tags in (GEO, [(34735, "H", 4, (1, 1, 0, 0), True)], [(42113, "s", 0, "0", True)]):
        data = written(array, photometric="rgb", extrasamples=[2], extratags=tags)
        if dtype == "uint16":
            assert "set one range for the whole run, --scale MIN:MAX" in error(data).message
            np.testing.assert_array_equal(pixels(data, scale=(0.0, 65535.0)), np.rint(array[..., :3] / 257))
        else:
            np.testing.assert_array_equal(pixels(data), eight)
    plain = written(array, photometric="rgb", extrasamples=[2])
    assert "marks its last band as an alpha, but its values are like those of a sensor" in error(plain).message
    if dtype == "uint8":
        np.testing.assert_array_equal(pixels(plain, bands=("1", "2", "3")), eight)
        np.testing.assert_array_equal(pixels(plain, bands=("4", "2", "3")), array[..., [3, 1, 2]])
    plain = written(with_soft_edge(array), photometric="rgb", extrasamples=[2])
    np.testing.assert_array_equal(pixels(plain), np.asarray(over_white(Image.open(io.BytesIO(plain)))))


@pytest.mark.parametrize("kind", [1, 2])
def test_grey_and_alpha_planar(kind: int) -> None:
    array = numbers("uint8", 48, 48, 2)
    expected = pixels(written(array, extrasamples=[kind]))
    np.testing.assert_array_equal(pixels(written(array, extrasamples=[kind], planarconfig="separate")), expected)
    assert expected.std() > 10
    array[..., 1] = 0
    hidden = written(array, extrasamples=[kind], planarconfig="separate")
    np.testing.assert_array_equal(pixels(hidden)[..., 1], array[..., 0])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("planarconfig", ["contig", "separate"])
def test_cmyk(dtype: str, planarconfig: str) -> None:
    array = numbers(dtype, 48, 48, 4)
    expected = Image.frombytes("CMYK", (48, 48), (array >> (8 if dtype == "uint16" else 0)).astype(np.uint8).tobytes())
    data = written(array, photometric="separated", planarconfig=planarconfig)
    np.testing.assert_array_equal(pixels(data), np.asarray(expected.convert("RGB")))


def test_a_palette_of_16_bits() -> None:
    array, colours = numbers("uint16", 48, 48), numbers("uint16", 3, 1 << 16)
    data = written(array, photometric="palette", colormap=colours)
    np.testing.assert_array_equal(pixels(data), (colours.T[array] >> 8).astype(np.uint8))


# Pages


def test_a_thumbnail_or_a_mask_before_the_image_is_passed_over() -> None:
    array = numbers("uint8", 48, 48)
    for kind in (1, 4, 5):
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer) as file:
            small, photometric = (
                (numbers("uint8", 12, 12), "minisblack") if kind == 1 else (np.ones((12, 12), bool), "mask")
            )
            file.write(small, subfiletype=kind, photometric=photometric, metadata=None)
            file.write(array, photometric="minisblack", metadata=None)
        decoded = decode(buffer.getvalue(), SAME)
        assert (decoded.width, decoded.height) == (48, 48)
        np.testing.assert_array_equal(decoded.pixels[..., 0], array)


def test_the_image_may_lie_below_a_thumbnail() -> None:
    array, buffer = numbers("uint16", 48, 48, 3), io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(numbers("uint8", 12, 12, 3), subfiletype=1, photometric="rgb", subifds=1, metadata=None)
        file.write(array, photometric="rgb", metadata=None)
    np.testing.assert_array_equal(pixels(buffer.getvalue()), (array >> 8).astype(np.uint8))


def test_a_page_alone_is_the_image_even_if_it_says_thumbnail() -> None:
    array = numbers("uint8", 48, 48)
    np.testing.assert_array_equal(pixels(written(array, subfiletype=1))[..., 0], array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    array = numbers("uint16", 30, 48, 3)
    eight = (array >> 8).astype(np.uint8)
    data = written(array, photometric="rgb", planarconfig="separate", extratags=[(274, "H", 1, orientation, True)])
    shown = Image.fromarray(eight)
    upright = shown.transpose(TO_UPRIGHT[orientation]) if orientation > 1 else shown
    transform = Transform(30, 30)
    decoded = decode(data, transform)
    assert (decoded.width, decoded.height) == (48, 30), "as stored"
    plain = images.encode(upright, "PNG")
    np.testing.assert_array_equal(decoded.pixels, decode(plain, transform).pixels)
    as_stored = decode(data, transform, exif_rotate=False).pixels
    np.testing.assert_array_equal(as_stored, decode(images.encode(shown, "PNG"), transform).pixels)
    bands = pixels(data, transform, pixel_format=PixelFormat("uint16", 3))
    np.testing.assert_allclose(bands >> 8, decoded.pixels, atol=1)


# Networks of other formats


@pytest.mark.parametrize(
    ("stored", "network"),
    [("uint8", "uint16"), ("uint8", "float32"), ("uint16", "uint16"), ("uint16", "float32"), ("int16", "float32"),
     ("int8", "float32"), ("float16", "float32"), ("float32", "float32")],
)  # fmt: skip
def test_bands_reach_a_network_as_they_are(stored: str, network: str) -> None:
    array = numbers(stored, 48, 48, 13)
    decoded = pixels(written(array, compression="lzw"), pixel_format=PixelFormat(network, 13))
    assert decoded.dtype == network
    np.testing.assert_array_equal(decoded, array.astype(network))


@pytest.mark.parametrize(
    ("stored", "network"), [("uint32", "float32"), ("float64", "float32"), ("int16", "uint16"), ("float32", "uint16")]
)
def test_bands_that_would_lose_something_are_refused(stored: str, network: str) -> None:
    refused = error(written(numbers(stored, 48, 48, 2)), values=Values(pixel_format=PixelFormat(network, 2)))
    assert refused.error_type == "unsupported"
    assert f"does not fit without loss into the {network}" in refused.message


def test_bands_of_8_bits_are_scaled_for_a_network_of_13_bands() -> None:
    array = numbers("uint16", 48, 48, 13)
    decoded = pixels(written(array), pixel_format=PixelFormat("uint8", 13), scale=(0.0, 65535.0))
    np.testing.assert_array_equal(decoded, np.rint(array / 257))


def test_the_remedy_for_a_wrong_number_of_bands_works() -> None:
    thirteen = Values(pixel_format=PixelFormat("uint8", 13))
    data = {bands: written(numbers("uint8", 48, 48, bands)) for bands in (2, 14)}
    remedies = {
        ("RGB", 2): "choose them with --bands, as in --bands 1",
        ("13", 2): "use a network that takes as many",
        ("13", 14): "choose them with --bands, as in --bands 1,2,3,4,5,6,7,8,9,10,11,12,13",
    }
    for (network, bands), remedy in remedies.items():
        refused = error(data[bands], values=thirteen if network == "13" else Values())
        assert refused.message.endswith(remedy)
    jpeg = io.BytesIO()
    Image.new("RGB", (48, 48)).save(jpeg, "JPEG")
    assert error(jpeg.getvalue(), values=thirteen).message.endswith("takes 13; use a network that takes as many")


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(131, 97), (30, 70), (20, 20)])
def test_bands_are_resized_as_an_image_is(size: tuple[int, int], interpolation: str) -> None:
    drawn = np.asarray(images.tile("urban", size=size))
    transform = Transform(40, 36, interpolation=interpolation)
    expected = decode(images.encode(Image.fromarray(drawn), "PNG"), transform).pixels
    for dtype, factor in (("uint8", 1), ("uint16", 257), ("float32", 1)):
        bands = np.concatenate([drawn, drawn[..., :1]], axis=2).astype(dtype) * np.dtype(dtype).type(factor)
        decoded = pixels(written(bands), transform, pixel_format=PixelFormat(dtype, 4))
        assert decoded.shape == (36, 36, 4)
        np.testing.assert_array_equal(decoded[..., 0], decoded[..., 3])
        limit = 255 * factor  # float32 keeps what the cubic filters overshoot
        difference = np.abs(decoded[..., :3].astype(float).clip(0, limit) / factor - expected)
        assert difference.max() <= (2 if interpolation != "nearest" else 255)
        assert difference.mean() < (0.5 if interpolation != "nearest" else 3)


# What Pillow reads right


def proven() -> dict[str, bytes]:
    grey, rgb = numbers("uint8", 48, 48), np.asarray(images.tile("urban", size=(48, 48)))
    shown = Image.fromarray(rgb)
    return {
        "grey": written(grey),
        "grey, white is zero": written(grey, photometric="miniswhite"),
        "grey of 2 bits": written(grey >> 6, bitspersample=2),
        "grey of 4 bits, white is zero": written(grey >> 4, bitspersample=4, photometric="miniswhite"),
        "one bit": images.encode(shown.convert("1"), "TIFF"),
        "one bit, Group 4": images.encode(shown.convert("1"), "TIFF", compression="group4"),
        "one bit, Group 3": images.encode(shown.convert("1"), "TIFF", compression="group3"),
        "RGB": written(rgb, photometric="rgb"),
        "RGB, tiles": written(rgb, photometric="rgb", tile=(16, 16), compression="zlib", predictor=True),
        "RGB, big-endian LZW": written(rgb, ">", photometric="rgb", compression="lzw"),
        "RGB, PackBits": written(rgb, photometric="rgb", compression="packbits"),
        "palette": images.encode(shown.quantize(200), "TIFF"),
        "palette of 4 bits": images.encode(shown.quantize(16), "TIFF", bits=4),
        "CMYK": images.encode(shown.convert("CMYK"), "TIFF"),
        "YCbCr": images.encode(shown.convert("YCbCr"), "TIFF"),
        "JPEG": images.encode(shown, "TIFF", compression="jpeg", quality=90),
        "grey JPEG": images.encode(shown.convert("L"), "TIFF", compression="jpeg", quality=90),
    }


@pytest.mark.parametrize("kind", proven())
def test_pillow_reads_the_short_list_as_tifffile_does(kind: str) -> None:
    data = proven()[kind]
    image = header.open_image(data)
    assert isinstance(image, TiffImagePlugin.TiffImageFile)
    assert not tiff.needs_tifffile(image, as_rgb=True)
    expected = pixels(data)
    np.testing.assert_array_equal(expected, np.asarray(over_white(Image.open(io.BytesIO(data)))))
    force = pytest.MonkeyPatch()
    force.setattr(tiff, "needs_tifffile", lambda image, as_rgb: True)
    try:
        difference = np.abs(pixels(data).astype(int) - expected)
    finally:
        force.undo()
    assert difference.max() <= (3 if "JPEG" in kind else 0)


@pytest.mark.parametrize("byteorder", "<>")
def test_bigtiffs_are_not_truncated(byteorder: str) -> None:
    array = numbers("uint8", 48, 48, 3)
    data = written(array, byteorder, bigtiff=True, photometric="rgb")
    np.testing.assert_array_equal(pixels(data), array)
    assert not header.is_truncated(data)
    assert error(data[:-2000]).error_type == "truncated"
    assert error(data[:20]).error_type == "truncated"


# Refused by name


def test_kinds_that_nothing_reads_are_refused_by_name() -> None:
    array = numbers("uint8", 48, 48, 3)
    cfa = written(array[..., 0], photometric="cfa")
    volume = written(numbers("uint8", 16, 48, 48), volumetric=True, tile=(16, 16, 16))
    for data, part in (
        (cfa, "1 band of 8-bit unsigned integer (CFA, interleaved, strips, uncompressed)"),
        (volume, "it is a volume"),
        (written(numbers("float32", 48, 48) + 0j), "complex"),
        (written(array, photometric="rgb", compression="png"), "PNG"),
    ):
        refused = error(data)
        assert refused.error_type == "unsupported"
        assert part in refused.message
        assert "convert it" in refused.message


def subsampled_ycbcr() -> bytes:
    """Uncompressed YCbCr with one chroma sample for 2 × 2 pixels (TIFF 6.0, section 21)."""
    tags = {256: 48, 257: 48, 258: 8, 259: 1, 262: 6, 273: 200, 277: 3, 278: 48, 279: 48 * 48 * 3 // 2}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    entries.append(struct.pack("<HHIHH", 530, 3, 2, 2, 2))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return (b"II*\0\x08\0\0\0" + directory).ljust(200, b"\0") + bytes(48 * 48 * 3 // 2)


def test_subsampled_chroma_without_jpeg_is_refused() -> None:
    refused = error(subsampled_ycbcr())
    assert refused.error_type == "unsupported"
    assert "chroma is subsampled" in refused.message


@pytest.mark.parametrize(
    ("tag", "name"),
    [(262, "PhotometricInterpretation"), (273, "StripOffsets"), (256, "ImageWidth"), (279, "StripByteCounts")],
)
def test_a_missing_tag_is_named(tag: int, name: str) -> None:
    data = bytearray(written(numbers("uint16", 48, 48), compression="lzw"))
    start = int.from_bytes(data[4:8], "little")
    for entry in range(start + 2, start + 2 + 12 * int.from_bytes(data[start : start + 2], "little"), 12):
        if int.from_bytes(data[entry : entry + 2], "little") == tag:
            data[entry : entry + 2] = (60_000).to_bytes(2, "little")  # a private tag
    refused = error(bytes(data))
    assert refused.error_type == "unsupported"
    assert f"no tag {name}" in refused.message


# Limits


def test_damage_is_told_from_truncation() -> None:
    data = written(numbers("uint16", 48, 48), compression="zlib", rowsperstrip=16)
    assert error(data[:-300]).error_type == "truncated"
    page = tifffile.TiffFile(io.BytesIO(data)).pages[0]
    start = page.dataoffsets[1]  # type: ignore[union-attr]
    damaged = data[:start] + bytes(200) + data[start + 200 :]
    assert error(damaged).error_type == "corrupt"


def test_a_sparse_tile_holds_nodata() -> None:
    array = np.full((48, 48), 7, np.int16)
    data = bytearray(written(array, tile=(16, 16), compression="zlib", extratags=[(42113, "s", 0, "-5", True)]))
    page = tifffile.TiffFile(io.BytesIO(bytes(data))).pages[0]
    for tag in (324, 325):  # the first tile: no place and no bytes
        place = page.tags[tag].valueoffset  # type: ignore[union-attr]
        data[place : place + {3: 2, 4: 4}[int(page.tags[tag].dtype)]] = bytes({3: 2, 4: 4}[int(page.tags[tag].dtype)])  # type: ignore[union-attr]
    values = raster(bytes(data)).read([0])[..., 0]
    assert (values[:16, :16] == -5).all()
    assert (values[16:] == 7).all()


@pytest.mark.parametrize("codec", ["jpeg", "webp", "jpeg2000", "lerc"])
def test_a_tile_must_not_unpack_to_more_than_it_holds(codec: str) -> None:
    """Exchange the data of the only strip for an image of 3000 × 3000."""
    dtype = "uint16" if codec in ("lerc", "jpeg2000") else "uint8"
    settings: dict[str, Any] = {"compression": codec}
    if dtype == "uint8":
        settings |= {"photometric": "rgb", "planarconfig": "contig", "extratags": [(274, "H", 1, 1, True)]}
    shape = (16, 16, 3) if dtype == "uint8" else (16, 16)
    bomb_shape = (3000, 3000, 3) if dtype == "uint8" else (3000, 3000)
    small = written(np.zeros(shape, dtype), **settings)
    large = written(np.zeros(bomb_shape, dtype), rowsperstrip=3000, **settings)
    small_page, large_page = (tifffile.TiffFile(io.BytesIO(data)).pages[0] for data in (small, large))
    inside = large[large_page.dataoffsets[0] :][: large_page.databytecounts[0]]  # type: ignore[union-attr]
    bomb = bytearray(small) + inside
    for tag, value in ((273, len(small)), (279, len(inside))):
        found = small_page.tags[tag]  # type: ignore[union-attr]
        width = {3: 2, 4: 4}[int(found.dtype)]
        bomb[found.valueoffset : found.valueoffset + width] = value.to_bytes(width, "little")
    with pytest.raises(DecodeError, match="9000000 pixels; it must have at most") as caught:
        raster(bytes(bomb)).read(range(1 if len(shape) == 2 else 3))
    assert caught.value.error_type == "corrupt"


def test_work_is_limited() -> None:
    tall = written(np.zeros((3000, 1), np.uint16), tile=(16, 4096), compression="zlib")
    assert "pixels; the limit is" in error(tall, max_pixels=10**6).message
    many = written(np.zeros((100, 100, 60), np.uint16), compression="zlib")
    refused = error(many, max_pixels=10_000, values=Values(bands=("1",)))
    assert refused.error_type == "too_large"
    assert "--max-pixels" in refused.message
    assert decode(many, SAME, max_pixels=100_000, values=Values(bands=("1",), scale=(0.0, 1.0))).width == 100


def test_only_the_bands_that_are_asked_for_take_memory() -> None:
    data = written(np.zeros((1500, 1500, 40), np.uint8), planarconfig="separate", compression="zlib")
    reserved: list[int] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    class Reserved:
        def __init__(self, size: int) -> None:
            reserved.append(size)

        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            pass

    decode(data, SAME, reserve=Reserved, values=Values(bands=("7", "2", "30")))  # type: ignore[arg-type]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert grown < reserved[0] < 1500 * 1500 * 40


def test_every_strip_is_decoded_once_however_often_it_is_listed() -> None:
    started = time.monotonic()
    data = written(np.zeros((1000, 1000), np.uint16), compression="zlib", rowsperstrip=1)
    assert decode(data, SAME, values=Values(scale=(0.0, 1.0))).width == 1000
    assert time.monotonic() - started < 30


# The files of the trial


@pytest.mark.parametrize(
    ("name", "twin", "scale"),
    [
        ("01_planar_rgb16_uncompressed", "01ok_pixel_rgb16", None),
        ("04_bigendian_float32_lzw", "04ok_littleendian_float32_lzw", (0.0, 1.0)),
        ("21_3band_uint16_minisblack", "06ok_planar_3band_uint8_lzw", (0.0, 65535.0)),
    ],
)
def test_the_twins_of_the_trial(name: str, twin: str, scale: tuple[float, float] | None) -> None:
    if not FAULTS.is_dir():
        pytest.skip(f"no files in {FAULTS}")
    first, second = (pixels((FAULTS / f"{each}.tif").read_bytes(), scale=scale).astype(int) for each in (name, twin))
    assert np.abs(first - second).max() <= 1


def test_every_tiff_of_the_trial_is_read_as_tifffile_reads_it() -> None:
    if not FAULTS.is_dir():
        pytest.skip(f"no files in {FAULTS}")
    for path in sorted(FAULTS.glob("*.tif")):
        expected = tifffile.imread(path)
        if expected.ndim == 3 and tifffile.TiffFile(path).pages[0].planarconfig == 2:  # type: ignore[union-attr]
            expected = np.moveaxis(expected, 0, 2)
        opened = raster(path.read_bytes())
        np.testing.assert_array_equal(opened.read(range(opened.samples)).reshape(expected.shape), expected, path.name)


def raw_tiff(strips: list[bytes], counts: list[int] | None = None, **more: Any) -> bytes:
    """A TIFF of 48 × 48 pixels, whose tags are written as they are given. counts: of bytes; those of the strips."""
    kinds = {"B": 1, "H": 3, "I": 4}
    tags: dict[int, tuple[str, list[int]]] = {
        256: ("H", [48]), 257: ("H", [48]), 259: ("H", [1]), 273: ("I", [0] * len(strips)),
        279: ("I", counts or [len(strip) for strip in strips]),
    }  # fmt: skip
    tags |= {int(name[1:]): ("H", values) for name, values in more.items()}
    place = 8 + 2 + 12 * len(tags) + 4
    for number, strip in enumerate(strips):
        tags[273][1][number] = place
        place += len(strip)
    entries, extra = b"", b""
    for tag, (form, values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{form}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack("<I", place + len(extra)), extra + packed
        entries += struct.pack("<HHI", tag, kinds[form], len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + b"".join(strips) + extra


DRAWN = np.asarray(images.tile("urban", size=(48, 48)))


@pytest.mark.parametrize("number", ["uint8", "uint16"])
@pytest.mark.parametrize("is_planar", [True, False])
def test_strips_with_bytes_after_their_pixels(number: str, is_planar: bool) -> None:
    stored = DRAWN.astype(number) * (257 if number == "uint16" else 1)
    rows = 20
    planes = [stored[..., [band]] for band in range(3)] if is_planar else [stored]
    strips = [plane[top : top + rows].tobytes() + bytes(6) for plane in planes for top in range(0, 48, rows)]
    bits = [8 * stored.dtype.itemsize] * 3
    data = raw_tiff(strips, t258=bits, t262=[2], t277=[3], t278=[rows], t284=[2 if is_planar else 1])
    np.testing.assert_array_equal(pixels(data), DRAWN)


def test_strips_whose_sizes_are_missing() -> None:
    stored = DRAWN.astype("uint16") * 257
    shape = {"t258": [16] * 3, "t262": [2], "t277": [3], "t278": [24]}
    strips = [stored[:24].tobytes(), stored[24:].tobytes()]
    np.testing.assert_array_equal(pixels(raw_tiff(strips, [0, 0], **shape)), DRAWN)
    packed = error(raw_tiff(strips, [0, 0], **shape | {"t259": [8]}))
    assert packed.error_type == "corrupt"
    assert "says that strip or tile 0 has no bytes" in packed.message


@pytest.mark.parametrize("kind", ["palette", "CMYK", "YCbCr"])
def test_an_alpha_beside_other_colours_than_rgb(kind: str) -> None:
    opacity = np.repeat(np.arange(48, dtype=np.uint8)[:, None, None] * 5, 48, axis=1)
    random = np.random.default_rng(0)
    more: dict[str, list[int]] = {}
    if kind == "palette":
        palette = random.integers(0, 256, (256, 3), np.uint8)
        stored = random.integers(0, 256, (48, 48, 1), np.uint8)
        more, rgb = {"t320": (palette.T.ravel().astype(int) * 257).tolist()}, palette[stored[..., 0]]
    else:
        stored = random.integers(0, 256, (48, 48, 4 if kind == "CMYK" else 3), np.uint8)
        more = {"t530": [1, 1]} if kind == "YCbCr" else {}
        rgb = np.asarray(Image.fromarray(stored, kind).convert("RGB"))
    data = raw_tiff(
        [np.concatenate([stored, opacity], axis=2).tobytes()],
        **{"t258": [8] * (stored.shape[2] + 1), "t277": [stored.shape[2] + 1], "t278": [48], "t338": [2]},
        t262=[{"palette": 3, "CMYK": 5, "YCbCr": 6}[kind]], **more,
    )  # fmt: skip
    white = Image.new("RGBA", (48, 48), "white")
    rgba = Image.fromarray(np.concatenate([rgb, opacity], axis=2))
    np.testing.assert_allclose(pixels(data), np.asarray(Image.alpha_composite(white, rgba).convert("RGB")), atol=1)


@pytest.mark.parametrize("factor", [1, 256, 257])
def test_a_colour_map_of_8_bits(factor: int) -> None:
    random = np.random.default_rng(0)
    palette, stored = random.integers(0, 256, (256, 3)), random.integers(0, 256, (48, 48), np.uint8)
    colours = (palette.T.ravel() * factor).tolist()
    data = raw_tiff([stored.tobytes()], t258=[8], t262=[3], t277=[1], t278=[48], t320=colours)
    np.testing.assert_array_equal(pixels(data), palette[stored])
