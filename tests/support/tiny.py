"""Small networks for tests of whole jobs: `--model tiny:network`."""

import os
import time

import torch
from torch import Tensor, nn

from pipeline.images.transform import Transform

SIZE = 32


class Tiny(nn.Module):
    """5 classes, an embedding of 8. seconds_per_image: time that each image takes at least."""

    def __init__(self, seconds_per_image: float = 0.0) -> None:
        super().__init__()
        self.seconds_per_image = seconds_per_image
        self.convolution = nn.Conv2d(3, 8, 5, stride=3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds_per_image * len(x))
        return self.fc(torch.relu(self.convolution(x)).mean((2, 3)))


def network() -> tuple[nn.Module, Transform]:
    return Tiny(), Transform(resize=SIZE + 4, crop=SIZE)


class Counted(Tiny):
    """Appends one byte per image to the file COUNTED_IMAGES. Many processes may do so at the same time."""

    def forward(self, x: Tensor) -> Tensor:
        with open(os.environ["COUNTED_IMAGES"], "ab", buffering=0) as file:
            file.write(bytes(len(x)))
        return super().forward(x)


def counted_network() -> tuple[nn.Module, Transform]:
    return Counted(0.02), Transform(resize=SIZE + 4, crop=SIZE)


def slow_network() -> tuple[nn.Module, Transform]:
    """50 images/s, so that a job can be stopped before it ends."""
    return Tiny(0.02), Transform(resize=SIZE + 4, crop=SIZE)
