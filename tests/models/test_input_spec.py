"""Input specifications: the shipped ones, and what is refused in one's own."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import SettingRefused
from pipeline.geo.bands import Band
from pipeline.images.pixels import PixelFormat
from pipeline.models import input_spec

WEIGHTS = {
    "fmow-rgb-gassl": 1, "landsat-etm-sr": 4, "landsat-etm-toa": 4, "landsat-oli-sr": 4, "landsat-oli-tirs-toa": 4,
    "landsat-tm-toa": 4, "satlas-rgb": 6, "sentinel1-grd": 3, "sentinel2-all": 4, "sentinel2-all-seco-eco": 1,
    "sentinel2-all-softcon": 1, "sentinel2-rgb": 2, "sentinel2-rgb-seco": 2, "sentinel2-satlas-ms": 4,
}  # fmt: skip
"""Shipped specification → number of TorchGeo's weights that it fits."""


def test_the_shipped_specifications_name_their_source_and_weights() -> None:
    assert set(input_spec.shipped()) == set(WEIGHTS)
    named: list[str] = []
    for name, count in WEIGHTS.items():
        specification = input_spec.load(name)
        assert specification.sensor
        assert specification.product
        assert all(url.startswith("https://") for url in specification.source)
        assert len(specification.weights) == count
        assert specification.expected
        assert specification.transform.crop in (224, 256)
        assert specification.harmonize == ("Sentinel-2" in specification.sensor and specification.pixels == "float32"
                                           and "8 bits" not in specification.product)  # fmt: skip
        text = (input_spec.FOLDER / f"{name}.yaml").read_text()
        assert "MIT licence" in text
        named += specification.weights
    assert len(named) == len(set(named))


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "bands: [B4, nir]\naliases: {B4: [red]}\ndivisor: [100, 200]\noffset: -5\nmean: 0.5\nstd: [1, 2]\nsize: 40\n"
        "crop: 32\nmissing: {nir: 7}\nclip: [0, 1]\nexpected: [0, 2.5]\n",
    )
    specification = input_spec.load(path)
    assert specification.pixel_format == PixelFormat("float32", 2)
    assert specification.bands == (Band(("B4", "red")), Band(("nir",), 7.0))
    transform = specification.transform
    assert (transform.resize, transform.crop, transform.interpolation, transform.squash) == (40, 32, "bilinear", False)
    assert (transform.mean, transform.std) == ((0.5, 0.5), (1.0, 2.0))
    assert specification.scaled(np.array([[95.0, 195.0]])).tolist() == [[1.0, 1.0]]
    assert not specification.harmonize


GOOD = "bands: [a, b]\ncrop: 32\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop: 32\n", "has bands None: it must be a list of names"),
        ("bands: [a, 1]\ncrop: 32\n", "it must be a list of names"),
        ("bands: [a]\n", "has crop None: it must be a number of pixels from 1"),
        (f"{GOOD}divisors: 2\n", "has the unknown key 'divisors'; did you mean divisor"),
        (f"{GOOD}divisor: 0\n", "has divisor 0: it must be one number greater than 0, or 2 of them"),
        (f"{GOOD}mean: [1, 2, 3]\n", r"has mean \[1, 2, 3\]: it must be one number, or 2 of them"),
        (f"{GOOD}std: .nan\n", "has std nan"),
        (f"{GOOD}offset: yes\n", "has offset True"),
        (f"{GOOD}size: 16\n", "has crop 32, which is larger than size 16"),
        (f"{GOOD}interpolation: cubic\n", "has interpolation 'cubic': it must be one of nearest"),
        (f"{GOOD}pixels: int16\n", "has pixels 'int16': it must be one of float32, uint8"),
        (f"{GOOD}pixels: uint8\nmissing: {{a: 0}}\n", "has `missing` with pixels: uint8"),
        (f"{GOOD}missing: {{c: 0}}\n", "has 'c' in missing: it must be one of the bands a, b"),
        (f"{GOOD}missing: {{a: x}}\n", "has 'x' for the missing band a: it must be a number"),
        (f"{GOOD}aliases: {{a: red}}\n", "has aliases 'red' of a: they must be a list"),
        (f"{GOOD}aliases: {{a: [B]}}\n", "names two bands b: each name must belong to one band"),
        (f"{GOOD}clip: [1, 0]\n", r"has clip \[1, 0\]: it must be two numbers, the lower one first"),
        (f"{GOOD}harmonize: maybe\n", "has harmonize 'maybe': it must be true or false"),
        (f"{GOOD}nodata: 300\npixels: uint8\n", "has nodata 300 with pixels: uint8; it must be a whole number from 0"),
        (f"{GOOD}nodata: 1{'0' * 400}\n", "has nodata 10"),
        (f"{GOOD}mean: 1.0e+39\n", r"has mean 1e\+39: it must be one number"),
        (f"{GOOD}divisor: 1.0e-310\n", "has divisor 1e-310: it must be one number greater than 0"),
        (f"{GOOD}missing: {{a: 1{'0' * 400}}}\n", "for the missing band a: it must be a number"),
        (f"{GOOD}expected: 2024-13-45\n", "cannot be read: month must be in 1..12"),
        (f"{GOOD}clip: {'[' * 2000}{']' * 2000}\n", "."),
        ("- a\n", "must have one key per line"),
        ("a: [", "cannot be read"),
        (f"{GOOD}divisor: 1\ndivisor: 2\n", "the key divisor is given twice"),
    ],
)
def test_a_bad_file_is_refused_by_key_and_value(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SettingRefused, match=message) as refused:
        input_spec.load(path)
    assert str(refused.value).startswith(f"--input-spec {path} ")


def test_an_unknown_name_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingRefused, match=r"'sentinel2-al' is unknown: did you mean sentinel2-all\? choose fmow"):
        input_spec.load("sentinel2-al")
    with pytest.raises(SettingRefused, match="cannot be read"):
        input_spec.load(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("band", "name", "is_called"),
    [
        ("B2", "B02", True), ("B2", "b2", True), ("B2", " B2 , central wavelength 490 nm", True), ("B8A", "B8a", True),
        ("B8", "B8A", False), ("B1", "B10", False), ("SR_B4", "B4", False), ("B2", "Band 2", False), ("B2", "", False),
    ],
)  # fmt: skip
def test_names_of_bands(band: str, name: str, is_called: bool) -> None:
    assert Band((band,)).is_called(name) == is_called
