"""Name → network: its transform, its head and width, its weights and its class names.

On the driver `resolve` checks a choice and describes it; in each actor `build` makes the network of that description.
"""

import difflib
import hashlib
import importlib
import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from pipeline import storage
from pipeline.config import Transform
from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.vision import torchvision
from pipeline.weights import SUFFIXES, align, fetch_weights, fit, named_hash, official_uri, read_labels, read_state

RGB = 3
KEEPS_SHAPE = {"normal_", "uniform_", "batch_norm"}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All that an actor needs to build the same network; small, and picklable.

    weights: for people: "ResNet50_Weights.IMAGENET1K_V2", a URI, or "random".
    weights_uri: where the file is fetched; None for random weights and for a function that brings its own.
    own_weights: whether they are torchvision's, timm's or the function's own, and no file that was trained elsewhere.
    sha256: hex, of the file; of every tensor where a function brings its own weights; "" for random ones.
    embedding_dim: width of the input of the last classifier. num_classes: 0 where there is no classifier.
    in_channels: 3 (RGB) or 1 (luma). labels: class names, num_classes of them, or none where no head was asked for.
    head: the classifier's name among the network's modules, "" where it has none.
    """

    model: str
    weights: str
    weights_uri: str | None
    own_weights: bool
    sha256: str
    seed: int
    transform: Transform
    embedding_dim: int
    num_classes: int
    in_channels: int
    labels: tuple[str, ...]
    head: str


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

    def head(self, features: Tensor) -> Tensor:
        """Embedding → logits [N, num_classes].

        Where a ReLU and the pooling follow the classifier (SqueezeNet) only `forward` gives the network's own logits.
        """
        if isinstance(self.classifier, nn.Conv2d):
            return functional.linear(features, self.classifier.weight.flatten(1), self.classifier.bias)
        if self.classifier is None:
            raise ValueError("this network has no classifier")
        return cast(Tensor, self.classifier(features))


class _Beside(nn.Module):
    """A 1 × 1 convolution's output and its input, side by side: the pooling after it then pools both."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), x], 1)


def resolve(model: str, weights: str, *, labels: str | None = None, seed: int = 0, need_head: bool = True) -> ModelSpec:
    """Check everything that can be wrong with a choice of network, without running data or touching a GPU.

    model: a torchvision name, `timm:<name>`, or `package.module:function`, a function that returns the network, or the
    network and its Transform.
    weights: DEFAULT, a name of torchvision's enum, a path or URI of .pt, .pth, .bin or .safetensors, or random.
    labels: a file of class names. need_head: False where only the embedding is wanted; a checkpoint may then lack it.
    Raises SettingRefused and WeightsRefused.
    """
    family = _find_family(model, seed)
    source = family.source(weights)
    path, sha256 = fetch_weights(source.uri, family.is_official(source)) if source.uri else ("", "")
    source = family.recognise(source, sha256)
    sizes = {"image_size": (source.transform or family.transform).crop}
    network = family.skeleton(source.own, sizes)
    transform = source.transform or family.transform
    shape = _probe(network, model, transform.crop)
    if path and not (source.own and family.loads_own):
        shape = _check_state(family, network, sizes, shape, source, path, need_head)
    elif source.own and not path:
        sha256 = _digest(network)
    if shape.channels not in (1, RGB):
        raise WeightsRefused(
            f"{model} with weights {source.name} takes {shape.channels} channels: images are decoded to 3 (RGB), and "
            "reduced to 1 (luma) where a network takes 1; name a network of 3 or 1"
        )
    if need_head and not shape.classes:
        raise WeightsRefused(f"{model} does not end in a classifier: embed with it, or name a network that classifies")
    names = read_labels(labels, shape.classes) if labels and need_head else source.labels
    if len(names) != shape.classes:
        names = tuple(map(str, range(shape.classes)))
    return ModelSpec(
        model=model,
        weights=source.name,
        weights_uri=source.uri,
        own_weights=source.own,
        sha256=sha256,
        seed=seed,
        transform=_for_channels(transform, shape.channels),
        embedding_dim=shape.width,
        num_classes=shape.classes,
        in_channels=shape.channels,
        labels=names,
        head=shape.head,
    )


