"""Networks and pixels for tests that run a network in their own process."""

import numpy as np
import torch
from torch import nn

from pipeline.config import Transform

TINY = "networks:tiny"


def tiny() -> tuple[nn.Module, Transform]:
    """Quick to compile: one convolution with its normalisation, 6 classes."""
    torch.manual_seed(2)
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(8, 6)), Transform(40, 32)


class Branching(nn.Module):
    """Its way depends on the data, so that a trace of it cannot be made."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def branching() -> nn.Module:
    return Branching()


def draw_pixels(rows: int = 3, size: int = 224) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)
