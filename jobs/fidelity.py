"""How far a run's results are from those of plain Pillow, torchvision and float32.

    python jobs/fidelity.py PHOTOS_FOLDER --model resnet18 --model resnet50 --precision float32
    python jobs/fidelity.py --trained

Error in spread of an image: ‖e - r‖ / the median distance between the reference embeddings of different images. r is
the unfolded network in float32, channels first, over Pillow and torchvision's own transform; e is what a run computes.
Both have the same weights, random ones unless --weights says otherwise.

--trained: a ResNet-18 learns to tell drawn scenes apart; for how many of them a run names the reference's class, by
size and settings. In doubt: the reference's two best classes are less than 0.1 apart.

Ends with 1 where a limit is passed.
"""

import argparse
import operator
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import resnet18
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from jobs.bench import trained
from pipeline import cli
from pipeline.config import RunConfig, Transform
from pipeline.coverage import END
from pipeline.decode import decode, leave_encoded
from pipeline.errors import InputRefused
from pipeline.loader import Loader
from pipeline.machines import cpus_here
from pipeline.models import build, resolve
from pipeline.plan import Shard
from pipeline.predict import Predict
from pipeline.predictors import Classifier, Embedder
from pipeline.sources import ReadOptions
from pipeline.sources.base import is_image

BATCH = 32
IN_DOUBT = 0.1


@dataclass(frozen=True)
class Fidelity:
    """Error in spread: of the median image and of the worst one."""

    median: float
    worst: float


@dataclass(frozen=True)
class Way:
    """Settings of a run that can turn its answer."""

    precision: str = "auto"
    decoder: str = "fast"
    compile: str = "off"


WAYS = (Way(), Way("float32", "exact"), Way("bfloat16"), Way(compile="on"))
IMAGES = {"tiles": 200, "photos": 200, "12 megapixels": 40}


@dataclass(frozen=True)
class Agreement:
    """Of one kind of images, shares from 0 to 1.

    same: a run and the reference name the same class. right: the reference names the one that was drawn.
    in_doubt: the reference's two best classes are less than IN_DOUBT of probability apart.
    """

    images: int
    same: float
    right: float
    in_doubt: float


def torchvision_transform(transform: Transform) -> Compose:
    return Compose(
        [
            Resize(transform.resize, InterpolationMode(transform.interpolation)),
            CenterCrop(transform.crop),
            ToTensor(),
            Normalize(transform.mean, transform.std),
        ]
    )


