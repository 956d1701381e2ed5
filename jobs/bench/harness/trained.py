"""Drawn scenes, and a ResNet-18 that learns in a minute to classify them.

A network with random weights hardly distinguishes images, and small changes do not alter the answers of a network that
is certain of all of them. So a scene is a blend of two kinds of tiles. The network is certain of some scenes and in
doubt about others, for which other pixels or another number format could change its answer.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18
from torchvision.transforms.functional import to_tensor

from jobs.demo_archive import KINDS, draw_tile
from pipeline.images.transform import Transform
from pipeline.predictors.classify import Classifier

TRANSFORM = Transform()
SIDE = TRANSFORM.resize  # of a scene, so that training and a run see the same scale
MIN_SHARE = 0.55  # of the stronger kind in a scene
TILES = 48  # drawn of each kind, to blend scenes from
COARSE_SIDE, COARSE_SHARE = 64, 0.4  # scenes as coarse as small tiles that a run enlarges

VIEW, STEPS, BATCH, PEAK_RATE = 64, 150, 24, 0.02
CALIBRATION_BATCHES = 8

SIZES = {"tiles": (64, 64), "photos": (470, 400), "12 megapixels": (4000, 3000)}
GRAIN = 8  # standard deviation of the noise in written images


class Scenes:
    """Any number of scenes, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.tiles = [[draw_tile(kind, self.rng, (SIDE, SIDE)) for _ in range(TILES)] for kind in KINDS]

    def scene(self) -> tuple[Image.Image, int]:
        """SIDE × SIDE pixels of two kinds, and the index of the stronger one."""
        kind, other = self.rng.permutation(len(KINDS))[:2]
        strong, weak = (self.tiles[each][self.rng.integers(TILES)] for each in (kind, other))
        return Image.blend(weak, strong, self.rng.uniform(MIN_SHARE, 1)), int(kind)

    def batch(self, count: int, side: int) -> tuple[Tensor, Tensor]:
        """Rotated and cropped scenes, normalised float32 [count, 3, side, side], and their kinds, int64 [count]."""
        scenes = [self.scene() for _ in range(count)]
        views = torch.stack([to_tensor(self._view(image, side)) for image, _ in scenes])
        mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in (TRANSFORM.mean, TRANSFORM.std))
        return (views - mean) / std, torch.tensor([kind for _, kind in scenes])

    def _view(self, image: Image.Image, side: int) -> Image.Image:
        if self.rng.random() < COARSE_SHARE:
            small = image.resize((COARSE_SIDE, COARSE_SIDE), Image.Resampling.BILINEAR)
            image = small.resize(image.size, Image.Resampling.BILINEAR)
        left, top = self.rng.integers(0, SIDE - side + 1, 2).tolist()
        return image.crop((left, top, left + side, top + side)).transpose(self.rng.choice(list(Image.Transpose)))

    def write(self, folder: Path, size: tuple[int, int], count: int) -> list[int]:
        """Write JPEGs of this many scenes with noise; return their kinds in the order of their names."""
        folder.mkdir(parents=True)
        kinds = []
        for number in range(count):
            image, kind = self.scene()
            grain = Image.effect_noise(size, GRAIN).convert("RGB")
            grainy = ImageChops.add(ImageOps.fit(image, size, Image.Resampling.BICUBIC), grain, offset=-128)
            grainy.save(folder / f"{number:06}.jpg", quality=90)
            kinds.append(kind)
        return kinds


def train(folder: Path, seed: int = 0) -> Classifier:
    """Train a classifier of KINDS on the CPU for about a minute; its weights and labels are in `folder`."""
    torch.manual_seed(seed)
    scenes = Scenes(seed)
    network = resnet18(num_classes=len(KINDS)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, STEPS)
    for _ in range(STEPS):
        views, kinds = scenes.batch(BATCH, VIEW)
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(views.to(memory_format=torch.channels_last)), kinds)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    _calibrate(network, scenes)
    weights, labels = folder / "weights.pt", folder / "labels.txt"
    torch.save(network.state_dict(), weights)
    labels.write_text("\n".join(KINDS))
    return Classifier(model="resnet18", weights=str(weights), labels=str(labels))


def _calibrate(network: nn.Module, scenes: Scenes) -> None:
    """Compute batch statistics of whole crops, since padding has a larger share of small views."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # average over all batches
    with torch.no_grad():
        for _ in range(CALIBRATION_BATCHES):
            network(scenes.batch(BATCH, TRANSFORM.crop)[0])
