"""Finds a network's classifier by tracing shapes, and removes it, so that its input is the embedding."""

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
    """A network without its classifier, and the classifier.

    body: the whole network; is modified. head: name of its classifier, a Linear or a 1 × 1 convolution; "" if it has
    none. num_classes: 0 leaves the classifier out.
    """

    def __init__(self, body: nn.Module, head: str, num_classes: int) -> None:
        super().__init__()
        layer = body.get_submodule(head) if head else None
        self.classifier = layer if num_classes else None
        self.logit_channels = num_classes if isinstance(layer, nn.Conv2d) else 0
        if layer is not None:
            body.set_submodule(head, _OutputAndInput(layer) if self.logit_channels else nn.Identity())
        self.body = body

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised float [N, C, H, W] → embedding [N, embedding_dim], and logits [N, num_classes] or None."""
        output: Tensor = self.body(x)
        if self.logit_channels:
            return output[:, self.logit_channels :], output[:, : self.logit_channels]
        return output, None if self.classifier is None else self.classifier(output)

    def features(self, x: Tensor) -> Tensor:
        """Normalised float [N, C, H, W] → embedding [N, embedding_dim].

        The input of a convolution is pooled over H and W, as its output is in the network.
        """
        return self.forward(x)[0]


class _OutputAndInput(nn.Module):
    """Channels of a 1 × 1 convolution's output, then those of its input. The pooling after it pools both."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), x], 1)


@dataclass(frozen=True, slots=True)
class Shape:
    """head: name of the classifier; "" if there is none. width: of the embedding. classes: 0 without a classifier.
    channels: of the input images."""

    head: str
    width: int
    classes: int
    channels: int


def find_classifier(network: nn.Module, model: str, crop: int) -> Shape:
    """Trace the shapes of one image of crop × crop pixels through the network, and find its last classifier.

    The classifier is the last layer, whatever its name: a Linear whose output is the network's output, or a 1 × 1
    convolution that only pooling follows. model: the name for messages.
    Raises SettingRefused if the network cannot take the image, does not return one tensor [N, width], ends in several
    classifiers, or is TorchScript, whose layers cannot be told apart.
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise SettingRefused(
            f"--model {model} returns TorchScript, whose classifier cannot be separated from the layers before it: "
            "return the torch.nn.Module that it was made from; if its output is the embedding, return a "
            "torch.nn.Module that calls it"
        )
    if not all(isinstance(value, Tensor) for value in network.state_dict().values()):
        raise SettingRefused(
            f"--model {model} has weights that are not tensors, as quantized ones: return it in float32"
        )
    device = "meta" if any(parameter.is_meta for parameter in network.parameters()) else "cpu"
    channels = first_convolution(network)[1]
    image = torch.zeros(1, channels, crop, crop, device=device)
    try:
        network.to(device).eval()
        output, (name, layer, result) = _trace(network, image)
    except Exception as error:  # the network may be the user's own and raise anything
        raise SettingRefused(f"--model {model} cannot take a {crop} × {crop} image: {error}") from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        returned = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise SettingRefused(f"--model {model} returns {returned} for one image: it must return one tensor [N, width]")
    if isinstance(layer, nn.Linear) and result.untyped_storage()._cdata == output.untyped_storage()._cdata:
        return Shape(name, layer.in_features, layer.out_features, channels)
    if isinstance(layer, nn.Conv2d) and name and _is_only_pooled(network, name, layer, image, output):
        return Shape(name, layer.in_channels, layer.out_channels, channels)
    if getattr(network, "num_classes", 0) == output.shape[1]:
        raise SettingRefused(
            f"--model {model} ends in several classifiers, or in one that cannot be separated from the layers before "
            "it, so it has no embedding; name another network, or a package.module:function that returns the embedding"
        )
    return Shape("", output.shape[1], 0, channels)


def resize_classifier(network: nn.Module, head: str, classes: int) -> None:
    """Give a classifier, a Linear or a 1 × 1 convolution, tensors for another number of classes, without values.

    The layer stays the same object, so that a subclass and its hooks are kept.
    """
    layer: Any = network.get_submodule(head)
    layer.weight = nn.Parameter(layer.weight.new_empty(classes, *layer.weight.shape[1:]))
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_empty(classes))
    name = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    setattr(layer, name, classes)


def new_classifier(network: nn.Module, head: str, classes: int) -> None:
    """Give a classifier tensors for another number of classes, on the CPU, whose values are 0."""
    resize_classifier(network, head, classes)
    layer: Any = network.get_submodule(head)
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(layer.bias.shape))


def _trace(network: nn.Module, image: Tensor) -> tuple[Any, tuple[str, nn.Module, Any]]:
    """The network's output; and the Linear or convolution that ran last, with its name and its output."""
    ran: list[tuple[str, nn.Module, Any]] = []
    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: ran.append((name, module, output)))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with torch.no_grad(), _ShapesOnly():
            output = network(image)
    finally:
        for hook in hooks:
            hook.remove()
    return output, ran[-1] if ran else ("", network, output)


def _is_only_pooled(network: nn.Module, name: str, conv: nn.Conv2d, image: Tensor, output: Tensor) -> bool:
    """Whether the layers after a 1 × 1 convolution treat each channel separately, as pooling does.

    If so, they also take the channels of its input, and return them behind those of its output.
    """
    if set(conv.kernel_size) != {1} or conv.groups != 1 or output.shape[1] != conv.out_channels:
        return False
    network.set_submodule(name, _OutputAndInput(conv))
    try:
        with torch.no_grad():
            return bool(network(image).shape[1] == conv.out_channels + conv.in_channels)
    except RuntimeError:
        return False
    finally:
        network.set_submodule(name, conv)


def first_convolution(network: nn.Module) -> tuple[str, int]:
    """Name and number of input channels of the first convolution; ("", 3) if there is none."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module.in_channels
    return "", RGB


@contextmanager
def weightless() -> Iterator[None]:
    """Create modules with parameters on the meta device, which takes no memory. Buffers are created as usual.

    `torch.device("meta")` does not work here, because RegNet computes its sizes with tensors.
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
    """Computes output shapes of some functions on the meta device, for which torch would import its compiler (2 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func.__name__ in KEEPS_SHAPE:
                return args[0]
            if func.__name__ == "linear":
                return torch.empty((*args[0].shape[:-1], args[1].shape[0]), device="meta")
            if func.__name__ == "adaptive_avg_pool2d":
                size = args[1] if isinstance(args[1], Sequence) else (args[1], args[1])
                pooled = [new or old for new, old in zip(size, args[0].shape[-2:], strict=True)]
                return torch.empty((*args[0].shape[:-2], *pooled), device="meta")
        return func(*args, **(kwargs or {}))
