"""find_classifier and Network: the classifier is removed, and its input is the embedding."""

import pytest
import torch
import torchvision
from networks import draw_input
from torch import nn

from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.models.classifier import Network, find_classifier
from pipeline.models.spec import build, find_family, resolve

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_the_classifier_of_every_torchvision_network_is_found(name: str) -> None:
    family = find_family(name, 0)
    size = family.transform.crop
    network = family.skeleton(False, {"image_size": size})
    for module_name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):  # keeps shapes, and takes half of the time
            network.set_submodule(module_name, nn.Identity())
    shape = find_classifier(network, name, size)
    assert shape.classes == 1000
    headless = Network(network, shape.head, shape.classes).eval()
    with torch.no_grad():
        features, logits = headless(torch.empty(2, 3, size, size, device="meta"))
    assert features.shape == (2, shape.width)
    assert logits.shape == (2, 1000)


def test_features_are_the_input_of_the_classifier() -> None:
    spec = resolve("resnet18", "random", seed=5)
    assert (spec.embedding_dim, spec.num_classes, spec.in_channels, spec.head) == (512, 1000, 3, "fc")
    assert (spec.weights, spec.weights_uri, spec.sha256) == ("random", None, "")
    network = build(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        plain = torchvision.models.resnet18().eval()
    with torch.no_grad():
        logits = plain(draw_input())
        plain.fc = nn.Identity()
        torch.testing.assert_close(network.features(draw_input()), plain(draw_input()))
        torch.testing.assert_close(network(draw_input())[1], logits)


def test_a_classifier_that_is_a_convolution_before_pooling() -> None:
    network = build(resolve("squeezenet1_1", "random"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = torchvision.models.squeezenet1_1().eval()
    with torch.no_grad():
        features, logits = network(draw_input())
        torch.testing.assert_close(logits, plain(draw_input()))
        torch.testing.assert_close(features, plain.features(draw_input()).mean((2, 3)))


def test_a_network_without_a_classifier_only_embeds() -> None:
    spec = resolve("networks:headless", "random", need_head=False)
    assert (spec.embedding_dim, spec.num_classes, spec.head) == (5, 0, "")
    with pytest.raises(WeightsRefused, match="does not end in a classifier"):
        resolve("networks:headless", "random")


@pytest.mark.parametrize("model", ["networks:scripted", "networks:traced"])
def test_torchscript_is_refused_with_a_remedy(model: str) -> None:
    for need_head in (True, False):
        with pytest.raises(SettingRefused, match=rf"{model} returns TorchScript.*return the torch\.nn\.Module"):
            resolve(model, "DEFAULT", need_head=need_head)


def test_a_network_with_weights_that_are_not_tensors_is_refused() -> None:
    with pytest.raises(SettingRefused, match="weights that are not tensors, as quantized ones"):
        resolve("networks:quantized", "DEFAULT", need_head=False)


def test_torchscript_inside_a_module_embeds_its_output() -> None:
    spec = resolve("networks:scripted_inside", "DEFAULT", need_head=False)
    assert (spec.embedding_dim, spec.head) == (6, "")
    assert "embedding is its whole output of 6 values" in spec.notes[0]


@pytest.mark.parametrize("model", ["timm:levit_128s", "timm:deit_tiny_distilled_patch16_224"])
def test_several_classifiers_are_refused(model: str) -> None:
    with pytest.raises(SettingRefused, match="ends in several classifiers"):
        resolve(model, "random", need_head=False)
