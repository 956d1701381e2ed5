"""Random changes of an image in training. An image gets the same change for the same seed, epoch and row."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

AUGMENTATIONS = ("photo", "aerial", "none")
PHOTO_SCALE, AERIAL_SCALE = (0.35, 1.0), (0.64, 1.0)
"""Share of an image's area that a random crop has. The scale of nadir imagery is known, so it varies little."""
PHOTO_RATIO, AERIAL_RATIO = (3 / 4, 4 / 3), (0.9, 1.1)
JITTER = 0.2

Place = tuple[int, int]
"""(epoch, row of the pixels)."""
Change = Callable[[Tensor], Tensor]


def augmentation(kind: str, crop: int) -> Change:
    """A function from an image [bands, side, side] to a random crop of it, [bands, crop, crop], of the same dtype.

    kind: photo: crops of several scales, mirrored, with other brightness and contrast. aerial: crops of nearly one
    scale, mirrored and turned by quarters, with the colours unchanged, since they tell classes of land apart. none: the
    centre.
    """
    from torchvision.transforms import v2

    if kind == "none":
        return v2.CenterCrop(crop)  # type: ignore[no-any-return]
    if kind == "photo":
        crops = v2.RandomResizedCrop(crop, PHOTO_SCALE, PHOTO_RATIO, antialias=True)
        colours = v2.Lambda(_colours(v2.ColorJitter(JITTER, JITTER, JITTER)))
        return v2.Compose([crops, v2.RandomHorizontalFlip(), colours])  # type: ignore[no-any-return]
    crops = v2.RandomResizedCrop(crop, AERIAL_SCALE, AERIAL_RATIO, antialias=True)
    return v2.Compose([crops, v2.RandomHorizontalFlip(), v2.Lambda(_quarter_turn)])  # type: ignore[no-any-return]


def _colours(jitter: Change) -> Change:
    """The jitter, for RGB of 8 bits only: that of other numbers would change their meaning."""
    return lambda image: jitter(image) if image.dtype is torch.uint8 and len(image) == 3 else image


def _quarter_turn(image: Tensor) -> Tensor:
    return torch.rot90(image, int(torch.randint(4, ())), (1, 2))


class Crops(Dataset[tuple[Tensor, int]]):
    """The augmented image of a place, [crop, crop, bands], and its row.

    pixels: [N, side, side, bands]; numbers of 16 bits become float32. The random numbers are drawn from the seed, the
    epoch and the row alone, so that they depend neither on the order of the images nor on the number of workers.
    """

    def __init__(self, pixels: NDArray[Any], kind: str, crop: int, seed: int) -> None:
        self.pixels, self.seed = pixels, seed
        self.change = augmentation(kind, crop)

    def __getitem__(self, place: Place) -> tuple[Tensor, int]:
        epoch, row = place
        image = as_tensor(self.pixels[row]).permute(2, 0, 1)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, row))
            changed = self.change(image)
        return changed.permute(1, 2, 0).contiguous(), row


class Batches(Sampler[list[Place]]):
    """One worker's share of each batch of an epoch. All batches of an epoch have the same size, or one image less.

    rows: of the images to train on. epoch: set it before each epoch.
    """

    def __init__(self, rows: Sequence[int], size: int, seed: int, rank: int = 0, workers: int = 1) -> None:
        self.rows, self.seed, self.rank, self.workers = np.asarray(rows, np.int64), seed, rank, workers
        self.count = -(-len(self.rows) // size)
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def whole(self) -> list[NDArray[np.int64]]:
        """The rows of each batch of this epoch, of all workers together."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)
        return np.array_split(order, self.count)

    def __iter__(self) -> Iterator[list[Place]]:
        for batch in self.whole():
            yield [(self.epoch, int(row)) for row in batch[self.rank :: self.workers]]


def centres(pixels: NDArray[Any], rows: Sequence[int], crop: int) -> Tensor:
    """The centres of images, [N, crop, crop, bands]: what `classify` gives the network."""
    start = round((pixels.shape[1] - crop) / 2)
    return as_tensor(pixels[np.asarray(rows), start : start + crop, start : start + crop])


def as_tensor(pixels: NDArray[Any]) -> Tensor:
    """A copy of mapped pixels: uint8, or float32 of other numbers."""
    return torch.from_numpy(np.array(pixels, np.uint8 if pixels.dtype == np.uint8 else np.float32))


def seed_of(*numbers: int) -> int:
    """A seed of 63 bits that depends on all of some numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
