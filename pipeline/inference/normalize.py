"""uint8 pixels on the device → a network's normalised input."""

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


class FromPixels(nn.Module):
    """A network that takes uint8 [N, crop, crop, 3] and returns float32 embedding and logits.

    Pixels are normalised in float32; the network computes in `dtype`, channels last.
    """

    scale: Tensor
    shift: Tensor
    luma: Tensor

    def __init__(self, network: Network, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype, self.one_channel = dtype, spec.in_channels == 1
        mean, std = torch.tensor(spec.transform.mean), torch.tensor(spec.transform.std)
        # Repeated for a whole line of pixels: broadcasting over three channels takes a CPU twice as long.
        self.register_buffer("scale", (1 / (255 * std)).repeat(spec.transform.crop))
        self.register_buffer("shift", (-mean / std).repeat(spec.transform.crop))
        self.register_buffer("luma", torch.tensor(LUMA))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 [N, crop, crop, 3] → [N, embedding_dim], and [N, num_classes] or None."""
        images, height, width, _ = pixels.shape
        x = pixels.float()
        if self.one_channel:
            x = (x * self.luma).sum(3)
        x = torch.addcmul(self.shift, x.reshape(images, height, -1), self.scale)
        x = x.reshape(images, height, width, -1).permute(0, 3, 1, 2)
        features, logits = self.network(x.to(self.dtype))
        return features.float(), None if logits is None else logits.float()
