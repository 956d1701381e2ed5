"""torchvision's networks and weights."""

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import nn

from pipeline.images.transform import Transform
from pipeline.models.classifier import RGB, first_convolution
from pipeline.models.download import named_hash, official_uri
from pipeline.models.families import Family, WeightsSource
from pipeline.models.lazy_torchvision import torchvision
from pipeline.models.names import unknown


class TorchvisionFamily(Family):
    """A classification network of torchvision. Its own weights are those of torchvision's weights enum.

    Raises SettingRefused for an unknown name.
    """

    def __init__(self, model: str, seed: int) -> None:
        super().__init__(model, seed)
        names = torchvision.models.list_models(module=torchvision.models)
        if model not in names:
            raise unknown(model, names)
        self.builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(model)
        self.enum: Any = torchvision.models.get_model_weights(model)
        self.transform = _transform_of(self.enum.DEFAULT)

    def network(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        accepted = inspect.signature(inspect.signature(self.builder).return_annotation).parameters
        # transform_input: set by torchvision for the weights that were converted from another framework.
        options: dict[str, Any] = {"aux_logits": False, "init_weights": True, "transform_input": own}
        options |= {name: value for name, value in sizes.items() if value}
        channels = options.pop("in_channels", RGB)
        network = self.builder(weights=None, **{name: value for name, value in options.items() if name in accepted})
        if channels != RGB:
            _set_in_channels(network, channels)
        return network

    def find_own(self, weights: str) -> WeightsSource | None:
        member = self.enum.__members__.get(weights.removeprefix(f"{self.enum.__name__}."))
        return member and self._own(member, official_uri(member.url))

    def _own(self, member: Any, uri: str | None) -> WeightsSource:
        return WeightsSource(str(member), uri, True, tuple(member.meta["categories"]), _transform_of(member))

    def own_names(self) -> list[str]:
        return list(self.enum.__members__)

    def is_official(self, source: WeightsSource) -> bool:
        return source.own

    def recognise(self, source: WeightsSource, sha256: str) -> WeightsSource:
        for member in self.enum if source.uri and not source.own else ():
            if sha256.startswith(named_hash(member.url) or "no hash"):
                return self._own(member, source.uri)
        return source


def _set_in_channels(network: nn.Module, channels: int) -> None:
    """Replace the first convolution by one that takes `channels` channels and is otherwise the same."""
    name, _ = first_convolution(network)
    old = cast(nn.Conv2d, network.get_submodule(name))
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    settings = {key: getattr(old, key) for key in names}
    network.set_submodule(name, nn.Conv2d(channels, old.out_channels, bias=old.bias is not None, **settings))


def _transform_of(member: Any) -> Transform:
    """Transform of a member of a weights enum: torchvision.transforms._presets.ImageClassification."""
    preset = member.transforms()
    interpolation = preset.interpolation.value
    return Transform(preset.resize_size[0], preset.crop_size[0], interpolation, tuple(preset.mean), tuple(preset.std))