def build(spec: ModelSpec) -> Network:
    """The network that `resolve` described, in evaluation mode, float32, on the CPU.

    Raises WeightsRefused where the weights cannot be had on this node, or are not the ones that were described.
    """
    family = _find_family(spec.model, spec.seed)
    source = _Source(spec.weights, spec.weights_uri, spec.own_weights)
    sizes = {"num_classes": spec.num_classes, "in_channels": spec.in_channels, "image_size": spec.transform.crop}
    if spec.weights_uri is None:
        body = family.random(source.own, sizes)
        sha256 = _digest(body) if source.own else ""
    else:
        path, sha256 = fetch_weights(spec.weights_uri, family.is_official(source))
    if sha256 != spec.sha256:
        raise WeightsRefused(
            f"weights {spec.weights} of {spec.model} have sha256 {sha256[:10]}… on this node and {spec.sha256[:10]}… "
            "where the run began: give every node the same file, and start the run again"
        )
    if spec.weights_uri is not None:
        body = family.load(source, path, sizes, spec.head)
    return Network(body, spec.head, spec.num_classes).eval()


@dataclass(frozen=True, slots=True)
class _Source:
    """Where weights come from, and what is known with them. The fields are those of ModelSpec."""

    name: str
    uri: str | None
    own: bool
    labels: tuple[str, ...] = ()
    transform: Transform | None = None


@dataclass(frozen=True, slots=True)
class _Shape:
    head: str
    width: int
    classes: int
    channels: int


