"""Pixels of every number type, number of bands and shape come out of a table as they went in."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline import schema
from pipeline.errors import DecodeError, SettingRefused
from pipeline.images.pixels import DTYPES, RGB8, Decoded, Encoded, Images, PixelFormat, PixelTable, to_columns
from pipeline.images.transform import Transform

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(7, 5), (5, 7), (1, 9), (6, 6)]


def image(dtype: str, bands: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    numbers = np.random.default_rng(seed).random((*size, bands)) * 60_000
    return (numbers - 500 * (dtype == "float32")).astype(dtype)


def table(images: list[Decoded | Encoded | None]) -> pa.Table:
    sizes = {name: [each and getattr(each, name) for each in images] for name in ("width", "height")}
    return pa.table({**to_columns(images), **sizes})


def decoded(pixels: np.ndarray) -> Decoded:
    return Decoded(pixels, pixels.shape[1], pixels.shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bands", [1, 3, 13])
@pytest.mark.parametrize("size", SHAPES)
def test_images_come_out_as_they_went_in(dtype: str, bands: int, size: tuple[int, int]) -> None:
    arrays = [image(dtype, bands, size, seed) for seed in range(5)]
    rows = table([None, *map(decoded, arrays), None])
    assert set(schema.PIXEL_FIELDS.names) <= set(rows.column_names)
    ((places, group),) = PixelTable(rows).groups()
    assert places.tolist() == [1, 2, 3, 4, 5]
    assert (group.dtype, group.shape) == (np.dtype(dtype), (5, *size, bands))
    assert np.array_equal(group, np.stack(arrays))


def test_each_type_and_shape_is_a_group() -> None:
    """Images of equal size in bytes: 2 × 3 × 1 of uint16, 2 × 2 × 3 and 4 × 1 × 3 of uint8, 3 × 1 × 1 of float32."""
    arrays = [
        image("uint16", 1, (2, 3)),
        image("uint8", 3, (2, 2)),
        image("uint8", 3, (4, 1)),
        image("uint8", 3, (2, 2), 1),
        image("float32", 1, (3, 1)),
    ]
    assert {array.nbytes for array in arrays} == {12}
    rows = table([*map(decoded, arrays), None])
    groups = {int(places[0]): (places.tolist(), group) for places, group in PixelTable(rows).groups()}
    assert sorted(places for places, _ in groups.values()) == [[0], [1, 3], [2], [4]]
    for places, group in groups.values():
        for place, pixels in zip(places, group, strict=True):
            assert pixels.dtype == arrays[place].dtype
            assert np.array_equal(pixels, arrays[place])


def test_unaligned_pixels_are_copied() -> None:
    odd = image("uint8", 1, (1, 3))
    wide = [image("uint16", 3, (3, 5), seed) for seed in range(2)]
    rows = table([decoded(odd), decoded(wide[0]), decoded(odd), decoded(wide[1])])
    groups = {group.dtype.name: group for _, group in PixelTable(rows).groups()}
    assert np.array_equal(groups["uint16"], np.stack(wide))
    assert groups["uint16"].flags.aligned


def test_neighbours_are_not_copied() -> None:
    rows = table([decoded(image("uint8", 3, (4, 4), seed)) for seed in range(3)])
    ((_, group),) = PixelTable(rows).groups()
    memory = np.frombuffer(rows[schema.PIXELS].chunk(0).buffers()[2], np.uint8)
    assert np.shares_memory(group, memory)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_slices_and_chunks_of_a_table(first: int) -> None:
    arrays = [image("uint16", 3, (4, 6), seed) for seed in range(4)]
    half = table(list(map(decoded, arrays[:2])))
    both = pa.concat_tables([half, table([None, *map(decoded, arrays[2:])])]).slice(first)
    groups = list(PixelTable(both).groups())
    assert np.array_equal(np.concatenate([group for _, group in groups]), np.stack(arrays[first:]))


def test_a_transposed_view_is_stored_in_its_own_order() -> None:
    turned = image("uint16", 3, (4, 6)).transpose(1, 0, 2)
    assert not turned.flags.c_contiguous
    ((_, group),) = PixelTable(table([decoded(turned)])).groups()
    assert np.array_equal(group[0], turned)


def test_jpegs_stay_as_they_are_stored() -> None:
    encoded = [Encoded(b"one", 10, 20, 6), Encoded(b"another", 30, 40, 1)]
    rows = table([encoded[0], decoded(image("uint8", 3, (2, 2))), None, encoded[1]])
    pixels = PixelTable(rows)
    assert (pixels.encoded.tolist(), pixels.decoded.tolist()) == ([0, 3], [1])
    assert [(bytes(j.data), j.width, j.height, j.orientation) for j in pixels.jpegs()] == [
        (b"one", 10, 20, 6),
        (b"another", 30, 40, 1),
    ]


def test_no_image_at_all() -> None:
    assert list(PixelTable(table([None, None])).groups()) == []


def test_a_batch_is_cut_across_its_groups() -> None:
    images = Images([np.arange(3), np.arange(10, 12), np.arange(20, 25)])
    assert len(images) == 10
    assert [group.tolist() for group in images[2:6].groups] == [[2], [10, 11], [20]]
    assert images[2:6].joined(np.concatenate).tolist() == [2, 10, 11, 20]


def test_a_format_says_how_large_an_image_is() -> None:
    transform = Transform(resize=10, crop=8)
    assert RGB8.image_bytes(transform) == 8 * 8 * 3
    assert PixelFormat("uint16", 13).image_bytes(transform) == 8 * 8 * 13 * 2
    assert PixelFormat("float32", 1).shape(transform) == (8, 8, 1)
    assert PixelFormat("float32", 1).max_batch_size(transform) == ((1 << 31) - 1) // (8 * 8 * 4)


@pytest.mark.parametrize(("dtype", "bands"), [("int8", 3), ("float64", 3), ("uint8", 0)])
def test_other_formats_are_refused(dtype: str, bands: int) -> None:
    with pytest.raises(SettingRefused, match=f"{bands} × {dtype}"):
        PixelFormat(dtype, bands)


@pytest.mark.parametrize("pixels", [image("uint8", 4, (2, 2)), image("uint16", 3, (2, 2)), np.zeros((2, 2), np.uint8)])
def test_pixels_of_another_format_are_an_error(pixels: np.ndarray) -> None:
    with pytest.raises(DecodeError, match=r"the image is \w+ \[2, 2") as raised:
        RGB8.check(pixels)
    assert raised.value.error_type == "unsupported"


def test_one_module_alone_knows_how_pixels_are_stored() -> None:
    names = [name for name in schema.PIXEL_FIELDS.names if name not in (schema.PIXELS, schema.ORIENTATION)]
    users = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pipeline").rglob("*.py")
        if any(name in path.read_text() for name in names)
    }
    assert users == {"pipeline/schema.py", "pipeline/images/pixels.py"}
