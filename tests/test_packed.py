"""packed: the same numbers as the plain network, whatever follows its convolutions, for batches of any size."""

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision import models

from pipeline import packed as module
from pipeline.packed import Convolution, packed

SIDE = 40

pytestmark = pytest.mark.skipif(not module._is_supported(torch.float32), reason="oneDNN packs nothing on this machine")


class Traced(nn.Module):
    """Two convolutions and what a function makes of them, traced as `network` traces a body."""

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
    made = torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(images))
    return made.to(memory_format=torch.channels_last)


def convolutions(network: nn.Module) -> list[Convolution]:
    return [each for each in network.modules() if isinstance(each, Convolution)]


def check(network: nn.Module, found: nn.Module | None = None) -> list[Convolution]:
    """Packs it, or takes what was made of it; compares both over batches of several sizes; returns the convolutions."""
    with torch.no_grad():
        found = found or module._packed(network, module._sizes(network, batch())[0], 4, fuses=True)
        for images in (1, 4, 3, 9, 4):
            given = batch(images)
            before = given.clone()
            torch.testing.assert_close(found(given)[0], network(given)[0], rtol=1e-4, atol=1e-4)
            assert torch.equal(given, before)
    return convolutions(found)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "mobilenet_v2", "densenet121"])
def test_a_network_computes_the_same(name: str) -> None:
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


def test_a_residual_block_is_fused_and_overwrites_what_it_adds() -> None:
    def block(body: nn.Module, relu: nn.Module, x: Tensor) -> Tensor:
        return relu(body.b(relu(body.a(x))) + x)

    first, a, b = check(Traced(block))
    assert (a.relu, b.relu, b.in_place) == ("relu", "relu", True)
    assert first.relu is None, "what it returns is added as it is"


CASES: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "the sum is with its own input": (lambda body, relu, x: body.a(x) + x, False),
    "what is added is read afterwards": (lambda body, relu, x: body.b(body.a(x) + x) + x, True),
    "a view of what is added lives on": (lambda body, relu, x: (body.a(body.b(x)) + x, x.flatten(1))[1], False),
    "the sum doubles it": (lambda body, relu, x: (y := body.a(x)) + y, False),
    "the sum is with a number": (lambda body, relu, x: body.a(x) + 1.0, False),
    "the sum is weighted": (lambda body, relu, x: torch.add(body.a(body.b(x)), x, alpha=2), False),
    "the output is wanted twice": (lambda body, relu, x: (y := body.a(x)) * torch.relu(y), False),
    "the other comes later": (lambda body, relu, x: relu(body.a(x) + body.b(x)), True),
    "what is added was pooled": (
        lambda body, relu, x: body.a(relu(body.b(p := nn.functional.max_pool2d(x, 2)))) + p,
        False,
    ),
    "it is there twice": (lambda body, relu, x: body.a(relu(body.a(x))), False),
}


@pytest.mark.parametrize("case", CASES)
def test_what_follows_is_fused_only_where_that_changes_nothing(case: str) -> None:
    function, overwrites = CASES[case]
    assert any(each.in_place for each in check(Traced(function))) == overwrites


BROADCASTS: list[Callable[..., Tensor]] = [
    lambda body, relu, x: body.a(x) + body.b(x).mean((2, 3), keepdim=True),
    lambda body, relu, x: body.a(x.mean((2, 3), keepdim=True)) + x,
]


@pytest.mark.parametrize("function", BROADCASTS)
def test_a_sum_of_two_sizes_is_not_fused(function: Callable[..., Tensor]) -> None:
    """What is traced bears no sizes: one that fails, or gives other numbers, is packed without."""
    network = Traced(function)
    assert not any(each.in_place for each in check(network, packed(network, batch(), torch.float32, 4)))


def test_other_convolutions_stay() -> None:
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


def test_one_that_cannot_be_packed_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Traced(lambda body, relu, x: body.a(x))
    assert packed(network, batch(), torch.float64, 4) is network
    monkeypatch.setattr(module, "AGREES", {torch.float32: -1.0})  # as if its numbers were others
    assert packed(network, batch(), torch.float32, 4) is network


class Wide(nn.Module):
    """A residual block of as many channels as Winograd's way takes, with a narrow one before it."""

    def __init__(self, **geometry: int) -> None:
        super().__init__()
        torch.manual_seed(0)

        class Body(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Conv2d(3, 64, 3, padding=1)
                self.a = nn.Conv2d(64, 64, 3, **{"padding": 1, **geometry})
                self.relu = nn.ReLU(inplace=True)

            def forward(self, x: Tensor) -> Tensor:
                x = self.first(x)
                return self.relu(self.a(x) + x) if not geometry else self.a(x)

        self.body = fx.symbolic_trace(Body().eval())

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.body(x).float(), None


@pytest.fixture
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="Numba has no build for this machine")
    if not module._is_supported(torch.bfloat16):
        pytest.skip("oneDNN does not compute in bfloat16 on this machine")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def ways(network: nn.Module, dtype: torch.dtype = torch.bfloat16, side: int = SIDE) -> list[bool]:
    """Of the convolutions of a packed network, which go Winograd's way."""
    network = network.to(dtype, memory_format=torch.channels_last)
    found = packed(network, batch()[..., :side, :side].to(dtype), dtype, 4)
    return [isinstance(each, module.WinogradConvolution) for each in convolutions(found)]


def test_winograds_way_is_fused_as_others_are(no_amx: None) -> None:
    network = Wide().to(torch.bfloat16, memory_format=torch.channels_last)
    found = packed(network, batch().bfloat16(), torch.bfloat16, 4)
    first, last = convolutions(found)
    assert (type(first), type(last)) == (Convolution, module.WinogradConvolution)
    assert last.relu == "relu"
    exact = copy.deepcopy(network).float()
    for images in (1, 4, 9):
        with torch.no_grad():
            expected, given = exact(batch(images))[0], found(batch(images).bfloat16())[0]
        assert float((given - expected).abs().max()) < 0.03 * float(expected.max())


@pytest.mark.parametrize("geometry", [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}])
def test_other_geometries_do_not_go_winograds_way(no_amx: None, geometry: dict[str, int]) -> None:
    assert ways(Wide(**geometry)) == [False, False]


def test_where_winograds_way_does_not_pay_none_goes_it(no_amx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ways(Wide(), side=7) == [False, False]
    assert ways(Wide(), torch.float32) == [False, False]
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert ways(Wide()) == [False, False]


def test_without_numba_none_goes_winograds_way(no_amx: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pipeline.winograd", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert ways(Wide()) == [False, False]
