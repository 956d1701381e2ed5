"""A CPU's convolutions with weights in oneDNN's own layout, and with the sum and the ReLU behind them in one pass.

Else oneDNN lays out the weights anew for every batch, and each sum and ReLU goes over the memory once more. What
torch.compile does where it freezes a network (torch/_inductor/fx_passes/mkldnn_fusion.py), without compiling.
"""

import copy
import logging
import operator
import platform
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

log = logging.getLogger(__name__)

AGREES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of a packed network's output from the plain one's, of the largest number in it."""

WINOGRAD_CHANNELS, WINOGRAD_SIDE = 64, 8
"""Of what a convolution is given, at least. With 7 × 7 pixels, what is saved is lost to the weights, which grow to
16/9 (ResNet-50)."""

ADDS = {operator.add, operator.iadd, torch.add}
RELUS = {torch.relu, nn.functional.relu}


def packed(network: nn.Module, image: Tensor, dtype: torch.dtype, batch_size: int) -> nn.Module:
    """A network that computes the same from any batch, fastest from one of this size; the network itself where that
    cannot be. To be called in a thread such as it will run in.

    network: returns tensors and None in a tuple. image: a batch of one. dtype: what it computes in.
    """
    if not _is_supported(dtype):
        return network
    with torch.no_grad():
        try:
            sizes, plain = _sizes(network, image)
        except Exception as error:  # a network may be anybody's
            log.debug("its convolutions are not packed, since it cannot take noise: %s", error)
            return network
        for fuses in (True, False):
            try:
                found = _packed(network, sizes, batch_size, fuses)
                if all(_agree(*each, AGREES[dtype]) for each in zip(plain, found(image), strict=True)):
                    return found
            except Exception as error:  # these operators are torch's own business
                log.debug("its convolutions cannot be packed (fused: %s): %s", fuses, error)
    return network


def _packed(network: nn.Module, sizes: Mapping[str, torch.Size], batch_size: int, fuses: bool) -> nn.Module:
    found = copy.deepcopy(network)
    for name, size in sizes.items():
        found.set_submodule(name, _convolution(found.get_submodule(name), size, batch_size))
    for module in found.modules() if fuses else ():
        if isinstance(module, fx.GraphModule):
            _fuse(module)
    return found


def _is_supported(dtype: torch.dtype) -> bool:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ops: Any = torch.ops.mkldnn
    return bool(
        dtype is torch.float32
        or (dtype is torch.bfloat16 and ops._is_mkldnn_bf16_supported())
        or (dtype is torch.float16 and ops._is_mkldnn_fp16_supported())
    )


def _agree(plain: Tensor | None, other: Tensor | None, share: float) -> bool:
    if plain is None or other is None:
        return plain is other
    return bool((plain - other).abs().max() <= share * plain.abs().max())


def _sizes(network: nn.Module, image: Tensor) -> tuple[dict[str, torch.Size], tuple[Tensor | None, ...]]:
    """The convolutions that can be packed, by name, with the sizes of what they are given; and the network's output."""
    found: dict[str, torch.Size] = {}
    hooks = [
        module.register_forward_hook(lambda _, given, __, name=name: found.update({name: given[0].shape}))
        for name, module in network.named_modules()
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and isinstance(module.padding, tuple)
    ]
    try:
        outputs = network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return found, outputs


class Convolution(nn.Module):
    """A convolution; then the sum with what it is given beside, if it is; then a ReLU, if `relu` is "relu".

    in_place: the sum may overwrite what is given beside.
    """

    relu: str | None = None
    in_place = False

    def __init__(self, plain: nn.Conv2d, size: list[int]) -> None:
        """size: of the batches that it will be given most often."""
        super().__init__()
        self.geometry = list(plain.padding), list(plain.stride), list(plain.dilation), plain.groups
        # Attributes, no buffers: a tensor in oneDNN's layout can be neither copied nor moved as others are.
        self.bias = None if plain.bias is None else plain.bias.detach()
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(plain.weight.detach(), *self.geometry, size)

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        ops: Any = torch.ops.mkldnn
        filters = self.weight, self.bias, *self.geometry
        if beside is None:
            found: Tensor = ops._convolution_pointwise(x, *filters, self.relu or "none", [], None)
        elif self.in_place:
            found = ops._convolution_pointwise_.binary(beside, x, *filters, "add", 1.0, self.relu, [], None)
        else:
            found = ops._convolution_pointwise.binary(x, beside, *filters, "add", 1.0, self.relu, [], None)
        return found


