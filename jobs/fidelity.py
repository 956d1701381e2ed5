"""How far a run's embeddings are from those of plain Pillow, torchvision and float32, as the error in spread.

    python jobs/fidelity.py PHOTOS_FOLDER --model resnet18 --model resnet50 --precision float32

Error in spread of an image: ‖e - r‖ / the median distance between the reference embeddings of different images. r is
the unfolded network in float32, channels first, over Pillow and torchvision's own transform; e is what a run computes.
Both have the same weights, random ones unless --weights says otherwise. Ends with 1 where a limit is passed.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from pipeline import cli
from pipeline.config import Transform
from pipeline.decode import decode, leave_encoded
from pipeline.errors import InputRefused
from pipeline.models import build, resolve
from pipeline.predictors import Embedder
from pipeline.sources.base import is_image

BATCH = 32


@dataclass(frozen=True)
class Fidelity:
    """Error in spread: of the median image and of the worst one."""

    median: float
    worst: float


def torchvision_transform(transform: Transform) -> Compose:
    return Compose(
        [
            Resize(transform.resize, InterpolationMode(transform.interpolation)),
            CenterCrop(transform.crop),
            ToTensor(),
            Normalize(transform.mean, transform.std),
        ]
    )


def batches(paths: list[Path]) -> Iterator[list[Path]]:
    return (paths[start : start + BATCH] for start in range(0, len(paths), BATCH))


def reference(paths: list[Path], model: str, weights: str) -> Tensor:
    """float32 [images, embedding_dim], as torchvision's documentation computes them."""
    spec = resolve(model, weights, need_head=False)
    network, transform = build(spec), torchvision_transform(spec.transform)
    found = []
    with torch.inference_mode():
        for names in batches(paths):
            images = [transform(Image.open(path).convert("RGB")) for path in names]
            found.append(network.features(torch.stack(images)))
    return torch.cat(found)


def embeddings(paths: list[Path], model: str, weights: str, precision: str, decoder: str = "fast") -> Tensor:
    """float32 [images, embedding_dim], as a run computes them. EXIF is left alone, as torchvision leaves it."""
    predictor = Embedder(model=model, weights=weights, precision=precision, compile="off")
    predictor.prepare()
    predictor.load()
    found = []
    for names in batches(paths):
        pixels = torch.stack([_pixels(path.read_bytes(), predictor, decoder) for path in names])
        found.append(torch.from_numpy(predictor.predict(pixels)["embedding"]))
    return torch.cat(found)


def _pixels(data: bytes, predictor: Embedder, decoder: str) -> Tensor:
    """uint8 [crop, crop, 3] on the network's device."""
    transform = predictor.transform
    jpeg = leave_encoded(data, transform, exif_rotate=False) if decoder == "gpu" else None
    if jpeg:
        return predictor.decode([jpeg])[0][0]
    pixels = decode(data, transform, exif_rotate=False, exact=decoder == "exact").pixels
    return torch.tensor(pixels, device=predictor.runner.device)


def compare(found: Tensor, expected: Tensor) -> Fidelity:
    """Both float32 [images, embedding_dim], at least two images."""
    errors = (found - expected).norm(dim=1) / torch.pdist(expected).median()
    return Fidelity(errors.median().item(), errors.max().item())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", metavar="PHOTOS_FOLDER", type=Path)
    parser.add_argument("--model", metavar="NAME", action="append", help="may be given again (default: resnet18)")
    parser.add_argument("--weights", metavar="WEIGHTS", default="random")
    parser.add_argument("--precision", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--decoder", default="fast", choices=("fast", "exact", "gpu"))
    parser.add_argument("--max-median", metavar="F", type=float, default=0.001)
    parser.add_argument("--max-worst", metavar="F", type=float, default=0.003)
    given = parser.parse_args()
    return cli.guarded(lambda: report(given))


def report(given: argparse.Namespace) -> int:
    """Print a line for each network; 1 where one is over a limit."""
    paths = sorted(path for path in given.photos.rglob("*") if is_image(path.name))
    if len(paths) < 2:
        raise InputRefused(f"{given.photos} holds {len(paths)} images: name a folder of at least two")
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))
    print(f"{'model':<20}{'precision':<12}{'median':>12}{'worst':>12}{'images':>8}")
    passed = True
    for model in given.model or ["resnet18"]:
        found = embeddings(paths, model, given.weights, given.precision, given.decoder)
        fidelity = compare(found, reference(paths, model, given.weights))
        numbers = f"{fidelity.median:>12.7f}{fidelity.worst:>12.7f}{len(paths):>8}"
        print(f"{model:<20}{given.precision:<12}{numbers}", flush=True)
        passed &= fidelity.median <= given.max_median and fidelity.worst <= given.max_worst
    if not passed:
        print(f"over a limit: median {given.max_median}, worst {given.max_worst}", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
