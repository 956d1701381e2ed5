"""A network's last classifier: found by what it computes, and cut off, so that its input is the embedding."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from pipeline.errors import SettingRefused

RGB = 3
KEEPS_SHAPE = {"normal_", "uniform_", "batch_norm"}


class Network(nn.Module):
    """A network cut before its last classifier: a Linear or a 1 × 1 convolution named `head`, dropped for 0 classes."""

    def __init__(self, body: nn.Module, head: str, num_classes: int) -> None:
        super().__init__()
        found = body.get_submodule(head) if head else None
        self.classifier = found if num_classes else None
        self.beside = num_classes if isinstance(found, nn.Conv2d) else 0
        if found is not None:
            body.set_submodule(head, _Beside(found) if self.beside else nn.Identity())
        self.body = body

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised float [N, C, H, W] → embedding [N, embedding_dim], logits [N, num_classes] or None."""
        found: Tensor = self.body(x)
        if self.beside:
            return found[:, self.beside :], found[:, : self.beside]
        return found, None if self.classifier is None else self.classifier(found)

    def features(self, x: Tensor) -> Tensor:
        """Normalised float [N, C, H, W] → embedding [N, embedding_dim], averaged over H and W before a convolution."""
        return self.forward(x)[0]


class _Beside(nn.Module):
    """A 1 × 1 convolution's output and its input, side by side: the pooling after it then pools both."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), x], 1)


@dataclass(frozen=True, slots=True)
class Shape:
    head: str
    width: int
    classes: int
    channels: int


def probe(network: nn.Module, model: str, crop: int) -> Shape:
    """Follow one image's shapes through the network, to find its last classifier by what it computes, not by name."""
    device = "meta" if any(parameter.is_meta for parameter in network.parameters()) else "cpu"
    channels = first_convolution(network)[1]
    image = torch.zeros(1, channels, crop, crop, device=device)
    ran: list[tuple[str, nn.Module, Tensor]] = []
    network.to(device).eval()
    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: ran.append((name, module, output)))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with torch.no_grad(), _ShapesOnly():
            output = network(image)
    except Exception as error:
        raise SettingRefused(f"--model {model} cannot take a {crop} × {crop} image: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise SettingRefused(f"--model {model} gives {found} for one image: it must give one tensor [N, width]")
    name, module, result = ran[-1] if ran else ("", network, output)
    if isinstance(module, nn.Linear) and result.untyped_storage()._cdata == output.untyped_storage()._cdata:
        return Shape(name, module.in_features, module.out_features, channels)
    if name and isinstance(module, nn.Conv2d) and _is_pooled_after(network, name, module, image, output):
        return Shape(name, module.in_channels, module.out_channels, channels)
    if getattr(network, "num_classes", 0) == output.shape[1]:
        raise SettingRefused(
            f"--model {model} ends in several classifiers, or in one that cannot be told from what is before it: its "
            "embedding cannot be had; name another network, or a package.module:function that returns the embedding"
        )
    return Shape("", output.shape[1], 0, channels)


def _is_pooled_after(network: nn.Module, name: str, conv: nn.Conv2d, image: Tensor, output: Tensor) -> bool:
    """Whether what follows the convolution treats each channel alike: its input then comes out beside its output."""
    if set(conv.kernel_size) != {1} or conv.groups != 1 or output.shape[1] != conv.out_channels:
        return False
    network.set_submodule(name, _Beside(conv))
    try:
        with torch.no_grad():
            return bool(network(image).shape[1] == conv.out_channels + conv.in_channels)
    except RuntimeError:
        return False
    finally:
        network.set_submodule(name, conv)


def first_convolution(network: nn.Module) -> tuple[str, int]:
    """Its name and its number of input channels."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module.in_channels
    return "", RGB


@contextmanager
def weightless() -> Iterator[None]:
    """Modules made inside get parameters on the meta device, buffers as they are.

    Not `torch.device("meta")`: RegNet computes its sizes with tensors.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        with _ShapesOnly():
            yield
    finally:
        handle.remove()


class _ShapesOnly(TorchFunctionMode):
    """Shapes that torch finds in Python on the meta device, for which it would import its compiler, for 2 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func.__name__ in KEEPS_SHAPE:
                return args[0]
            if func.__name__ == "linear":
                return torch.empty((*args[0].shape[:-1], args[1].shape[0]), device="meta")
            if func.__name__ == "adaptive_avg_pool2d":
                size = args[1] if isinstance(args[1], Sequence) else (args[1], args[1])
                kept = [wanted or had for wanted, had in zip(size, args[0].shape[-2:], strict=True)]
                return torch.empty((*args[0].shape[:-2], *kept), device="meta")
        return func(*args, **(kwargs or {}))
