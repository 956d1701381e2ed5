"""Compare resize_fast with resize_exact, for filters and shapes, with and without the SIMD package."""

import images
import numpy as np
import pytest
from PIL import Image

from pipeline.images import resize
from pipeline.images.resize import FILTERS, resize_exact, resize_fast
from pipeline.images.transform import Transform

SIZES = [(131, 97), (97, 131), (500, 375), (640, 48), (48, 640), (20, 31), (64, 64), (1, 1), (1300, 900)]


def both(pixels: np.ndarray, transform: Transform) -> tuple[np.ndarray, np.ndarray]:
    height, width, _ = pixels.shape
    extent, full_size = (0.0, 0.0, float(width), float(height)), (width, height)
    fast = resize_fast(pixels, extent, full_size, transform)
    return fast.astype(int), resize_exact(Image.fromarray(pixels), extent, full_size, transform).astype(int)


def drawn(size: tuple[int, int]) -> np.ndarray:
    return np.asarray(images.tile("urban", size=size))


@pytest.mark.parametrize("interpolation", sorted(FILTERS))
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("sides", [(48, 40), (40, 48), (64, 64)])
@pytest.mark.parametrize("size", SIZES)
def test_fast_pixels_equal_the_exact_ones_within_rounding(
    size: tuple[int, int], sides: tuple[int, int], squash: bool, interpolation: str
) -> None:
    fast, exact = both(drawn(size), Transform(*sides, interpolation=interpolation, squash=squash))
    assert fast.shape == exact.shape == (sides[1], sides[1], 3)
    if interpolation != "nearest":  # nearest may choose the adjacent pixel, because the crop alone is resized
        assert np.abs(fast - exact).max() <= 3


def test_the_simd_package_is_used() -> None:
    if resize.simd is None:
        pytest.skip("cykooz-resizer has no build for this machine")
    fast, exact = both(drawn((500, 375)), Transform())
    assert 0 < (fast != exact).mean() < 0.4


def test_pillow_resizes_without_the_simd_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "simd", None)
    fast, exact = both(drawn((300, 300)), Transform(96, 96))
    np.testing.assert_array_equal(fast, exact)


def test_pillow_resizes_large_images() -> None:
    fast, exact = both(drawn((3000, 900)), Transform(64, 64, squash=True))
    np.testing.assert_array_equal(fast, exact)


def test_pixels_outside_the_extent_are_not_used() -> None:
    """The last column of a reduced image may stand for fewer pixels, so the extent may end inside a pixel."""
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[:, :50] = 200
    resized = resize_fast(pixels, (0.0, 0.0, 49.5, 49.5), (99, 99), Transform(32, 32))
    assert (resized[:, :30] == 200).all()
    assert resized[:, -1].min() >= 195
