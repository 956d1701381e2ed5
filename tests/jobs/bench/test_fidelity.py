"""A run gives the same class as Pillow, torchvision and float32, with a network that was trained."""

import pytest

from jobs.bench import fidelity
from jobs.bench.fidelity import Agreement, Settings

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]  # it trains a network


@pytest.fixture(scope="module")
def agreements(tmp_path_factory: pytest.TempPathFactory) -> dict[Settings, list[Agreement]]:
    """One agreement per size."""
    images = {"tiles": 50, "photos": 50, "12 megapixels": 5}
    by_settings: dict[Settings, list[Agreement]] = {}
    for _, settings, agreement in fidelity.agreements(tmp_path_factory.mktemp("f"), images):
        by_settings.setdefault(settings, []).append(agreement)
    return by_settings


@pytest.mark.parametrize("settings", fidelity.SETTINGS, ids=str)
def test_a_run_gives_the_references_class(agreements: dict[Settings, list[Agreement]], settings: Settings) -> None:
    assert fidelity.together(agreements[settings]).same >= 0.99, agreements[settings]


def test_the_network_has_learned_and_is_in_doubt_about_some_images(agreements: dict[Settings, list[Agreement]]) -> None:
    every = fidelity.together(agreements[Settings()])
    assert every.right >= 0.85
    assert every.in_doubt >= 0.01
