"""Packed convolutions give the same numbers as plain ones, whatever follows them, for batches of any size."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision import models

from pipeline.inference import onednn
from pipeline.inference.onednn import Convolution, pack_convolutions

SIDE = 40

pytestmark = pytest.mark.skipif(not onednn._is_supported(torch.float32), reason="this machine does not support packing")


class Traced(nn.Module):
    """Three convolutions and a function of them, traced as InferenceSession traces a network."""

    def __init__(self, function: Callable[[nn.Module, nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)

        class Body(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.a, self.b = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
                self.relu = nn.ReLU(inplace=True)

            def forward(self, x: Tensor) -> Tensor:
                return function(self, self.relu, self.first(x))

        self.body = fx.symbolic_trace(Body().eval())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.body(x).float(), None


def batch(images: int = 1) -> Tensor:
    pixels = torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(images))
    return pixels.to(memory_format=torch.channels_last)


def convolutions(network: nn.Module) -> list[Convolution]:
    return [each for each in network.modules() if isinstance(each, Convolution)]


def check(network: nn.Module, packed: nn.Module | None = None) -> list[Convolution]:
    """Compare a network with its packed copy over batches of several sizes; return the packed convolutions.

    packed: the copy; by default one is made with fusing.
    """
    with torch.no_grad():
        packed = packed or onednn._pack(network, onednn._input_sizes(network, batch())[0], 4, fuse=True)
        for images in (1, 4, 3, 9, 4):
            pixels = batch(images)
            before = pixels.clone()
            torch.testing.assert_close(packed(pixels)[0], network(pixels)[0], rtol=1e-4, atol=1e-4)
            assert torch.equal(pixels, before), "the input was overwritten"
    return convolutions(packed)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "mobilenet_v2", "densenet121"])
def test_a_packed_network_computes_the_same(name: str) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = fx.symbolic_trace(models.get_model(name).eval())

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.body(x), None

    network = Body().to(memory_format=torch.channels_last)
    count = sum(type(each) is nn.Conv2d for each in network.modules())
    assert len(check(network)) == count


def test_a_residual_block_is_fused_and_overwrites_its_summand() -> None:
    def block(body: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
        return relu(body.b(relu(body.a(x))) + x)

    first, a, b = check(Traced(block))
    assert (a.relu, b.relu, b.in_place) == ("relu", "relu", True)
    assert first.relu is None, "its output is also a summand"


CASES: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "the summand is its own input": (lambda body, relu, x: body.a(x) + x, False),
    "the summand is read afterwards": (lambda body, relu, x: body.b(body.a(x) + x) + x, True),
    "a view of the summand is used later": (lambda body, relu, x: (body.a(body.b(x)) + x, x.flatten(1))[1], False),
    "both summands are its output": (lambda body, relu, x: (y := body.a(x)) + y, False),
    "the summand is a number": (lambda body, relu, x: body.a(x) + 1.0, False),
    "the sum is weighted": (lambda body, relu, x: torch.add(body.a(body.b(x)), x, alpha=2), False),
    "the output is used twice": (lambda body, relu, x: (y := body.a(x)) * torch.relu(y), False),
    "the summand is computed later": (lambda body, relu, x: relu(body.a(x) + body.b(x)), True),
    "the summand was pooled": (
        lambda body, relu, x: body.a(relu(body.b(p := nn.functional.max_pool2d(x, 2)))) + p,
        False,
    ),
    "the convolution is called twice": (lambda body, relu, x: body.a(relu(body.a(x))), False),
}


@pytest.mark.parametrize("case", CASES)
def test_fusing_changes_no_numbers(case: str) -> None:
    function, overwrites = CASES[case]
    assert any(each.in_place for each in check(Traced(function))) == overwrites


BROADCASTS: list[Callable[..., Tensor]] = [
    lambda body, relu, x: body.a(x) + body.b(x).mean((2, 3), keepdim=True),
    lambda body, relu, x: body.a(x.mean((2, 3), keepdim=True)) + x,
]


@pytest.mark.parametrize("function", BROADCASTS)
def test_a_sum_of_two_sizes_is_not_fused(function: Callable[..., Tensor]) -> None:
    """A trace has no sizes. If the fused network fails or gives other numbers, it is packed without fusing."""
    network = Traced(function)
    packed = pack_convolutions(network, batch(), torch.float32, 4)
    assert packed is not network
    assert not any(each.in_place for each in check(network, packed))


def test_other_convolutions_are_not_packed() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                Own(3, 8, 3),
                nn.Conv2d(8, 8, 3, padding="same"),
                nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
                nn.Conv2d(8, 8, 3),
            )

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return self.body(x), None

    assert len(check(Network().eval())) == 1


def test_a_network_that_cannot_be_packed_is_returned_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Traced(lambda body, relu, x: body.a(x))
    assert pack_convolutions(network, batch(), torch.float64, 4) is network
    assert pack_convolutions(network, batch(), torch.float32, 4) is not network
    monkeypatch.setattr(onednn, "TOLERANCE", {torch.float32: -1.0})  # as if it gave other numbers
    assert pack_convolutions(network, batch(), torch.float32, 4) is network


@pytest.mark.skipif(not onednn._is_supported(torch.bfloat16), reason="oneDNN does not compute in bfloat16 here")
def test_bfloat16_is_fused_and_close_to_float32() -> None:
    exact = Traced(lambda body, relu, x: relu(body.b(relu(body.a(x))) + x))
    network = copy.deepcopy(exact).to(torch.bfloat16, memory_format=torch.channels_last)
    packed = pack_convolutions(network, batch().bfloat16(), torch.bfloat16, 4)
    assert [each.relu for each in convolutions(packed)] == [None, "relu", "relu"]
    for images in (1, 4, 9):
        with torch.no_grad():
            expected, output = exact(batch(images))[0], packed(batch(images).bfloat16())[0]
        assert float((output - expected).abs().max()) < 0.03 * float(expected.max())
