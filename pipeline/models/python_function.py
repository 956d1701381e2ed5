"""A network from the user's own Python function: `package.module:function`."""

import importlib

from torch import Tensor, nn

from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.images.transform import Transform
from pipeline.models.classifier import resize_classifier
from pipeline.models.families import Family, WeightsSource


class FunctionFamily(Family):
    """A function without arguments that returns a torch.nn.Module, or a tuple of one and its Transform.

    With --weights DEFAULT the network keeps the weights that the function returns, and so it does with random, which is
    refused unless the function draws them. Raises SettingRefused if the function cannot be imported, fails, or returns
    something else.
    """

    has_transform = False  # known after the first call

    def __init__(self, model: str, seed: int) -> None:
        super().__init__(model, seed)
        module, _, name = model.partition(":")
        try:
            self.function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise SettingRefused(
                f"--model {model} cannot be imported: {error}; write package.module:function, and set PYTHONPATH "
                "so that every node can import it"
            ) from error

    def network(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        try:
            result = self.function()
        except Exception as error:  # the function is the user's own and may raise anything
            raise SettingRefused(f"--model {self.model} failed: {type(error).__name__}: {error}") from error
        self.has_transform = isinstance(result, tuple)
        network, self.transform = result if isinstance(result, tuple) else (result, Transform())
        if not isinstance(network, nn.Module) or not isinstance(self.transform, Transform):
            raise SettingRefused(
                f"--model {self.model} returned {type(result).__name__}: it must return a torch.nn.Module, or "
                "a tuple of one and its Transform"
            )
        return network.cpu().float()

    def assumes_transform(self, source: WeightsSource) -> bool:
        return not self.has_transform

    def find_own(self, weights: str) -> WeightsSource | None:
        return WeightsSource(self.model, None, True) if weights == "DEFAULT" else None

    def skeleton(self, own: bool, sizes: dict[str, int]) -> nn.Module:
        return self.random(own, sizes)  # the function may load weights, which needs real memory

    def check_random(self, network: nn.Module) -> None:
        other = FunctionFamily(self.model, (self.seed + 1) % (1 << 63)).random(False, {})
        pairs = [(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=False) if not _is_constant(a)]
        if not pairs or any(a.equal(b) for a, b in pairs):
            raise WeightsRefused(
                f"--weights random does not fit --model {self.model}, a function that brings its own weights: leave "
                "--weights out, or give a file"
            )

    def resized(self, own: bool, sizes: dict[str, int], head: str) -> nn.Module:
        network = self.skeleton(own, sizes)
        if head and (classes := sizes.get("num_classes")):
            resize_classifier(network, head, classes)
        return network


def _is_constant(parameter: Tensor) -> bool:
    """Whether all values are equal, as biases and scales are at the start."""
    return parameter.numel() < 2 or bool((parameter == parameter.flatten()[0]).all())
