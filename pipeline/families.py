"""Where networks come from: torchvision, timm, or a function of one's own; how each names, builds and loads them."""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from pipeline import storage
from pipeline.config import Transform
from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.fetch import named_hash, official_uri
from pipeline.head import RGB, first_convolution, weightless
from pipeline.vision import torchvision
from pipeline.weights import SUFFIXES, align, fit, read_state


@dataclass(frozen=True, slots=True)
class WeightsSource:
    """Where weights come from, and what is known with them. The fields are those of ModelSpec."""

    name: str
    uri: str | None
    own: bool
    labels: tuple[str, ...] = ()
    transform: Transform | None = None


class Family:
    """Networks that are named, built and loaded in one way."""

    loads_own = False
    transform = Transform()

    def __init__(self, model: str, seed: int) -> None:
        self.model, self.seed = model, seed

    def network(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        """Build it. sizes: num_classes, in_channels, image_size; absent or 0 where the network has its own."""
        raise NotImplementedError

    def find_own(self, weights: str) -> WeightsSource | None:
        """The family's own weights of this name; None where it has none."""
        raise NotImplementedError

    def own_names(self) -> list[str]:
        return ["DEFAULT"]

    def source(self, weights: str) -> WeightsSource:
        if weights == "random":
            return WeightsSource(weights, None, False)
        if own := self.find_own(weights):
            return own
        if storage.redact(weights).endswith(SUFFIXES):
            uri = storage.normalize(weights)
            return WeightsSource(storage.redact(uri), uri, False)
        raise WeightsRefused(
            f"--weights {weights!r} of {self.model} is unknown: choose {', '.join(self.own_names())}, random, "
            f"or a path or URI that ends in {', '.join(SUFFIXES)}"
        )

    def is_official(self, source: WeightsSource) -> bool:
        return False

    def recognise(self, source: WeightsSource, sha256: str) -> WeightsSource:
        """The same file, and what is known of it by its sha256."""
        return source

    def skeleton(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        """The network with parameters that take no memory and hold no values."""
        with weightless():
            return self.network(own, sizes)

    def random(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        """The network as it initialises itself, the same in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return self.network(own, sizes)

    def load(self, source: WeightsSource, path: str, sizes: dict[str, int], head: str) -> nn.Module:
        network = self.skeleton(source.own, sizes)
        fit(network, align(read_state(path), network.state_dict()), f"{self.model} and {source.name}", head)
        return network


class _Torchvision(Family):
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

    def find_own(self, weights: str) -> WeightsSource | None:
        found = self.enum.__members__.get(weights.removeprefix(f"{self.enum.__name__}."))
        return found and self._own(found, official_uri(found.url))

    def _own(self, member: Any, uri: str | None) -> WeightsSource:
        return WeightsSource(str(member), uri, True, tuple(member.meta["categories"]), _of_preset(member))

    def own_names(self) -> list[str]:
        return list(self.enum.__members__)

    def is_official(self, source: WeightsSource) -> bool:
        return source.own

    def recognise(self, source: WeightsSource, sha256: str) -> WeightsSource:
        for member in self.enum if source.uri and not source.own else ():
            if sha256.startswith(named_hash(member.url) or "no hash"):
                return self._own(member, source.uri)
        return source


class _Timm(Family):
    loads_own = True  # some of its checkpoints are renamed and reshaped as they load

    def __init__(self, model: str, seed: int) -> None:
        super().__init__(model, seed)
        try:
            timm: Any = importlib.import_module("timm")
        except ImportError as error:
            raise SettingRefused(f"--model {model} needs timm: pip install 'nightshift[timm]'") from error
        self.timm, self.name = timm, model.removeprefix("timm:")
        try:
            found = timm.get_pretrained_cfg(self.name) if timm.is_model(self.name) else None
        except RuntimeError:  # a tag that this network does not have
            found = None
        if found is None:
            close = difflib.get_close_matches(self.name, timm.list_models(), 3) or ["resnet50"]
            near = ", ".join(f"timm:{name}" for name in close)
            raise SettingRefused(f"--model {model!r} is unknown: did you mean {near}?")
        self.config: dict[str, Any] = found.to_dict()
        data = timm.data.resolve_data_config({}, pretrained_cfg=self.config)
        _, height, width = data["input_size"]
        if height != width:
            raise SettingRefused(f"--model {model} takes {height} × {width} pixels: only square images are made")
        if data["crop_mode"] not in ("center", "squash"):
            raise SettingRefused(
                f"--model {model} wants its images with crop_mode {data['crop_mode']!r}, not made here"
            )
        how = data["interpolation"] if data["interpolation"] != "random" else "bilinear"
        resize = math.floor(height / data["crop_pct"])
        self.transform = Transform(
            resize, height, how, tuple(data["mean"]), tuple(data["std"]), data["crop_mode"] == "squash"
        )

    def network(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        names = {"num_classes": sizes.get("num_classes"), "in_chans": sizes.get("in_channels")}
        given = {name: value for name, value in names.items() if value}
        network: nn.Module = self.timm.create_model(self.name, pretrained=False, **given)
        return network

    def find_own(self, weights: str) -> WeightsSource | None:
        hub, url = self.config.get("hf_hub_id"), self.config.get("url")
        if weights != "DEFAULT" or not (hub or url):
            return None
        uri = f"hf://{hub}/{self.config.get('hf_hub_filename') or 'model.safetensors'}" if hub else url
        return WeightsSource(f"timm:{self.config['architecture']}.{self.config['tag']}", uri, True, self._labels())

    def _labels(self) -> tuple[str, ...]:
        names = self.config.get("label_names")
        if not names and (subset := self.timm.data.infer_imagenet_subset(self.config)):
            info = self.timm.data.ImageNetInfo(subset)
            names = [info.index_to_description(index) for index in range(info.num_classes())]
        return tuple(names or ())

    def load(self, source: WeightsSource, path: str, sizes: dict[str, int], head: str) -> nn.Module:
        if not source.own:
            return super().load(source, path, sizes, head)
        overlay = {"file": path, "hf_hub_id": None, "url": ""}
        network: nn.Module = self.timm.create_model(self.name, pretrained=True, pretrained_cfg_overlay=overlay)
        return network


class _Function(Family):
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

    def find_own(self, weights: str) -> WeightsSource | None:
        return WeightsSource(self.model, None, True) if weights == "DEFAULT" else None

    def skeleton(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        return self.random(own, sizes)  # it may load its own weights, which needs real memory


def find_family(model: str, seed: int) -> Family:
    kind = _Timm if model.startswith("timm:") else _Function if ":" in model else _Torchvision
    return kind(model, seed)


def _set_in_channels(network: nn.Module, channels: int) -> None:
    name, _ = first_convolution(network)
    old = cast(nn.Conv2d, network.get_submodule(name))
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    settings = {key: getattr(old, key) for key in names}
    network.set_submodule(name, nn.Conv2d(channels, old.out_channels, bias=old.bias is not None, **settings))


def _of_preset(member: Any) -> Transform:
    """torchvision.transforms._presets.ImageClassification as a Transform."""
    preset = member.transforms()
    how = preset.interpolation.value
    return Transform(preset.resize_size[0], preset.crop_size[0], how, tuple(preset.mean), tuple(preset.std))
