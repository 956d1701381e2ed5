"""A run names the class that Pillow, torchvision and float32 name, with a network that has learned something."""

import pytest

from jobs import fidelity
from jobs.fidelity import Agreement, Way

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # it trains a network


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Way], Agreement]:
    images = {"tiles": 50, "photos": 50, "12 megapixels": 5}
    return {(name, way): each for name, way, each in fidelity.agreements(tmp_path_factory.mktemp("f"), images)}


@pytest.mark.parametrize("way", fidelity.WAYS, ids=str)
def test_a_run_names_the_references_class(found: dict[tuple[str, Way], Agreement], way: Way) -> None:
    agreements = [each for (_, its), each in found.items() if its == way]
    assert fidelity.together(agreements).same >= 0.99, agreements


def test_the_network_has_learned_and_is_not_certain_of_everything(found: dict[tuple[str, Way], Agreement]) -> None:
    agreements = [each for (_, way), each in found.items() if way == Way()]
    both = fidelity.together(agreements)
    assert both.right >= 0.85, agreements
    assert both.in_doubt >= 0.01, agreements
