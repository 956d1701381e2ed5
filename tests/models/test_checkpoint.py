"""Checkpoints of many forms load; others are refused with a reason, and their code is never executed."""

import re
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
import torchvision
from networks import SMALL, draw_input, save
from safetensors.torch import save_file
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from pipeline.errors import WeightsRefused
from pipeline.models.checkpoint import align, fit
from pipeline.models.spec import build, resolve

pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return networks.trained()


def prefixed(prefix: str) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda network: OrderedDict((f"{prefix}{name}", value) for name, value in network.state_dict().items())


def check(path: str, trained: nn.Module, tolerance: float = 0) -> None:
    """Load a file of `trained` and compare the outputs of both networks."""
    spec = resolve(SMALL, path)
    assert (spec.num_classes, spec.labels, spec.weights_uri) == (7, tuple("0123456"), path)
    assert spec.sha256 == sha256(Path(path).read_bytes()).hexdigest()
    with torch.no_grad():
        expected = trained(draw_input())
        torch.testing.assert_close(build(spec)(draw_input())[1], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "content",
    [
        lambda network: network.state_dict(),
        lambda network: nn.DataParallel(network).state_dict(),
        lambda network: {"state_dict": nn.DataParallel(network).state_dict(), "epoch": 3},
        lambda network: {"model": network.state_dict(), "args": __import__("argparse").Namespace(lr=0.1)},
        lambda network: {"model_state_dict": prefixed("model.")(network), "optimizer": {"state": {}}},
        lambda network: {"net": prefixed("_orig_mod.module.")(network)},
        lambda network: {"ema": network.state_dict(), "epoch": 3},
        lambda network: {"state_dict_ema": nn.DataParallel(network).state_dict()},
        lambda network: {"weights": {"state_dict": network.state_dict()}},
        lambda network: {"ema": {"n_averaged": torch.tensor(5), **prefixed("module.")(network)}},
        lambda network: {"state_dict": {**prefixed("model.")(network), "criterion.weight": torch.ones(7)}},
        prefixed("backbone."),
        prefixed("encoder.0."),
        lambda network: {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")},
        lambda network: network.half().state_dict(),
    ],
    ids=[
        "plain",
        "module",
        "state_dict",
        "args",
        "model",
        "orig_mod",
        "ema",
        "state_dict_ema",
        "weights",
        "averaged",
        "criterion",
        "backbone",
        "sequential",
        "no_counts",
        "half",
    ],
)
def test_wrapped_checkpoints_load(content: Callable[[nn.Module], Any], trained: nn.Module, tmp_path: Path) -> None:
    copy = torchvision.models.get_model(SMALL, num_classes=7)
    copy.load_state_dict(trained.state_dict())
    check(save(tmp_path / "w.pth", content(copy)), trained, tolerance=2e-2 if copy.fc.weight.dtype == torch.half else 0)


def test_plain_weights_are_preferred_to_averaged_ones(trained: nn.Module, tmp_path: Path) -> None:
    state = trained.state_dict()
    zeros = {name: torch.zeros_like(value) for name, value in state.items()}
    check(save(tmp_path / "w.pth", {"state_dict_ema": zeros, "state_dict": state}), trained)


@pytest.mark.parametrize("name", ["w.ckpt", "w.pth.tar", "w.bin"])
def test_the_usual_suffixes_are_accepted(name: str, trained: nn.Module, tmp_path: Path) -> None:
    check(save(tmp_path / name, {"state_dict": trained.state_dict()}), trained)


def test_a_classifier_inside_a_sequential_is_found(trained: nn.Module, tmp_path: Path) -> None:
    state = {name.replace("fc.", "fc.1."): value for name, value in trained.state_dict().items()}
    assert "fc.1.weight" in state
    path = save(tmp_path / "w.pth", prefixed("model.")(trained) | {f"model.{name}": v for name, v in state.items()})
    for name in ("model.fc.weight", "model.fc.bias"):
        content = torch.load(path)
        del content[name]
        torch.save(content, path)
    check(path, trained)
    assert f"--weights {path} hold the classifier fc as fc.1" in resolve(SMALL, path).notes[0]
    assert resolve(SMALL, path, need_head=False).num_classes == 7


def test_a_head_of_several_layers_is_refused_with_a_remedy(trained: nn.Module, tmp_path: Path) -> None:
    state = {name: value for name, value in trained.state_dict().items() if not name.startswith("fc.")}
    state |= {f"fc.{i}.{name}": torch.zeros(7) for i in (0, 3) for name in ("weight", "bias")}
    for need_head in (True, False):
        with pytest.raises(WeightsRefused, match=r"several layers \(fc\.0, fc\.3\).*--model package\.module:function"):
            resolve(SMALL, save(tmp_path / "w.pth", state), need_head=need_head)


def test_the_shortest_prefix_is_removed_if_several_fit() -> None:
    state = OrderedDict({"module.fc.weight": torch.zeros(1)})
    assert list(align(state, ["fc.weight", "weight"])) == ["fc.weight"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before_1.6"])
def test_both_formats_of_torch_save_load(zipped: bool, trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    check(str(tmp_path / "w.pt"), trained)


def test_safetensors_load(trained: nn.Module, tmp_path: Path) -> None:
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    check(str(tmp_path / "w.safetensors"), trained)


def test_auxiliary_heads_are_not_needed(tmp_path: Path) -> None:
    network = torchvision.models.googlenet(aux_logits=True, init_weights=False, num_classes=5).eval()
    with_heads = resolve("googlenet", save(tmp_path / "a.pth", network.state_dict()))
    without = OrderedDict((k, v) for k, v in network.state_dict().items() if not k.startswith("aux"))
    for spec in (with_heads, resolve("googlenet", save(tmp_path / "b.pth", without))):
        with torch.no_grad():
            torch.testing.assert_close(build(spec)(draw_input())[1], network(draw_input()))


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


def test_a_checkpoint_without_a_head_only_embeds(trained: nn.Module, tmp_path: Path) -> None:
    state = {name: value for name, value in trained.state_dict().items() if not name.startswith("fc.")}
    path = save(tmp_path / "w.pth", OrderedDict((f"encoder.{name}", value) for name, value in state.items()))
    with pytest.raises(WeightsRefused, match=r"2 missing \(fc.bias, fc.weight\)"):
        resolve(SMALL, path)
    spec = resolve(SMALL, path, need_head=False)
    assert (spec.num_classes, spec.embedding_dim, spec.labels) == (0, 1024, ())
    features, logits = build(spec)(draw_input())
    torch.testing.assert_close(trained.fc(features), trained(draw_input()))
    assert logits is None
    state["fc.weight"] = trained.state_dict()["fc.weight"]
    with pytest.raises(WeightsRefused, match=r"fc\.bias"):
        resolve(SMALL, save(tmp_path / "half.pth", state), need_head=False)


# Refusals


def test_tensors_that_do_not_match_are_named(trained: nn.Module, tmp_path: Path) -> None:
    state = trained.state_dict()
    del state["stage2.0.branch2.0.weight"], state["conv1.1.bias"]
    state["extra.weight"] = torch.zeros(2)
    with pytest.raises(WeightsRefused) as refused:
        resolve(SMALL, save(tmp_path / "a.pth", state))
    assert "2 missing (conv1.1.bias, stage2.0.branch2.0.weight); 1 unexpected (extra.weight)" in str(refused.value)
    state = trained.state_dict()
    state["conv1.1.bias"] = torch.zeros(3)
    with pytest.raises(WeightsRefused, match=r"1 of another shape \(conv1.1.bias \[3\] for \[24\]\)"):
        resolve(SMALL, save(tmp_path / "b.pth", state))
    with pytest.raises(WeightsRefused, match=r"missing \(.*, …\)"):
        resolve("resnet34", save(tmp_path / "c.pth", trained.state_dict()))


def test_two_tensors_of_the_same_name_are_refused(trained: nn.Module, tmp_path: Path) -> None:
    state = {"fc.weight": torch.zeros(7, 1024)} | {f"backbone.{k}": v for k, v in trained.state_dict().items()}
    with pytest.raises(WeightsRefused, match=r"hold 'fc\.weight' twice, once with the prefix 'backbone\.'"):
        resolve(SMALL, save(tmp_path / "w.pth", state))


def test_tensors_that_torch_cannot_load_are_refused(trained: nn.Module, tmp_path: Path) -> None:
    state = {name: tensor.to(torch.int8) for name, tensor in trained.state_dict().items()}
    with pytest.raises(WeightsRefused, match=r"do not match: .*floating point"):
        resolve(SMALL, save(tmp_path / "w.pth", state))


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, trained: nn.Module) -> None:
    for name in ("a.pth", "b.bin"):
        path = save(tmp_path / name, {"state_dict": trained.state_dict(), "x": Malicious(tmp_path / "executed")})
        with pytest.raises(WeightsRefused, match="were not executed") as refused:
            resolve(SMALL, path)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(WeightsRefused, match=r"were not executed.*state_dict\(\)"):
        resolve(SMALL, save(tmp_path / "whole.pt", trained))


def test_torchscript_is_refused_with_a_remedy(tmp_path: Path) -> None:
    networks.scripted().save(tmp_path / "w.pt")
    with pytest.raises(WeightsRefused, match=r"w\.pt are TorchScript.*state_dict\(\)"):
        resolve("networks:small", str(tmp_path / "w.pt"))


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut", b"\x08" + bytes(7) + b"{ broken"])
def test_damaged_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsRefused, match=r"w\.pth"):
        resolve("resnet18", str(tmp_path / "w.pth"))


def test_the_refusal_of_a_file_without_tensors_names_its_content(tmp_path: Path) -> None:
    with pytest.raises(WeightsRefused, match="its keys are epoch, loss"):
        resolve("resnet18", save(tmp_path / "w.pth", {"epoch": 3, "loss": 0.1}))
    with pytest.raises(WeightsRefused, match="it is a list"):
        resolve("resnet18", save(tmp_path / "l.pth", [1, 2]))
