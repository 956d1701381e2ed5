"""A network from the user's own Python function: `package.module:function`."""

import importlib

from torch import nn

from pipeline.errors import SettingRefused
from pipeline.images.transform import Transform
from pipeline.models.classifier import resize_classifier
from pipeline.models.families import Family, WeightsSource


class FunctionFamily(Family):
    """A function without arguments that returns a torch.nn.Module, or a tuple of one and its Transform.

    With --weights DEFAULT the network keeps the weights that the function returns. Raises SettingRefused if the
    function cannot be imported, fails, or returns something else.
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

    def resized(self, own: bool, sizes: dict[str, int], head: str) -> nn.Module:
        network = self.skeleton(own, sizes)
        if head and (classes := sizes.get("num_classes")):
            resize_classifier(network, head, classes)
        return network
