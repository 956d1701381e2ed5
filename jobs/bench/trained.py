"""Drawn scenes, and a ResNet-18 that learns in a minute to tell them apart.

Random weights see hardly a difference between images, and a network that is certain of everything cannot be led astray.
So a scene is one kind of tile with another shining through it, up to nearly as strong: the network is certain of some
scenes and in doubt about others, where other pixels or another number format could turn its answer.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18
from torchvision.transforms.functional import to_tensor

from jobs.make_demo_archive import KINDS, draw_tile
from pipeline.config import Transform
from pipeline.predictors import Classifier

TRANSFORM = Transform()
SIDE = TRANSFORM.resize  # of a scene: training and a run then see kinds at the same scale
WEAKEST = 0.55  # the least share of the kind that gives a scene its name
TILES = 48  # drawn of each kind; the scenes are mixed from them
COARSE_SIDE, COARSE_SHARE = 64, 0.4  # scenes of small tiles, which a run enlarges

VIEW, STEPS, BATCH, PEAK_RATE = 64, 150, 24, 0.02
CALIBRATION_BATCHES = 8

SIZES = {"tiles": (64, 64), "photos": (470, 400), "12 megapixels": (4000, 3000)}
GRAIN = 8  # standard deviation of the noise that every written pixel gets


class Scenes:
    """An endless supply of scenes, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.tiles = [[draw_tile(kind, self.rng, (SIDE, SIDE)) for _ in range(TILES)] for kind in KINDS]

    def scene(self) -> tuple[Image.Image, int]:
        """SIDE × SIDE pixels of two kinds, and the number of the stronger one."""
        kind, other = self.rng.permutation(len(KINDS))[:2]
        strong, weak = (self.tiles[each][self.rng.integers(TILES)] for each in (kind, other))
        return Image.blend(weak, strong, self.rng.uniform(WEAKEST, 1)), int(kind)

    def batch(self, count: int, side: int) -> tuple[Tensor, Tensor]:
        """Normalised float32 [count, 3, side, side] of turned and cut scenes, some coarse; their int64 kinds."""
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
        """JPEGs of so many scenes, grainy; the kind of each, by name's order."""
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
    """A classifier of KINDS with its weights and labels in `folder`, trained on the CPU in about a minute."""
    torch.manual_seed(seed)
    scenes = Scenes(seed)
    network = resnet18(num_classes=len(KINDS)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(network.parameters(), PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, STEPS)
    for _ in range(STEPS):
        views, kinds = scenes.batch(BATCH, VIEW)
        optimizer.zero_grad()
        functional.cross_entropy(network(views.to(memory_format=torch.channels_last)), kinds).backward()
        optimizer.step()
        schedule.step()
    _calibrate(network, scenes)
    weights, labels = folder / "weights.pt", folder / "labels.txt"
    torch.save(network.state_dict(), weights)
    labels.write_text("\n".join(KINDS))
    return Classifier(model="resnet18", weights=str(weights), labels=str(labels))


def _calibrate(network: nn.Module, scenes: Scenes) -> None:
    """Batch statistics of whole crops: small views have more of the padding in them."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain average
    with torch.no_grad():
        for _ in range(CALIBRATION_BATCHES):
            network(scenes.batch(BATCH, TRANSFORM.crop)[0])
