"""Null networks: a run with one costs what everything but the network costs.

    python -m jobs.bench.harness.null INPUT OUTPUT --resize 64 --crop 64 --batch-size 256

`network` is a torch module, so our jobs and the peers run it as they run a ResNet. `Null` is a predictor without torch,
so it measures Ray and the stages alone, and also runs in actors whose GPU is only a number. As a command, this module
is a job with `Null`.
"""

import argparse
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from jobs.bench.harness.programme import NULL
from pipeline.images.transform import Transform
from pipeline.predictors.base import Predictor

if TYPE_CHECKING:
    from torch import nn

STEP = 16
TILES = Transform(resize=64, crop=64)


def network() -> "nn.Module":
    """float32 [N, 3, 224, 224] → every STEP-th pixel of every STEP-th row → a classifier `fc`, as ResNets have it."""
    return _every_step(Transform().crop)


def tile_network() -> "tuple[nn.Module, Transform]":
    """The same for images of 64 × 64 pixels, and their transform."""
    return _every_step(TILES.crop), TILES


def _every_step(side: int) -> "nn.Module":
    from torch import nn  # a job with `Null` does not import torch

    width = 3 * (side // STEP) ** 2
    layers = {"pool": nn.AvgPool2d(1, STEP), "flat": nn.Flatten(), "fc": nn.Linear(width, 2)}
    return nn.Sequential(OrderedDict(layers))


def named(model: str) -> Any:
    """A network with random weights: `null` or one of torchvision's ResNets. Its classifier is the attribute `fc`."""
    if model == NULL:
        return network()
    from torchvision.models import get_model

    return get_model(model)


class Null(Predictor):
    """Returns the first byte of each image."""

    columns = pa.schema([("first", pa.uint8())])
    max_concurrency: ClassVar[int] = 2  # as for a network

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def predict(self, pixels: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"first": pixels[:, 0, 0, 0].copy()}


def main() -> int:
    from pipeline import RunConfig, cli, run  # the peers import this module, and need none of these

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("output", metavar="OUTPUT")
    parser.add_argument("--resize", metavar="PIXELS", type=int, default=Transform().resize)
    parser.add_argument("--crop", metavar="PIXELS", type=int, default=Transform().crop)
    parser.add_argument("--batch-size", metavar="N", type=int, help="default: that of a job")
    parser.add_argument("--rows-per-part", metavar="N", type=int, help="default: that of a job")
    options = parser.parse_args()
    sizes = {"batch_size": options.batch_size, "rows_per_part": options.rows_per_part}
    config = RunConfig(input=options.input, output=options.output, **sizes)

    def work() -> int:
        run(config, Null(Transform(resize=options.resize, crop=options.crop)))
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
