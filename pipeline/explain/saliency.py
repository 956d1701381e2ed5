"""Grad-CAM (Selvaraju et al. 2017): where in a picture a network finds its evidence for a class. Uses Captum."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.inference.normalize import FromPixels
from pipeline.models.heads import Head
from pipeline.models.spec import ModelSpec, build

try:
    from captum.attr import LayerAttribution, LayerGradCam
except ImportError as error:
    raise SettingRefused("`nightshift explain` needs captum: pip install 'nightshift[explain]'") from error

MIN_SIDE = 2
"""A map of features has at least this many places along each side; what pooling leaves has one."""


class Explainer:
    """A network in float32 on the CPU, with its own classifier or with a head.

    Raises WeightsRefused if there is no classifier or no map of features, and SettingRefused for a head by the nearest
    labelled images, which has no gradient.
    """

    def __init__(self, spec: ModelSpec, head: Head | None = None) -> None:
        if head is None and not spec.num_classes:
            raise WeightsRefused(f"{spec.model} with weights {spec.weights} has no classifier: give --head")
        if head is not None and head.method == "knn":
            raise SettingRefused(
                "--head is a vote of the nearest labelled images, which Grad-CAM cannot explain: fit a head with "
                "--method linear"
            )
        self.network = FromPixels(build(spec), spec, torch.float32).requires_grad_(True)
        self.head = head
        self.layer_name, self.layer = _last_map(self.network, spec)

    def logits(self, pixels: Tensor) -> Tensor:
        """Pixels [N, crop, crop, bands] → float32 [N, classes]."""
        features: Tensor
        logits: Tensor | None
        features, logits = self.network(pixels)
        if self.head is not None:
            return self.head.logits(features)
        assert logits is not None
        return logits

    def score(self, pixels: Tensor, class_id: int) -> float:
        """The probability of a class for pixels [1, crop, crop, bands]."""
        with torch.no_grad():
            features, logits = self.network(pixels.cpu())
            if self.head is not None:
                return float(self.head.scores(features)[0, class_id])
            assert logits is not None
            return float(logits.softmax(1)[0, class_id])

    def saliency(self, pixels: Tensor, class_id: int) -> NDArray[np.float32]:
        """Pixels [1, crop, crop, bands] → float32 [crop, crop] from 0 to 1.

        All 0 if no place speaks for the class.
        """
        cam = LayerGradCam(self.logits, self.layer).attribute(
            pixels.cpu().float(), target=class_id, relu_attributions=True
        )
        size = (pixels.shape[1], pixels.shape[2])
        enlarged = LayerAttribution.interpolate(cam, size, "bilinear").detach()[0, 0]
        highest = float(enlarged.max())
        return np.asarray((enlarged / highest if highest > 0 else enlarged).numpy(), np.float32)


def _last_map(network: FromPixels, spec: ModelSpec) -> tuple[str, nn.Module]:
    """The module whose output is the last map of features, before pooling. Raises WeightsRefused."""
    body = network.network.body
    shape = spec.pixel_format.shape(spec.transform)
    with _recorded(body) as ran, torch.no_grad():
        network(torch.zeros(1, *shape))
    maps = [place for place, (_, _, output) in enumerate(ran) if output.ndim == 4 and min(output.shape[2:]) >= MIN_SIDE]
    has_tokens = any(output.ndim == 3 for _, _, output in ran[maps[-1] :]) if maps else True
    if has_tokens:
        raise WeightsRefused(
            f"{spec.model} has no map of features before its classifier, as a vision transformer has none: Grad-CAM "
            "explains convolutional networks"
        )
    name, module, _ = ran[maps[-1]]
    return name, module


@contextmanager
def _recorded(body: nn.Module) -> Iterator[list[tuple[str, nn.Module, Tensor]]]:
    """The modules of a network in the order in which they end, with the shapes of their outputs."""
    ran: list[tuple[str, nn.Module, Tensor]] = []

    def note(name: str, module: nn.Module, output: object) -> None:
        if isinstance(output, Tensor):
            ran.append((name, module, output.detach()[:0] if output.ndim < 3 else output.detach()))

    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: note(name, module, output))
        for name, module in body.named_modules()
        if name
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()