class _Family:
    """Networks that are named, built and loaded in one way."""

    loads_own = False
    transform = Transform()

    def __init__(self, model: str, seed: int) -> None:
        self.model, self.seed = model, seed

    def network(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        """Build it. sizes: num_classes, in_channels, image_size; absent or 0 where the network has its own."""
        raise NotImplementedError

    def find_own(self, weights: str) -> _Source | None:
        """The family's own weights of this name; None where it has none."""
        raise NotImplementedError

    def own_names(self) -> list[str]:
        return ["DEFAULT"]

    def source(self, weights: str) -> _Source:
        if weights == "random":
            return _Source(weights, None, False)
        if own := self.find_own(weights):
            return own
        if storage.redact(weights).endswith(SUFFIXES):
            uri = storage.normalize(weights)
            return _Source(storage.redact(uri), uri, False)
        raise WeightsRefused(
            f"--weights {weights!r} of {self.model} is unknown: choose {', '.join(self.own_names())}, random, "
            f"or a path or URI that ends in {', '.join(SUFFIXES)}"
        )

    def is_official(self, source: _Source) -> bool:
        return False

    def recognise(self, source: _Source, sha256: str) -> _Source:
        """The same file, and what is known of it by its sha256."""
        return source

    def skeleton(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        """The network with parameters that take no memory and hold no values."""
        with _weightless():
            return self.network(own, sizes)

    def random(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        """The network as it initialises itself, the same in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return self.network(own, sizes)

    def load(self, source: _Source, path: str, sizes: dict[str, int], head: str) -> nn.Module:
        network = self.skeleton(source.own, sizes)
        fit(network, align(read_state(path), network.state_dict()), f"{self.model} and {source.name}", head)
        return network


class _Torchvision(_Family):
    def __init__(self, model: str, seed: int) -> None:
        super().__init__(model, seed)
        names = torchvision.models.list_models(module=torchvision.models)
        if model not in names:
            close = difflib.get_close_matches(model, names, 3) or ["resnet50"]
            raise SettingRefused(
                f"--model {model!r} is unknown: did you mean {', '.join(close)}? Others are timm:<name> and "
                "package.module:function"
            )
        self.builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(model)
        self.enum: Any = torchvision.models.get_model_weights(model)
        self.transform = _of_preset(self.enum.DEFAULT)

    def network(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        takes = inspect.signature(inspect.signature(self.builder).return_annotation).parameters
        # transform_input: what torchvision sets for the weights that were converted from another framework.
        options: dict[str, Any] = {"aux_logits": False, "init_weights": True, "transform_input": own}
        options |= {name: value for name, value in sizes.items() if value}
        channels = options.pop("in_channels", RGB)
        network = self.builder(weights=None, **{name: value for name, value in options.items() if name in takes})
        if channels != RGB:
            _set_in_channels(network, channels)
        return network

    def find_own(self, weights: str) -> _Source | None:
        found = self.enum.__members__.get(weights.removeprefix(f"{self.enum.__name__}."))
        return found and self._own(found, official_uri(found.url))

    def _own(self, member: Any, uri: str | None) -> _Source:
        return _Source(str(member), uri, True, tuple(member.meta["categories"]), _of_preset(member))

    def own_names(self) -> list[str]:
        return list(self.enum.__members__)

    def is_official(self, source: _Source) -> bool:
        return source.own

    def recognise(self, source: _Source, sha256: str) -> _Source:
        for member in self.enum if source.uri and not source.own else ():
            if sha256.startswith(named_hash(member.url) or "no hash"):
                return self._own(member, source.uri)
        return source


class _Timm(_Family):
    loads_own = True  # some of its checkpoints are renamed and reshaped as they load

    def __init__(self, model: str, seed: int) -> None:
        super().__init__(model, seed)
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError as error:
            raise SettingRefused(f"--model {model} needs timm: pip install 'nightshift[timm]'") from error
        self.timm, self.name = timm, model.removeprefix("timm:")
        try:
            self.config: dict[str, Any] = timm.get_pretrained_cfg(self.name).to_dict()
            if not timm.is_model(self.name):
                raise RuntimeError("unknown model")
        except Exception as error:
            close = difflib.get_close_matches(self.name, timm.list_models(), 3)
            raise SettingRefused(f"--model {model!r} is unknown ({error}): did you mean {close}?") from error
        data = timm.data.resolve_data_config({}, pretrained_cfg=self.config)
        _, height, width = data["input_size"]
        if height != width:
            raise SettingRefused(f"--model {model} takes {height} × {width} pixels: only square images are made")
        how = data["interpolation"] if data["interpolation"] != "random" else "bilinear"
        resize = math.floor(height / data["crop_pct"])
        self.transform = Transform(resize, height, how, tuple(data["mean"]), tuple(data["std"]))

    def network(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        names = {"num_classes": sizes.get("num_classes"), "in_chans": sizes.get("in_channels")}
        given = {name: value for name, value in names.items() if value}
        network: nn.Module = self.timm.create_model(self.name, pretrained=False, **given)
        return network

    def find_own(self, weights: str) -> _Source | None:
        hub, url = self.config.get("hf_hub_id"), self.config.get("url")
        if weights != "DEFAULT" or not (hub or url):
            return None
        uri = f"hf://{hub}/{self.config.get('hf_hub_filename') or 'model.safetensors'}" if hub else url
        return _Source(f"timm:{self.config['architecture']}.{self.config['tag']}", uri, True, self._labels())

    def _labels(self) -> tuple[str, ...]:
        names = self.config.get("label_names")
        if not names and (subset := self.timm.data.infer_imagenet_subset(self.config)):
            info = self.timm.data.ImageNetInfo(subset)
            names = [info.index_to_description(index) for index in range(info.num_classes())]
        return tuple(names or ())

    def load(self, source: _Source, path: str, sizes: dict[str, int], head: str) -> nn.Module:
        if not source.own:
            return super().load(source, path, sizes, head)
        overlay = {"file": path, "hf_hub_id": None, "url": ""}
        network: nn.Module = self.timm.create_model(self.name, pretrained=True, pretrained_cfg_overlay=overlay)
        return network


class _Function(_Family):
    def __init__(self, model: str, seed: int) -> None:
        super().__init__(model, seed)
        module, _, name = model.partition(":")
        try:
            self.function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise SettingRefused(
                f"--model {model} cannot be imported: {error}; write package.module:function, and set PYTHONPATH "
                "so that every node finds it"
            ) from error

    def network(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        try:
            found = self.function()
        except Exception as error:
            raise SettingRefused(f"--model {self.model} failed: {type(error).__name__}: {error}") from error
        network, self.transform = found if isinstance(found, tuple) else (found, Transform())
        if not isinstance(network, nn.Module) or not isinstance(self.transform, Transform):
            raise SettingRefused(
                f"--model {self.model} returned {type(found).__name__}: it must return a torch.nn.Module, or "
                "a tuple of one and its Transform"
            )
        return network.cpu().float()

    def find_own(self, weights: str) -> _Source | None:
        return _Source(self.model, None, True) if weights == "DEFAULT" else None

    def skeleton(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        return self.random(own, sizes)  # it may load its own weights, which needs real memory


def _find_family(model: str, seed: int) -> _Family:
    kind = _Timm if model.startswith("timm:") else _Function if ":" in model else _Torchvision
    return kind(model, seed)


@contextmanager
def _weightless() -> Iterator[None]:
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


def _probe(network: nn.Module, model: str, crop: int) -> _Shape:
    """Follow one image's shapes through the network, to find its last classifier by what it computes, not by name."""
    device = "meta" if any(parameter.is_meta for parameter in network.parameters()) else "cpu"
    channels = _first_convolution(network)[1]
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
        return _Shape(name, module.in_features, module.out_features, channels)
    if name and isinstance(module, nn.Conv2d) and _is_pooled_after(network, name, module, image, output):
        return _Shape(name, module.in_channels, module.out_channels, channels)
    return _Shape("", output.shape[1], 0, channels)


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


def _check_state(
    family: _Family,
    network: nn.Module,
    sizes: dict[str, int],
    shape: _Shape,
    source: _Source,
    path: str,
    need_head: bool,
) -> _Shape:
    """The shape of the network that fits the file; WeightsRefused where none does."""
    state = align(read_state(path), network.state_dict())
    channels = _size(state, f"{_first_convolution(network)[0]}.weight", 1, shape.channels)
    classes = _size(state, f"{shape.head}.weight", 0, shape.classes)
    if (classes, channels) != (shape.classes, shape.channels):
        network = family.skeleton(source.own, sizes | {"num_classes": classes, "in_channels": channels})
    has_head = fit(network, state, f"{family.model} and {source.name}", "" if need_head else shape.head)
    return replace(shape, classes=classes if has_head else 0, channels=channels)


def _size(state: "OrderedDict[str, Tensor]", name: str, axis: int, default: int) -> int:
    return state[name].shape[axis] if name in state and state[name].ndim > axis else default


def _first_convolution(network: nn.Module) -> tuple[str, int]:
    """Its name and its number of input channels."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            return name, module.in_channels
    return "", RGB


def _set_in_channels(network: nn.Module, channels: int) -> None:
    name, _ = _first_convolution(network)
    old = cast(nn.Conv2d, network.get_submodule(name))
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    settings = {key: getattr(old, key) for key in names}
    network.set_submodule(name, nn.Conv2d(channels, old.out_channels, bias=old.bias is not None, **settings))


def _for_channels(transform: Transform, channels: int) -> Transform:
    """Of one channel, the mean of the three means and deviations."""
    if channels != 1:
        return transform
    mean, std = (sum(values) / len(values) for values in (transform.mean, transform.std))
    return replace(transform, mean=(mean,), std=(std,))


def _of_preset(member: Any) -> Transform:
    """torchvision.transforms._presets.ImageClassification as a Transform."""
    preset = member.transforms()
    how = preset.interpolation.value
    return Transform(preset.resize_size[0], preset.crop_size[0], how, tuple(preset.mean), tuple(preset.std))


def _digest(network: nn.Module) -> str:
    """sha256 of every tensor, with its name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
