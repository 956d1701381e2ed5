"""Overrides: the user's changes to a network's transform."""

from pathlib import Path

import pytest
import torch
import torchvision
from networks import SMALL, save, small
from torch import nn

from pipeline.errors import SettingRefused
from pipeline.images.transform import IMAGENET_STD, Transform
from pipeline.models.overrides import Overrides, numbers
from pipeline.models.spec import build, resolve

pytestmark = pytest.mark.usefixtures("own_caches")

COMPLETE = Overrides(40, 32, "bicubic", (0.5, 0.4, 0.3), (0.2,))


def test_given_values_replace_those_of_the_network() -> None:
    assert resolve(SMALL, "random", overrides=COMPLETE).transform == Transform(
        40, 32, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    )
    only_mean = resolve("networks:small_with_transform", "DEFAULT", overrides=Overrides(mean=(0.5,)))
    assert only_mean.transform == Transform(40, 32, "bilinear", (0.5, 0.5, 0.5), IMAGENET_STD)


def test_the_network_is_built_for_the_crop() -> None:
    spec = resolve("vit_b_16", "random", overrides=Overrides(resize=64, crop=64))
    with torch.no_grad():
        assert build(spec).features(torch.zeros(1, 3, 64, 64)).shape == (1, 768)


def test_a_network_of_one_channel_takes_one_number_or_the_average_of_three(tmp_path: Path) -> None:
    network = torchvision.models.resnet18(num_classes=4)
    network.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    path = save(tmp_path / "w.pth", network.state_dict())
    one, three = (resolve("resnet18", path, overrides=Overrides(mean=mean)) for mean in ((0.25,), (0.25, 0.5, 0.75)))
    assert (one.transform.mean, three.transform.mean) == ((0.25,), (0.5,))


@pytest.mark.parametrize("text", ["0.5,0.25,1", ["0.5,0.25", "1"], (0.5, 0.25, 1.0), ["0.5", "0.25", "1"]])
def test_numbers_are_read_from_flags_yaml_and_python(text: object) -> None:
    assert numbers("mean", text) == (0.5, 0.25, 1.0)  # type: ignore[arg-type]
    assert (numbers("mean", ()), numbers("mean", 0.5)) == ((), (0.5,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize": 0}, "--resize is 0: it must be a number of pixels from 1 to 4096"),
        ({"crop": 100_000}, "--crop is 100000: it must be a number of pixels from 1 to 4096"),
        ({"interpolation": "cubic"}, "--interpolation is 'cubic': it must be one of nearest, bilinear, bicubic"),
        ({"mean": (123.675,)}, "--mean is 123.675: it must be numbers from 0 to 1; divide .* by 255"),
        ({"mean": (float("nan"),)}, "--mean is nan"),
        ({"std": (0.5, 0.0, 0.5)}, "--std is 0.5,0,0.5: it must be numbers from 1e-06 to 1"),
        ({"std": (1e-30,)}, "--std is 1e-30: it must be numbers from 1e-06 to 1"),
        ({"std": (float("inf"),)}, "--std is inf"),
        ({"crop": 300}, "the crop of 300 pixels is larger than the resized image of 256: set --resize to 300 or more"),
        ({"resize": 100}, "--crop to 100 or less"),
        ({"mean": (0.5, 0.5)}, r"--mean is 0.5,0.5, which are 2 numbers, but resnet18 takes 3 channels: give 1"),
    ],
)
def test_bad_values_are_refused_with_value_limit_and_remedy(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingRefused, match=message):
        resolve("resnet18", "random", overrides=Overrides(**values))  # type: ignore[arg-type]


def test_text_that_is_no_number_is_refused() -> None:
    with pytest.raises(SettingRefused, match=r"--std is '0\.5;0\.5': it must be one number, or one for each channel"):
        numbers("std", "0.5;0.5")


def test_an_assumed_transform_is_noted(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pt", torchvision.models.get_model(SMALL).state_dict())
    (note,) = resolve(SMALL, path).notes
    assert note.startswith(f"--weights {path} comes without a transform, so the run uses --resize 256 --crop 224")
    assert "--interpolation bilinear --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225; set these flags" in note
    (note,) = resolve("networks:small", "random").notes
    assert note.startswith("--model networks:small comes without a transform")
    of_function = save(tmp_path / "s.pt", small().state_dict())
    assert resolve("networks:small", of_function, overrides=Overrides(mean=(0.5,))).notes


def test_a_known_transform_is_not_noted(tmp_path: Path) -> None:
    path = save(tmp_path / "w.pt", small().state_dict())
    assert not resolve(SMALL, "random").notes
    assert not resolve("networks:small_with_transform", "DEFAULT").notes
    assert not resolve("networks:small_with_transform", path).notes
    assert not resolve("networks:small", path, overrides=COMPLETE).notes
