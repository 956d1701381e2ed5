"""Networks and pixels for tests that run a network in their own process. `--model networks:tiny`, for example."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from pipeline.images.transform import Transform

TINY = "networks:tiny"
SMALL = "shufflenet_v2_x0_5"
"""The torchvision network that loads fastest."""


def draw_pixels(rows: int = 3, size: int = 224) -> np.ndarray:
    """Random uint8 [rows, size, size, 3]; the same in each call."""
    return np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)


def draw_input(channels: int = 3, size: int = 64) -> Tensor:
    """Random normalised input of a network, float32 [2, channels, size, size]; the same in each call."""
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def save(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def trained() -> nn.Module:
    """SMALL with 7 classes, and batch normalisation that is not the identity."""
    torch.manual_seed(3)
    network = torchvision.models.get_model(SMALL, num_classes=7)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def tiny() -> tuple[nn.Module, Transform]:
    """Quick to compile: one convolution with batch normalisation, 6 classes."""
    torch.manual_seed(2)
    convolution = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(8, 6)), Transform(40, 32)


def colours() -> tuple[nn.Module, Transform]:
    """Two classes, red and blue: the mean over the picture of how much redder or bluer than the other a place is."""
    convolution = nn.Conv2d(3, 2, 8, 8, bias=False)
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[0, 0], convolution.weight[0, 2] = 1 / 64, -1 / 64
        convolution.weight[1, 2], convolution.weight[1, 0] = 1 / 64, -1 / 64
    classifier = nn.Linear(2, 2)
    with torch.no_grad():
        classifier.weight.copy_(torch.eye(2) * 20)
        classifier.bias.zero_()
    features = nn.Sequential(convolution, nn.ReLU())
    network = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)
    return network, Transform(64, 64, "bilinear", (0.5,), (0.5,))


class Branching(nn.Module):
    """Data-dependent control flow, so that it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


def branching() -> nn.Module:
    return Branching()


def small(classes: int = 6) -> nn.Module:
    convolution = nn.Conv2d(3, 5, 3)
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes))


def small_with_transform() -> tuple[nn.Module, Transform]:
    return small(), Transform(40, 32)


class Headless(nn.Module):
    """Its last Linear is as wide as its output, but is not a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 5, 3), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.conv(x).mean((2, 3))
        return pooled + self.inner(pooled)


def headless() -> nn.Module:
    return Headless()


def scripted() -> nn.Module:
    return torch.jit.script(small())


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(small(), {nn.Linear})


def traced() -> nn.Module:
    return torch.jit.trace(small(), torch.zeros(1, 3, 32, 32))


def scripted_inside() -> tuple[nn.Module, Transform]:
    return nn.Sequential(scripted()), Transform(40, 32)


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def two_outputs() -> nn.Module:
    return TwoOutputs()


generator = random.Random(0)


def different_each_time() -> nn.Module:
    network = small()
    nn.init.constant_(network[0].weight, generator.random())
    return network


def raises() -> nn.Module:
    raise ValueError("no such size")


def not_a_network() -> str:
    return "resnet"
