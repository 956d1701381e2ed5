"""winograd: the numbers of a plain convolution, to bfloat16's rounding, for every size and whatever follows it."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("numba", reason="Numba has no build for this machine")

from pipeline import winograd
from pipeline.winograd import Filters

TOLERANCE = 0.05
"""Largest error, in the spread of the outputs: a bfloat16 keeps 8 bits, and rounded numbers are added up."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made


def convolve(x: Tensor, filters: Filters, beside: Tensor | None = None, relu: bool = False) -> Tensor:
    found: Tensor = torch.ops.nightshift.winograd(x, beside, filters.key, len(filters.bias), relu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    return found


def check(x: Tensor, outputs: int, *, bias: bool = True, beside: Tensor | None = None, relu: bool = False) -> None:
    weight, shift = noise(outputs, x.shape[1], 3, 3, seed=1), noise(outputs, seed=2) if bias else None
    expected = functional.conv2d(x.float(), weight.float(), None if shift is None else shift.float(), padding=1)
    spread = float(expected.std())
    expected = expected if beside is None else expected + beside.float()
    found = convolve(x, Filters(weight, shift), beside, relu)
    assert float((found.float() - (expected.relu() if relu else expected)).abs().max()) < TOLERANCE * spread


@pytest.mark.parametrize("height", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("width", [1, 2, 5, 14])
def test_any_size(height: int, width: int) -> None:
    check(noise(2, 16, height, width), 24)


@pytest.mark.parametrize("channels", [1, 3, 64, 100])
def test_any_number_of_channels(channels: int) -> None:
    check(noise(1, channels, 10, 10), channels + 1)


def test_more_patches_than_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "PATCHES_AT_ONCE", 15)  # 3 lines of 5: some begin in one image and end in the next
    check(noise(5, 16, 7, 9), 16, beside=noise(5, 16, 7, 9, seed=3), relu=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_what_follows_it(bias: bool, relu: bool, added: bool) -> None:
    check(noise(3, 16, 8, 8), 16, bias=bias, relu=relu, beside=noise(3, 16, 8, 8, seed=3) if added else None)


def test_channels_that_come_first_are_taken_too() -> None:
    x, beside = noise(2, 16, 8, 8), noise(2, 16, 8, 8, seed=3)
    filters = Filters(noise(16, 16, 3, 3), None)
    first = convolve(x.contiguous(), filters, beside.contiguous())
    assert torch.equal(first, convolve(x, filters, beside))


def test_nothing_that_it_is_given_is_written() -> None:
    x, beside = noise(2, 16, 8, 8), noise(2, 16, 8, 8, seed=3)
    before = x.clone(), beside.clone()
    convolve(x, Filters(noise(16, 16, 3, 3), None), beside, relu=True)
    assert torch.equal(x, before[0])
    assert torch.equal(beside, before[1])


def test_what_is_no_number_is_not_lost_in_the_relu() -> None:
    x = noise(2, 16, 8, 8)
    x[1, 3, 4, 4] = float("nan")
    found = convolve(x, Filters(noise(16, 16, 3, 3), None), relu=True)
    assert found[1, :, 3:6, 3:6].isnan().all()
    assert found[0].isfinite().all()


@pytest.mark.parametrize("beside", [noise(2, 16, 1, 1), noise(1, 16, 8, 8), noise(2, 16, 8, 8).float()])
def test_another_shape_or_type_beside_it_is_refused(beside: Tensor) -> None:
    with pytest.raises(ValueError, match="beside"):
        convolve(noise(2, 16, 8, 8), Filters(noise(16, 16, 3, 3), None), beside)


def test_torch_compile_takes_it_whole() -> None:
    filters = Filters(noise(16, 16, 3, 3), noise(16))
    x = noise(2, 16, 8, 8)
    torch.library.opcheck(torch.ops.nightshift.winograd, (x, None, filters.key, 16, True))
    torch.library.opcheck(torch.ops.nightshift.winograd, (x, x, filters.key, 16, False))


def test_filters_leave_with_their_network() -> None:
    network = nn.Module()
    network.filters = Filters(noise(16, 16, 3, 3), None)
    key = network.filters.key
    assert key in winograd.ALIVE
    del network
    gc.collect()
    assert key not in winograd.ALIVE
