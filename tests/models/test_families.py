"""Families: names, weights and transforms of torchvision, timm and Python functions."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from networks import draw_input, save, small, tiny
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.images.transform import Transform
from pipeline.models.families import WeightsSource
from pipeline.models.spec import build, find_family, resolve

pytestmark = pytest.mark.usefixtures("own_caches")


def test_the_transform_is_that_of_the_weights() -> None:
    family = find_family("resnet50", 0)
    v1, v2 = family.source("IMAGENET1K_V1"), family.source("ResNet50_Weights.IMAGENET1K_V2")
    assert v1.transform == Transform(256, 224)
    assert v2.transform == Transform(232, 224)
    assert family.source("DEFAULT") == v2
    assert v2.labels[0] == "tench"
    assert resolve("resnet50", "random").transform == v2.transform
    assert resolve("vit_h_14", "random").transform.crop == 518


def test_an_official_file_is_recognised_by_its_hash() -> None:
    family = find_family("resnet50", 0)
    source = family.recognise(WeightsSource("/x/a.pth", "/x/a.pth", False), "0676ba61" + "0" * 56)
    assert (source.name, source.uri, source.own) == ("ResNet50_Weights.IMAGENET1K_V1", "/x/a.pth", True)
    assert source.transform == Transform(256, 224)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet5O", "resnet50"),
        ("no_such_module_here:make", "PYTHONPATH"),
        ("networks:absent", "cannot be imported"),
        ("networks:raises", "ValueError: no such size"),
        ("networks:not_a_network", "returned str"),
        ("networks:two_outputs", "one tensor"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(model: str, message: str) -> None:
    with pytest.raises(SettingRefused, match=message):
        resolve(model, "random")


def with_new_classifier() -> nn.Module:
    """Weights of its own, but for the classifier."""
    classifier = nn.Linear(8, 3)  # before `tiny`, which has a seed of its own
    return nn.Sequential(*tiny()[0][:2], classifier)  # type: ignore[index]


@pytest.mark.parametrize("model", ["networks:tiny", "networks:colours", f"{__name__}:with_new_classifier"])
def test_random_is_refused_for_a_function_that_brings_its_own_weights(model: str) -> None:
    with pytest.raises(WeightsRefused, match="a function that brings its own weights: leave --weights out, or give a"):
        resolve(model, "random")
    spec = resolve(model, "DEFAULT")
    assert (spec.weights, len(spec.sha256)) == (model, 64)


def test_random_weights_of_a_function_depend_on_the_seed() -> None:
    first, second, other = (build(resolve("networks:small", "random", seed=seed)) for seed in (1, 1, 2))
    tensors = [next(each.parameters()) for each in (first, second, other)]
    assert torch.equal(tensors[0], tensors[1])
    assert not torch.equal(tensors[0], tensors[2])


@pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "ResNet18_Weights.IMAGENET1K_V1", "weights.onnx", ""])
def test_unknown_weights_are_refused_with_the_known_names(weights: str) -> None:
    with pytest.raises(WeightsRefused, match="IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, random") as refused:
        resolve("resnet50", weights)
    assert repr(weights) in str(refused.value)


# Python functions


def test_a_function_returns_a_network_with_its_transform_and_weights() -> None:
    spec = resolve("networks:small_with_transform", "DEFAULT")
    assert (spec.embedding_dim, spec.num_classes, spec.transform) == (5, 6, Transform(40, 32))
    assert len(spec.sha256) == 64
    assert resolve("networks:small", "random").transform == Transform()
    features, logits = build(spec)(draw_input(size=32))
    assert (features.shape, logits.shape) == ((2, 5), (2, 6))


def test_weights_from_a_file_are_loaded_into_the_network_of_a_function(tmp_path: Path) -> None:
    network = small()
    path = save(tmp_path / "w.pt", network.state_dict())
    assert torch.equal(build(resolve("networks:small", path))(draw_input())[1], network(draw_input()))


def test_the_network_of_a_function_takes_the_classes_of_a_file(tmp_path: Path) -> None:
    network = small(9)
    spec = resolve("networks:small", save(tmp_path / "nine.pt", network.state_dict()))
    assert (spec.num_classes, spec.labels[-1], spec.embedding_dim) == (9, "8", 5)
    features, logits = build(spec)(draw_input())
    assert torch.equal(logits, network(draw_input()))
    assert torch.equal(features, network[:4](draw_input()))
    embedding_only = resolve("networks:small", str(tmp_path / "nine.pt"), need_head=False)
    assert torch.equal(build(embedding_only).features(draw_input()), features)


def test_a_function_with_different_weights_each_time_is_refused() -> None:
    spec = resolve("networks:different_each_time", "DEFAULT")
    with pytest.raises(WeightsRefused, match="on this node, but"):
        build(spec)


# timm


def test_timm_networks(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    spec = resolve("timm:resnet10t", "random")
    assert (spec.embedding_dim, spec.num_classes, spec.head) == (512, 1000, "fc")
    assert spec.transform == Transform(201, 176, "bicubic")  # floor(176 / 0.875)
    assert resolve("timm:resnetv2_50", "random").embedding_dim == 2048  # its classifier is a convolution
    own = find_family("timm:resnet10t", 0).source("DEFAULT")
    assert (own.name, own.labels[0][:5]) == ("timm:resnet10t.c3_in1k", "tench")
    with pytest.raises(SettingRefused, match="resnet10t"):
        resolve("timm:resnet10tt", "random")
    assert find_family("timm:convnext_atto_ols", 0).transform.squash is False
    assert find_family("timm:tiny_vit_21m_512", 0).transform == Transform(512, 512, "bicubic", squash=True)
    with pytest.raises(SettingRefused, match="crop_mode 'border'"):
        find_family("timm:deepseek_vit_412m", 0)

    network = timm.create_model("resnet10t").eval()
    path = tmp_path / "model.safetensors"
    save_file(network.state_dict(), path)
    digest = sha256(path.read_bytes()).hexdigest()
    of_file = resolve("timm:resnet10t", str(path))
    of_timm = replace(of_file, weights="timm:resnet10t.c3_in1k", own_weights=True)
    assert (of_file.weights_uri, of_file.sha256, of_file.own_weights) == (str(path), digest, False)
    for spec in (of_file, of_timm):
        with torch.no_grad():
            torch.testing.assert_close(build(spec)(draw_input())[1], network(draw_input()))