class WinogradConvolution(Convolution):
    """The same in Winograd's way; the sum never overwrites anything."""

    def __init__(self, plain: nn.Conv2d, filters: Any) -> None:
        """filters: winograd.Filters of the plain one."""
        nn.Module.__init__(self)
        self.filters, self.outputs = filters, plain.out_channels

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        found: Tensor = torch.ops.nightshift.winograd(x, beside, self.filters.key, self.outputs, self.relu is not None)
        return found


def _convolution(plain: nn.Module, size: torch.Size, batch_size: int) -> Convolution:
    """size: of what it is given for one image."""
    assert isinstance(plain, nn.Conv2d)
    if _suits_winograd(plain, size):
        try:
            from pipeline.winograd import Filters  # Numba's import and its compiler take their time
        except (ImportError, RuntimeError) as error:  # no Numba for this machine; no folder for what it compiles
            log.debug("no convolution in Winograd's way: %s", error)
        else:
            bias = None if plain.bias is None else plain.bias.detach()
            return WinogradConvolution(plain, Filters(plain.weight.detach(), bias))
    return Convolution(plain, [size[0] * batch_size, *size[1:]])


def _suits_winograd(plain: nn.Conv2d, size: torch.Size) -> bool:
    """AMX multiplies so fast that the way there and back costs more; in float32 memory is what is waited for."""
    geometry = plain.kernel_size, plain.stride, plain.padding, plain.dilation, plain.groups
    return (
        geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
        and plain.weight.dtype is torch.bfloat16
        and not torch.cpu._is_amx_tile_supported()
        and min(plain.in_channels, plain.out_channels) >= WINOGRAD_CHANNELS
        and min(size[2:]) >= WINOGRAD_SIDE
    )


def _fuse(traced: fx.GraphModule) -> None:
    """Give its packed convolutions the sums and ReLUs that follow them and that nothing else is made of."""
    places = {node: place for place, node in enumerate(traced.graph.nodes)}
    calls = Counter(node.target for node in places)
    for node in places:
        convolution = _module(node, traced)
        if not isinstance(convolution, Convolution) or calls[node.target] > 1:
            continue
        following = _only_user(node)
        beside = _other_summand(node, following)
        if following is not None and beside is not None and places[beside] < places[node]:
            convolution.in_place = _is_free(beside, node, places, traced)
            node.args = (*node.args, beside)
            following = _taken_over(node, following)
        if following is not None and _is_relu(following, traced):
            convolution.relu = "relu"
            _taken_over(node, following)
    traced.recompile()


def _module(node: fx.Node, traced: fx.GraphModule) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_summand(node: fx.Node, following: fx.Node | None) -> fx.Node | None:
    """What a node is summed up with, if that is what follows; None too where that is no node's output."""
    if following is None or following.target not in ADDS or following.kwargs:
        return None
    others = [each for each in following.args if each is not node]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _is_relu(node: fx.Node, traced: fx.GraphModule) -> bool:
    return isinstance(_module(node, traced), nn.ReLU) or node.target in RELUS


def _is_free(beside: fx.Node, node: fx.Node, places: dict[fx.Node, int], traced: fx.GraphModule) -> bool:
    """Whether a node's output may be overwritten here: memory of its own, and read before by convolutions alone, which
    keep no view of it."""
    is_own = isinstance(_module(beside, traced), Convolution | nn.MaxPool2d)
    if not is_own or beside in node.all_input_nodes:  # read while it is written
        return False
    earlier = [each for each in beside.users if node not in (each, *each.all_input_nodes)]
    return all(isinstance(_module(each, traced), Convolution) and places[each] < places[node] for each in earlier)


def _taken_over(node: fx.Node, following: fx.Node) -> fx.Node | None:
    """Let a node stand for what follows it; what follows then."""
    following.replace_all_uses_with(node)
    node.graph.erase_node(following)
    return _only_user(node)
