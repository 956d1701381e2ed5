import json
import pickle
import random
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from pipeline.config import Transform
from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.families import WeightsSource, find_family
from pipeline.head import Network, probe
from pipeline.models import build, resolve
from pipeline.weights import align, fit

HERE = __name__
SMALL = "shufflenet_v2_x0_5"

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small network of 7 classes with statistics of its own."""
    torch.manual_seed(3)
    network = torchvision.models.get_model(SMALL, num_classes=7)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def save(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def images(channels: int = 3, size: int = 64) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


# Every network


@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_every_torchvision_network_is_cut_before_its_classifier(name: str) -> None:
    family = find_family(name, 0)
    size = family.transform.crop
    network = family.skeleton(False, {"image_size": size})
    for module_name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):  # keeps the shape, and takes half of the time without data
            network.set_submodule(module_name, nn.Identity())
    shape = probe(network, name, size)
    assert shape.classes == 1000
    cut = Network(network, shape.head, shape.classes).eval()
    with torch.no_grad():
        features, logits = cut(torch.empty(2, 3, size, size, device="meta"))
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
        logits = plain(images())
        plain.fc = nn.Identity()
        torch.testing.assert_close(network.features(images()), plain(images()))
        torch.testing.assert_close(network(images())[1], logits)


def test_a_convolution_before_the_pooling_gives_its_own_logits() -> None:
    network = build(resolve("squeezenet1_1", "random"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = torchvision.models.squeezenet1_1().eval()
    with torch.no_grad():
        features, logits = network(images())
        torch.testing.assert_close(logits, plain(images()))
        torch.testing.assert_close(features, plain.features(images()).mean((2, 3)))


def test_random_weights_are_equal_everywhere_and_leave_the_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    first, second, other = (build(resolve("shufflenet_v2_x0_5", "random", seed=seed)) for seed in (1, 1, 2))
    assert torch.rand(1) == expected
    assert torch.equal(first.features(images()), second.features(images()))
    assert not torch.equal(first.features(images()), other.features(images()))


def test_the_transform_is_that_of_the_weights() -> None:
    family = find_family("resnet50", 0)
    v1, v2 = family.source("IMAGENET1K_V1"), family.source("ResNet50_Weights.IMAGENET1K_V2")
    assert v1.transform == Transform(256, 224)
    assert v2.transform == Transform(232, 224)
    assert family.source("DEFAULT") == v2
    assert v2.labels[0] == "tench"
    assert resolve("resnet50", "random").transform == v2.transform
    assert resolve("vit_h_14", "random").transform.crop == 518


def test_an_official_file_is_recognised_wherever_it_lies() -> None:
    family = find_family("resnet50", 0)
    found = family.recognise(WeightsSource("/x/a.pth", "/x/a.pth", False), "0676ba61" + "0" * 56)
    assert (found.name, found.uri, found.own) == ("ResNet50_Weights.IMAGENET1K_V1", "/x/a.pth", True)
    assert found.transform == Transform(256, 224)


def test_a_spec_can_be_pickled() -> None:
    spec = resolve("resnet18", "random")
    assert pickle.loads(pickle.dumps(spec)) == spec


# Refusals


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("resnet5O", "resnet50"),
        ("no_such_module_here:make", "PYTHONPATH"),
        (f"{HERE}:absent", "cannot be imported"),
        (f"{HERE}:raises", "ValueError: no such size"),
        (f"{HERE}:not_a_network", "returned str"),
        (f"{HERE}:gives_a_tuple", "one tensor"),
    ],
)
def test_unknown_networks_are_refused(model: str, said: str) -> None:
    with pytest.raises(SettingRefused, match=said):
        resolve(model, "random")


@pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "ResNet18_Weights.IMAGENET1K_V1", "weights.onnx", ""])
def test_unknown_weights_are_refused_with_those_there_are(weights: str) -> None:
    with pytest.raises(WeightsRefused, match="IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT, random") as refused:
        resolve("resnet50", weights)
    assert repr(weights) in str(refused.value)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsRefused, match=r"none\.pth cannot be read: no such file"):
        resolve("resnet18", str(tmp_path / "none.pth"))


# Checkpoints


def prefixed(prefix: str) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda network: OrderedDict((f"{prefix}{name}", value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    "content",
    [
        lambda network: network.state_dict(),
        lambda network: nn.DataParallel(network).state_dict(),
        lambda network: {"state_dict": nn.DataParallel(network).state_dict(), "epoch": 3},
        lambda network: {"model": network.state_dict(), "args": __import__("argparse").Namespace(lr=0.1)},
        lambda network: {"model_state_dict": prefixed("model.")(network), "optimizer": {"state": {}}},
        lambda network: {"net": prefixed("_orig_mod.module.")(network)},
        prefixed("backbone."),
        prefixed("encoder.0."),
        lambda network: {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")},
        lambda network: network.half().state_dict(),
    ],
    ids=["plain", "module", "state_dict", "args", "model", "orig_mod", "backbone", "sequential", "no_counts", "half"],
)
def test_checkpoints_load_whatever_wraps_them(
    content: Callable[[nn.Module], Any], trained: nn.Module, tmp_path: Path
) -> None:
    copy = torchvision.models.get_model(SMALL, num_classes=7)
    copy.load_state_dict(trained.state_dict())
    check(save(tmp_path / "w.pth", content(copy)), trained, tolerance=2e-2 if copy.fc.weight.dtype == torch.half else 0)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
def test_both_formats_of_torch_save_load(zipped: bool, trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    check(str(tmp_path / "w.pt"), trained)


def test_safetensors_load(trained: nn.Module, tmp_path: Path) -> None:
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    check(str(tmp_path / "w.safetensors"), trained)


def check(path: str, trained: nn.Module, tolerance: float = 0) -> None:
    spec = resolve(SMALL, path)
    assert (spec.num_classes, spec.labels, spec.weights_uri) == (7, tuple("0123456"), path)
    assert spec.sha256 == sha256(Path(path).read_bytes()).hexdigest()
    with torch.no_grad():
        expected = trained(images())
        torch.testing.assert_close(build(spec)(images())[1], expected, atol=tolerance, rtol=tolerance)


def test_one_channel_builds_a_network_of_one(tmp_path: Path) -> None:
    network = torchvision.models.resnet18(num_classes=4)
    network.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    spec = resolve("resnet18", save(tmp_path / "w.pth", network.state_dict()))
    assert (spec.in_channels, spec.num_classes) == (1, 4)
    assert spec.transform.mean == pytest.approx((0.449,))
    with torch.no_grad():
        torch.testing.assert_close(build(spec)(images(1))[1], network.eval()(images(1)))
    network.conv1 = nn.Conv2d(4, 64, 7, 2, 3, bias=False)
    with pytest.raises(WeightsRefused, match=r"takes 4 channels.*decoded to 3"):
        resolve("resnet18", save(tmp_path / "four.pth", network.state_dict()))


def test_what_does_not_fit_is_refused_by_name(trained: nn.Module, tmp_path: Path) -> None:
    state = trained.state_dict()
    del state["stage2.0.branch2.0.weight"], state["conv1.1.bias"]
    state["extra.weight"] = torch.zeros(2)
    with pytest.raises(WeightsRefused) as refused:
        resolve(SMALL, save(tmp_path / "a.pth", state))
    assert "2 missing (conv1.1.bias, stage2.0.branch2.0.weight); 1 surplus (extra.weight)" in str(refused.value)
    state = trained.state_dict()
    state["conv1.1.bias"] = torch.zeros(3)
    with pytest.raises(WeightsRefused, match=r"1 of another shape \(conv1.1.bias \[3\] for \[24\]\)"):
        resolve(SMALL, save(tmp_path / "b.pth", state))
    with pytest.raises(WeightsRefused, match=r"missing \(.*, …\)"):
        resolve("resnet34", save(tmp_path / "c.pth", trained.state_dict()))


def test_a_tensor_that_is_there_twice_is_refused(trained: nn.Module, tmp_path: Path) -> None:
    state = {"fc.weight": torch.zeros(7, 1024)} | {f"backbone.{k}": v for k, v in trained.state_dict().items()}
    with pytest.raises(WeightsRefused, match=r"hold 'fc\.weight' twice, once with 'backbone\.' before it"):
        resolve(SMALL, save(tmp_path / "w.pth", state))


def test_what_torch_does_not_load_is_refused(trained: nn.Module, tmp_path: Path) -> None:
    state = {name: tensor.to(torch.int8) for name, tensor in trained.state_dict().items()}
    with pytest.raises(WeightsRefused, match=r"do not fit together: .*floating point"):
        resolve(SMALL, save(tmp_path / "w.pth", state))


def test_a_checkpoint_without_a_head_embeds_and_does_not_classify(trained: nn.Module, tmp_path: Path) -> None:
    state = {name: value for name, value in trained.state_dict().items() if not name.startswith("fc.")}
    path = save(tmp_path / "w.pth", OrderedDict((f"encoder.{name}", value) for name, value in state.items()))
    with pytest.raises(WeightsRefused, match=r"2 missing \(fc.bias, fc.weight\)"):
        resolve(SMALL, path)
    spec = resolve(SMALL, path, need_head=False)
    assert (spec.num_classes, spec.embedding_dim, spec.labels) == (0, 1024, ())
    features, logits = build(spec)(images())
    torch.testing.assert_close(trained.fc(features), trained(images()))
    assert logits is None
    state["fc.weight"] = trained.state_dict()["fc.weight"]
    with pytest.raises(WeightsRefused, match=r"fc\.bias"):
        resolve(SMALL, save(tmp_path / "half.pth", state), need_head=False)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_that_wants_to_run_code_is_refused_and_not_executed(tmp_path: Path, trained: nn.Module) -> None:
    for name in ("a.pth", "b.bin"):
        path = save(tmp_path / name, {"state_dict": trained.state_dict(), "x": Malicious(tmp_path / "executed")})
        with pytest.raises(WeightsRefused, match="were not executed") as refused:
            resolve(SMALL, path)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(WeightsRefused, match=r"were not executed.*state_dict\(\)"):
        resolve(SMALL, save(tmp_path / "whole.pt", trained))


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut", b"\x08" + bytes(7) + b"{ broken"])
def test_damaged_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsRefused, match=r"w\.pth"):
        resolve("resnet18", str(tmp_path / "w.pth"))


def test_a_file_without_tensors_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(WeightsRefused, match="its keys are epoch, loss"):
        resolve("resnet18", save(tmp_path / "w.pth", {"epoch": 3, "loss": 0.1}))
    with pytest.raises(WeightsRefused, match="it is a list"):
        resolve("resnet18", save(tmp_path / "l.pth", [1, 2]))


def test_weights_that_changed_since_the_driver_saw_them_are_refused(trained: nn.Module, tmp_path: Path) -> None:
    spec = resolve(SMALL, save(tmp_path / "w.pth", trained.state_dict()))
    save(tmp_path / "w.pth", {name: value * 2 for name, value in trained.state_dict().items()})
    with pytest.raises(WeightsRefused, match="the same file"):
        build(spec)


def test_auxiliary_heads_are_never_needed(tmp_path: Path) -> None:
    network = torchvision.models.googlenet(aux_logits=True, init_weights=False, num_classes=5).eval()
    with_heads = resolve("googlenet", save(tmp_path / "a.pth", network.state_dict()))
    without = OrderedDict((k, v) for k, v in network.state_dict().items() if not k.startswith("aux"))
    for spec in (with_heads, resolve("googlenet", save(tmp_path / "b.pth", without))):
        with torch.no_grad():
            torch.testing.assert_close(build(spec)(images())[1], network(images()))


def test_old_names_of_densenet_and_vit_load() -> None:
    network = torchvision.models.DenseNet(8, (1, 1), 16, num_classes=3)
    state = network.state_dict()
    old = OrderedDict((k.replace("norm1", "norm.1").replace("conv2", "conv.2"), v) for k, v in state.items())
    assert any("denselayer1.norm.1.weight" in name for name in old)
    assert fit(torchvision.models.DenseNet(8, (1, 1), 16, num_classes=3), align(old, state), "it")

    state = VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3).state_dict()
    before = {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"}
    old = OrderedDict((re.sub(r"mlp\.[03]", lambda m: before[m[0]], f"module.{k}"), v) for k, v in state.items())
    old._metadata = {f"module.{name}" if name else "module": {"version": 1} for name in state._metadata}
    network = VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3)
    assert fit(network, align(old, state), "it")
    name = "encoder.layers.encoder_layer_1.mlp.3.weight"
    assert torch.equal(network.state_dict()[name], state[name])


# Functions and timm


def raises() -> nn.Module:
    raise ValueError("no such size")


def not_a_network() -> str:
    return "resnet"


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def gives_a_tuple() -> nn.Module:
    return TwoOutputs()


def small(classes: int = 6) -> nn.Module:
    convolution = nn.Conv2d(3, 5, 3)
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes))


def small_with_transform() -> tuple[nn.Module, Transform]:
    return small(), Transform(40, 32)


def headless() -> nn.Module:
    return Headless()


class Headless(nn.Module):
    """Its last Linear has the width of its output, and is no classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 5, 3), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(x).mean((2, 3))
        return pooled + self.inner(pooled)


