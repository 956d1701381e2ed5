"""A ResNet-18 that tells drawn scenes apart, trained in a minute, and how often a run names the reference's class.

A scene is one of KINDS with another shining through it, up to nearly as strong: the network is sure of some and in doubt
about others, so that a difference in pixels or in number format can turn its answer.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

from jobs.make_demo_archive import KINDS, draw_tile
from pipeline.config import IMAGENET_MEAN, IMAGENET_STD

SIDE = 256
"""Pixels of a drawn scene: what the transform's resize makes of an image, so that training and a run see one scale."""

TILE_SIDE = 64
WEAKEST = 0.55
"""The least share of the kind that a scene is called by."""

POOL = 48  # drawn tiles of a kind, which the scenes are mixed from
VIEW, STEPS, BATCH, PEAK_RATE = 96, 220, 32, 0.02
CALIBRATION_BATCHES, CROP = 8, 224


@dataclass(frozen=True)
class Drawings:
    """uint8 [kinds, n, SIDE, SIDE, 3]: tiles of each kind, from which scenes are mixed."""

    tiles: np.ndarray

    @staticmethod
    def of(seed: int, n: int = POOL) -> "Drawings":
        rng = np.random.default_rng(seed)
        return Drawings(np.stack([[np.asarray(draw_tile(k, rng, (SIDE, SIDE))) for _ in range(n)] for k in KINDS]))

    def scene(self, rng: np.random.Generator) -> tuple[Image.Image, int]:
        """A mixture of two kinds, and the number of the stronger one."""
        kind, other = rng.permutation(len(KINDS))[:2]
        first, second = (self.tiles[k, rng.integers(self.tiles.shape[1])] for k in (kind, other))
        return Image.blend(Image.fromarray(second), Image.fromarray(first), rng.uniform(WEAKEST, 1)), int(kind)


def examples(drawings: Drawings, rng: np.random.Generator, count: int, side: int) -> tuple[Tensor, Tensor]:
    """Normalised float32 [count, 3, side, side] and int64 [count]: turned and cut scenes, some of them coarse."""
    images, labels = [], []
    for _ in range(count):
        image, label = drawings.scene(rng)
        if rng.random() < 0.4:
            image = image.resize((TILE_SIDE, TILE_SIDE), Image.Resampling.BILINEAR).resize(
                (SIDE, SIDE), Image.Resampling.BILINEAR
            )
        y, x = rng.integers(0, SIDE - side + 1, 2)
        pixels = np.rot90(np.asarray(image)[y : y + side, x : x + side], rng.integers(4))
        images.append(pixels[:, :: rng.choice((-1, 1))])
        labels.append(label)
    values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return ((values - mean) / std).contiguous(memory_format=torch.channels_last), torch.tensor(labels)


def train(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    rng, drawings = np.random.default_rng(seed), Drawings.of(seed)
    network = resnet18(num_classes=len(KINDS)).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, STEPS)
    for step in range(STEPS):
        images, labels = examples(drawings, rng, BATCH, VIEW)
        loss = functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(step, loss.item(), time.process_time(), flush=True)
    calibrate(network, drawings, rng)
    return network.eval()


def calibrate(network, drawings, rng):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for _ in range(CALIBRATION_BATCHES):
            network(examples(drawings, rng, BATCH // 2, CROP)[0])