def batches(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
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


def probabilities(paths: Sequence[Path], weights: str) -> Tensor:
    """float32 [images, kinds] as torchvision's documentation computes them, with a network of its own."""
    state = torch.load(weights, weights_only=True)
    network = resnet18(num_classes=len(state["fc.bias"])).eval()
    network.load_state_dict(state)
    transform = torchvision_transform(trained.TRANSFORM)
    with torch.inference_mode():
        found = [
            network(torch.stack([transform(Image.open(path).convert("RGB")) for path in names]))
            for names in batches(paths)
        ]
    return torch.cat(found).softmax(1)


def classes(paths: Sequence[Path], classifier: Classifier, way: Way) -> Tensor:
    """int64 [images]: the best class of each image of a folder, through the stages of a run."""
    classifier = replace(classifier, precision=way.precision, compile=way.compile)
    classifier.batch_size = BATCH
    classifier.prepare()
    folder = paths[0].parent
    config = RunConfig(input=str(folder), output="none", decoder=way.decoder)
    loader = Loader.of(config, classifier, ReadOptions(), rows_per_table=BATCH)
    shard = Shard(0, "objects", str(folder), keys=tuple(path.name for path in paths))
    predict = Predict(classifier, {})
    found = pa.concat_tables([predict(table) for table in loader.load(shard, ((0, END),))])
    return torch.tensor(found["label_id"].to_pylist()[:-1])  # the last row ends the shard


def agreements(
    folder: Path, images: Mapping[str, int] = IMAGES, ways: Sequence[Way] = WAYS
) -> Iterator[tuple[str, Way, Agreement]]:
    """Train, draw so many images of each of `trained.SIZES` that the network has not seen, and compare. `folder`: an
    empty one."""
    classifier, scenes = trained.train(folder), trained.Scenes(seed=1)
    for name, count in images.items():
        kinds = torch.tensor(scenes.write(folder / name, trained.SIZES[name], count))
        paths = sorted((folder / name).iterdir())
        best = probabilities(paths, classifier.weights).topk(2)
        right = best.indices[:, 0] == kinds
        in_doubt = best.values[:, 0] - best.values[:, 1] < IN_DOUBT
        for way in ways:
            same = classes(paths, classifier, way) == best.indices[:, 0]
            shares = (flags.float().mean().item() for flags in (same, right, in_doubt))
            yield name, way, Agreement(count, *shares)


def together(found: Sequence[Agreement]) -> Agreement:
    """Of all their images."""
    images = sum(each.images for each in found)
    shares = zip(*((each.same, each.right, each.in_doubt) for each in found), strict=True)
    weights = [each.images / images for each in found]
    return Agreement(images, *(sum(map(operator.mul, share, weights)) for share in shares))


def defaults_agreement() -> Agreement:
    """The default settings' answers of all sizes together. It trains a network: two minutes."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        return together([agreement for _, _, agreement in agreements(Path(folder), ways=[Way()])])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", metavar="PHOTOS_FOLDER", type=Path, nargs="?")
    parser.add_argument("--trained", action="store_true", help="compare the classes of drawn scenes instead")
    parser.add_argument("--model", metavar="NAME", action="append", help="may be given again (default: resnet18)")
    parser.add_argument("--weights", metavar="WEIGHTS", default="random", help="default: random")
    precisions = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--precision", default="auto", choices=precisions, help="of the run (default: auto)")
    parser.add_argument("--decoder", default="fast", choices=("fast", "exact", "gpu"), help="default: fast")
    parser.add_argument(
        "--max-median", metavar="F", type=float, default=0.03, help="end with 1 above it (default: 0.03)"
    )
    parser.add_argument(
        "--max-worst", metavar="F", type=float, default=0.06, help="end with 1 above it (default: 0.06)"
    )
    parser.add_argument("--min-same", metavar="F", type=float, default=0.99, help="with --trained (default: 0.99)")
    given = parser.parse_args()
    if given.trained == bool(given.photos):
        parser.error("name a folder of photos, or --trained")
    torch.set_num_threads(min(torch.get_num_threads(), cpus_here()))
    return cli.guarded(lambda: report_classes(given.min_same) if given.trained else report(given))


def report_classes(least: float) -> int:
    """Print a line for each size of image and each way to run; 1 where too few classes are the same."""
    settings = f"{'precision':<10}{'decoder':<8}{'compile':<8}"
    print(f"{'images':<15}{'number':>7}{'right':>8}{'in doubt':>10}   {settings}{'same':>9}")
    passed = True
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        for name, way, found in agreements(Path(folder)):
            images = f"{name:<15}{found.images:>7}{found.right:>8.1%}{found.in_doubt:>10.1%}"
            print(f"{images}   {way.precision:<10}{way.decoder:<8}{way.compile:<8}{found.same:>9.2%}", flush=True)
            passed &= found.same >= least
    if not passed:
        print(f"below the limit: the same class for {least:.0%}", file=sys.stderr)
    return 0 if passed else 1


def report(given: argparse.Namespace) -> int:
    """Print a line for each network; 1 where one is over a limit."""
    paths = sorted(path for path in given.photos.rglob("*") if is_image(path.name))
    if len(paths) < 2:
        raise InputRefused(f"{given.photos} holds {len(paths)} images: name a folder of at least two")
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
