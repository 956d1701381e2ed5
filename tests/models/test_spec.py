"""ModelSpec: `resolve` checks a network once, and `build` builds the same network in every process."""

import json
import pickle
from pathlib import Path

import networks
import pytest
import torch
import torchvision
from networks import SMALL, draw_input, save
from torch import nn

from pipeline.errors import WeightsRefused
from pipeline.models.spec import build, resolve

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return networks.trained()


def test_random_weights_depend_only_on_the_seed_and_do_not_change_the_global_generator() -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first, second, other = (build(resolve(SMALL, "random", seed=seed)) for seed in (1, 1, 2))
    assert torch.rand(1) == expected
    assert torch.equal(first.features(draw_input()), second.features(draw_input()))
    assert not torch.equal(first.features(draw_input()), other.features(draw_input()))


def test_a_spec_can_be_pickled() -> None:
    spec = resolve("resnet18", "random")
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsRefused, match=r"none\.pth cannot be read: no such file"):
        resolve("resnet18", str(tmp_path / "none.pth"))


def test_the_number_of_channels_is_that_of_the_weights(tmp_path: Path) -> None:
    network = torchvision.models.resnet18(num_classes=4)
    network.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    spec = resolve("resnet18", save(tmp_path / "w.pth", network.state_dict()))
    assert (spec.in_channels, spec.num_classes) == (1, 4)
    assert spec.transform.mean == pytest.approx((0.449,))
    with torch.no_grad():
        torch.testing.assert_close(build(spec)(draw_input(1))[1], network.eval()(draw_input(1)))
    network.conv1 = nn.Conv2d(4, 64, 7, 2, 3, bias=False)
    with pytest.raises(WeightsRefused, match=r"takes 4 channels, but images have 3 \(RGB\)"):
        resolve("resnet18", save(tmp_path / "four.pth", network.state_dict()))


def test_weights_that_have_changed_since_the_driver_read_them_are_refused(trained: nn.Module, tmp_path: Path) -> None:
    spec = resolve(SMALL, save(tmp_path / "w.pth", trained.state_dict()))
    save(tmp_path / "w.pth", {name: value * 2 for name, value in trained.state_dict().items()})
    with pytest.raises(WeightsRefused, match="the same file"):
        build(spec)


def test_class_names_from_a_file(trained: nn.Module, tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", trained.state_dict())
    labels = tmp_path / "names.json"
    labels.write_text(json.dumps([f"class {i}" for i in range(7)]))
    assert resolve(SMALL, path, labels=str(labels)).labels[6] == "class 6"
    with pytest.raises(WeightsRefused, match="has 7 class names, but the network has 1000 classes"):
        resolve("resnet18", "random", labels=str(labels))