drawn = random.Random(0)


def never_the_same() -> nn.Module:
    network = small()
    nn.init.constant_(network[0].weight, drawn.random())
    return network


def test_a_function_brings_a_network_its_transform_and_its_weights() -> None:
    spec = resolve(f"{HERE}:small_with_transform", "DEFAULT")
    assert (spec.embedding_dim, spec.num_classes, spec.transform) == (5, 6, Transform(40, 32))
    assert len(spec.sha256) == 64
    assert resolve(f"{HERE}:small", "random").transform == Transform()
    features, logits = build(spec)(images(size=32))
    assert (features.shape, logits.shape) == ((2, 5), (2, 6))


def test_a_function_takes_a_file(tmp_path: Path) -> None:
    network = small()
    path = save(tmp_path / "w.pt", network.state_dict())
    assert torch.equal(build(resolve(f"{HERE}:small", path))(images())[1], network(images()))
    with pytest.raises(WeightsRefused, match=r"4.weight \[9, 5\] for \[6, 5\]"):
        resolve(f"{HERE}:small", save(tmp_path / "nine.pt", small(9).state_dict()))


def test_a_function_that_gives_other_weights_each_time_is_refused() -> None:
    spec = resolve(f"{HERE}:never_the_same", "DEFAULT")
    with pytest.raises(WeightsRefused, match="on this node"):
        build(spec)


