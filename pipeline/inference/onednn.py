"""CPU convolutions in oneDNN: weights reordered once, and a following sum and ReLU fused into the convolution.

Otherwise oneDNN reorders the weights for every batch, and each sum and ReLU reads and writes the activations once more.
torch.compile does the same when it freezes a network (torch/_inductor/fx_passes/mkldnn_fusion.py); this needs no
compiler.
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

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference between the outputs of a packed network and the plain one, relative to the largest output."""

ADDS = {operator.add, operator.iadd, torch.add}
RELUS = {torch.relu, nn.functional.relu}


def pack_convolutions(network: nn.Module, image: Tensor, dtype: torch.dtype, batch_size: int) -> nn.Module:
    """Return a copy of the network that computes the same with packed convolutions, or the network itself.

    The copy takes batches of any size and is fastest with batch_size. The network itself is returned if this machine
    or the network does not support packing, or if the outputs for `image` differ by more than TOLERANCE. Call it in a
    thread of the pool that will run the network.

    network: returns a tuple of tensors and None. image: a batch of one. dtype: number format of the convolutions.
    """
    if not _is_supported(dtype):
        return network
    with torch.no_grad():
        try:
            sizes, expected = _input_sizes(network, image)
        except Exception as error:  # the network may be the user's own and raise anything
            log.debug("convolutions are not packed, because the network fails on random pixels: %s", error)
            return network
        for fuse in (True, False):
            try:
                candidate = _pack(network, sizes, batch_size, fuse)
                outputs = candidate(image)
                if all(_is_close(*pair, TOLERANCE[dtype]) for pair in zip(expected, outputs, strict=True)):
                    return candidate
            except Exception as error:  # the operators are private to torch and may raise anything
                log.debug("convolutions cannot be packed (fused: %s): %s", fuse, error)
    return network


def _pack(network: nn.Module, sizes: Mapping[str, torch.Size], batch_size: int, fuse: bool) -> nn.Module:
    packed = copy.deepcopy(network)
    for name, size in sizes.items():
        plain = packed.get_submodule(name)
        assert isinstance(plain, nn.Conv2d)
        packed.set_submodule(name, Convolution(plain, [size[0] * batch_size, *size[1:]]))
    for module in packed.modules() if fuse else ():
        if isinstance(module, fx.GraphModule):
            _fuse(module)
    return packed


def _is_supported(dtype: torch.dtype) -> bool:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ops: Any = torch.ops.mkldnn
    return bool(
        dtype is torch.float32
        or (dtype is torch.bfloat16 and ops._is_mkldnn_bf16_supported())
        or (dtype is torch.float16 and ops._is_mkldnn_fp16_supported())
    )


def _is_close(expected: Tensor | None, output: Tensor | None, tolerance: float) -> bool:
    if expected is None or output is None:
        return expected is output
    return bool((expected - output).abs().max() <= tolerance * expected.abs().max())


def _input_sizes(network: nn.Module, image: Tensor) -> tuple[dict[str, torch.Size], tuple[Tensor | None, ...]]:
    """The convolutions that can be packed, by name, with the size of their input; and the network's outputs."""
    sizes: dict[str, torch.Size] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, __, name=name: sizes.update({name: inputs[0].shape}))
        for name, module in network.named_modules()
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and isinstance(module.padding, tuple)
    ]
    try:
        outputs = network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes, outputs


class Convolution(nn.Module):
    """relu(convolution(x) + summand). The sum and the ReLU are optional.

    relu: "relu" to apply a ReLU. in_place: the output may overwrite the summand.
    """

    relu: str | None = None
    in_place = False

    def __init__(self, plain: nn.Conv2d, size: list[int]) -> None:
        """size: of the most frequent input, [N, C, H, W]."""
        super().__init__()
        self.geometry = list(plain.padding), list(plain.stride), list(plain.dilation), plain.groups
        # Attributes instead of buffers: a tensor in oneDNN's layout cannot be copied or moved like other tensors.
        self.bias = None if plain.bias is None else plain.bias.detach()
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(plain.weight.detach(), *self.geometry, size)

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        ops: Any = torch.ops.mkldnn
        filters = self.weight, self.bias, *self.geometry
        if summand is None:
            output: Tensor = ops._convolution_pointwise(x, *filters, self.relu or "none", [], None)
        elif self.in_place:
            output = ops._convolution_pointwise_.binary(summand, x, *filters, "add", 1.0, self.relu, [], None)
        else:
            output = ops._convolution_pointwise.binary(x, summand, *filters, "add", 1.0, self.relu, [], None)
        return output


def _fuse(traced: fx.GraphModule) -> None:
    """Fuse each sum and ReLU into the packed convolution before it, if nothing else uses the convolution's output."""
    positions = {node: position for position, node in enumerate(traced.graph.nodes)}
    calls = Counter(node.target for node in positions)
    for node in positions:
        convolution = _module(node, traced)
        if not isinstance(convolution, Convolution) or calls[node.target] > 1:
            continue
        following = _only_user(node)
        summand = _summand(node, following)
        if following is not None and summand is not None and positions[summand] < positions[node]:
            convolution.in_place = _can_overwrite(summand, node, positions, traced)
            node.args = (*node.args, summand)
            following = _replace_by(node, following)
        if following is not None and _is_relu(following, traced):
            convolution.relu = "relu"
            _replace_by(node, following)
    traced.recompile()


def _module(node: fx.Node, traced: fx.GraphModule) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _summand(node: fx.Node, following: fx.Node | None) -> fx.Node | None:
    """The other node if `following` adds `node` and another node; else None."""
    if following is None or following.target not in ADDS or following.kwargs:
        return None
    others = [argument for argument in following.args if argument is not node]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _is_relu(node: fx.Node, traced: fx.GraphModule) -> bool:
    return isinstance(_module(node, traced), nn.ReLU) or node.target in RELUS


def _can_overwrite(summand: fx.Node, node: fx.Node, positions: dict[fx.Node, int], traced: fx.GraphModule) -> bool:
    """Whether `node` may overwrite the output of `summand`.

    The output must not share memory with another tensor. Its earlier users must be convolutions, which keep no view.
    """
    is_own = isinstance(_module(summand, traced), Convolution | nn.MaxPool2d)
    if not is_own or summand in node.all_input_nodes:  # a convolution cannot overwrite its own input
        return False
    others = [user for user in summand.users if node not in (user, *user.all_input_nodes)]
    return all(isinstance(_module(user, traced), Convolution) and positions[user] < positions[node] for user in others)


def _replace_by(node: fx.Node, following: fx.Node) -> fx.Node | None:
    """Remove `following` and let `node` provide its output; return the only user of that output, or None."""
    following.replace_all_uses_with(node)
    node.graph.erase_node(following)
    return _only_user(node)
