"""Pixels on the device → a network's normalised input."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.images.transform import Transform
from pipeline.models.classifier import Network
from pipeline.models.spec import ModelSpec

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue: ITU-R BT.601, as in Pillow's convert("L")."""


def enlarge_tiles(tiles: Tensor, transform: Transform) -> Tensor:
    """Enlarge tiles bilinearly: uint8 [N, side, side, 3] → uint8 [N, crop, crop, 3], with side at most crop / 2.

    On a CPU torch interpolates uint8 with Pillow's rounding, 14 times as fast as float32. CUDA has no such kernel, so
    there the pixels are float32 until they are rounded. Enlarging needs no antialiasing.
    """
    x = tiles.permute(0, 3, 1, 2)
    x = x if x.device.type == "cpu" else x.float()
    x = functional.interpolate(x, size=(transform.resize, transform.resize), mode="bilinear", align_corners=False)
    start = round((transform.resize - transform.crop) / 2)
    stop = start + transform.crop
    x = x[..., start:stop, start:stop]
    return (x if x.dtype is torch.uint8 else x.round_().to(torch.uint8)).permute(0, 2, 3, 1)


def _float64(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class FromPixels(nn.Module):
    """A network that takes [N, crop, crop, bands] of the spec's pixel format and returns float32 embedding and logits.

    Pixels are normalised in float32; the network computes in `dtype`, channels last.
    """

    scale: Tensor
    shift: Tensor
    scale_to_clip: Tensor
    shift_to_clip: Tensor
    luma: Tensor

    def __init__(self, network: Network, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype, self.one_channel = dtype, spec.in_channels == 1 and spec.input is None
        self.clip = spec.input.clip if spec.input else None
        mean, std = _float64(spec.transform.mean), _float64(spec.transform.std)
        offset = _float64(spec.input.offset if spec.input else (0.0,))
        divisor = _float64(spec.input.divisor if spec.input else (255.0,))
        if self.clip:
            self._register("scale_to_clip", 1 / divisor, spec)
            self._register("shift_to_clip", -offset / divisor, spec)
            offset, divisor = torch.zeros(1), torch.ones(1)
        self._register("scale", 1 / (divisor * std), spec)
        self._register("shift", -(offset / divisor + mean) / std, spec)
        self.register_buffer("luma", torch.tensor(LUMA))

    def _register(self, name: str, values: Tensor, spec: ModelSpec) -> None:
        """A buffer with the values of a whole line of pixels: a CPU takes twice as long to broadcast over channels."""
        self.register_buffer(name, values.float().repeat(spec.transform.crop))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """[N, crop, crop, bands] → [N, embedding_dim], and [N, num_classes] or None."""
        images, height, width, _ = pixels.shape
        x = pixels.float()
        if self.one_channel:
            x = (x * self.luma).sum(3)
        x = x.reshape(images, height, -1)
        if self.clip:
            x = torch.addcmul(self.shift_to_clip, x, self.scale_to_clip).clamp(*self.clip)
        x = torch.addcmul(self.shift, x, self.scale)
        x = x.reshape(images, height, width, -1).permute(0, 3, 1, 2)
        features, logits = self.network(x.to(self.dtype))
        return features.float(), None if logits is None else logits.float()