def test_a_network_without_a_classifier_only_embeds() -> None:
    spec = resolve(f"{HERE}:headless", "random", need_head=False)
    assert (spec.embedding_dim, spec.num_classes, spec.head) == (5, 0, "")
    with pytest.raises(WeightsRefused, match="does not end in a classifier"):
        resolve(f"{HERE}:headless", "random")


@pytest.mark.parametrize("model", ["timm:levit_128s", "timm:deit_tiny_distilled_patch16_224"])
def test_the_mean_of_several_classifiers_is_no_embedding(model: str) -> None:
    with pytest.raises(SettingRefused, match="ends in several classifiers"):
        resolve(model, "random", need_head=False)


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
    given = resolve("timm:resnet10t", str(path))
    for each in (
        given,
        replace(given, weights="timm:resnet10t.c3_in1k", weights_uri=str(path), own_weights=True, sha256=digest),
    ):
        with torch.no_grad():
            torch.testing.assert_close(build(each)(images())[1], network(images()))


def test_labels_of_a_file_name_the_classes(trained: nn.Module, tmp_path: Path) -> None:
    path = save(tmp_path / "w.pth", trained.state_dict())
    labels = tmp_path / "names.json"
    labels.write_text(json.dumps([f"class {i}" for i in range(7)]))
    assert resolve(SMALL, path, labels=str(labels)).labels[6] == "class 6"
    with pytest.raises(WeightsRefused, match="names 7 classes and the network has 1000"):
        resolve("resnet18", "random", labels=str(labels))
