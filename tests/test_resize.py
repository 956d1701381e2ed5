"""resize: the quick way against the exact one, over filters and shapes, and without its package."""

import images
import numpy as np
import pytest
from PIL import Image

from pipeline import resize
from pipeline.config import Transform

SIZES = [(131, 97), (97, 131), (500, 375), (640, 48), (48, 640), (20, 31), (64, 64), (1, 1), (1300, 900)]


def both(pixels: np.ndarray, transform: Transform) -> tuple[np.ndarray, np.ndarray]:
    height, width, _ = pixels.shape
    box, full = (0.0, 0.0, float(width), float(height)), (width, height)
    quick = resize.quickly(pixels, box, full, transform)
    return quick.astype(int), resize.exactly(Image.fromarray(pixels), box, full, transform).astype(int)


def drawn(size: tuple[int, int]) -> np.ndarray:
    return np.asarray(images.tile("urban", size=size))


@pytest.mark.parametrize("interpolation", sorted(resize.FILTERS))
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("sides", [(48, 40), (40, 48), (64, 64)])
@pytest.mark.parametrize("size", SIZES)
def test_quick_pixels_are_the_exact_ones_within_rounding(
    size: tuple[int, int], sides: tuple[int, int], squash: bool, interpolation: str
) -> None:
    quick, exact = both(drawn(size), Transform(*sides, interpolation=interpolation, squash=squash))
    assert quick.shape == exact.shape == (sides[1], sides[1], 3)
    if interpolation != "nearest":  # it may take the neighbour where only the crop is resized
        assert np.abs(quick - exact).max() <= 3


def test_it_is_the_simd_code_that_was_tried() -> None:
    if resize.simd is None:
        pytest.skip("cykooz-resizer has no build for this machine")
    quick, exact = both(drawn((500, 375)), Transform())
    assert 0 < (quick != exact).mean() < 0.4


def test_without_the_package_pillow_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "simd", None)
    quick, exact = both(drawn((300, 300)), Transform(96, 96))
    np.testing.assert_array_equal(quick, exact)


def test_a_large_part_is_left_to_pillow() -> None:
    quick, exact = both(drawn((3000, 900)), Transform(64, 64, squash=True))
    np.testing.assert_array_equal(quick, exact)


def test_what_does_not_count_is_not_shown() -> None:
    """The last columns of an image made smaller may stand for fewer pixels: `shown` ends between two pixels."""
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[:, :50] = 200
    found = resize.quickly(pixels, (0.0, 0.0, 49.5, 49.5), (99, 99), Transform(32, 32))
    assert (found[:, :30] == 200).all()
    assert found[:, -1].min() >= 195
