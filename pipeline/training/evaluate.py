"""An honest evaluation of a head: on images that it was not fitted on, with its mistakes and doubtful labels."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import metrics

from pipeline.errors import counted
from pipeline.models.heads import Head
from pipeline.training.fit import (
    Choice,
    FitSettings,
    Fold,
    Logits,
    Rows,
    calibrate,
    choose,
    fit_rows,
    folds_of,
    some,
)
from pipeline.training.samples import Samples, Targets

FEW_LABELS = 10
FEW_TESTED = 30
FOLDS = 5
MANY_LABELS = 5000
"""With more labels, one hold-out is as exact as five folds, and five times as fast."""
BINS = 15
FRACTIONS = (0.125, 0.25, 0.5)
DRAWS = 3
"""Random parts of the labels for a point of the learning curve, if there is one split."""
MAX_SHOWN = 50

Scores = NDArray[np.float32]
"""[N, C], from 0 to 1."""


@dataclass(frozen=True)
class ClassResult:
    """precision, recall, f1: from 0 to 1. labels: images of the class that were tested."""

    name: str
    labels: int
    precision: float
    recall: float
    f1: float
    average_precision: float


@dataclass(frozen=True)
class Example:
    """An image whose prediction differs from its label. score: of the predicted class, from 0 to 1."""

    image_id: str
    label: str
    predicted: str
    score: float


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. Everything is computed on images that were left out of the fit.

    how: the kind of split, in words. images: number of images tested. accuracy: with several labels per image, the
    share whose classes are all right. baseline, baseline_accuracy: the most frequent class, and the accuracy of always
    predicting it. confusion: [C][C] images, by label and by prediction; empty with several labels per image.
    ece_before, ece_after: expected calibration error without and with the temperature.
    temperature_note: why the head's temperature is not smaller, see `Calibration`.
    curve: (number of labels, accuracy, macro-F1), the last one with all that a fold is fitted to; may be empty.
    mistakes: the most confident ones. doubtful: labels that are probably wrong, the most probable first.
    """

    how: str
    images: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    baseline: str
    baseline_accuracy: float
    classes: tuple[ClassResult, ...]
    confusion: tuple[tuple[int, ...], ...]
    ece_before: float
    ece_after: float
    curve: tuple[tuple[int, float, float], ...]
    mistakes: tuple[Example, ...]
    doubtful: tuple[Example, ...]
    warnings: tuple[str, ...] = field(default=())
    temperature_note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(samples: Samples, settings: FitSettings, holdout: float | None, choice: Choice) -> Evaluation:
    """Evaluate the method on labels that it was not fitted on.

    holdout: share of the labels that is left out once; None to leave each label out once, in folds, or to hold out a
    fifth of more than MANY_LABELS labels. Everything that depends on labels (the parameter and the temperature too) is
    computed anew without those that are left out. choice: of the final head; its logits show doubtful labels.
    Raises InputRefused if the labels cannot be divided.
    """
    rows = some(samples, np.arange(len(samples)), settings.seed)
    folds, how = _split(samples, rows, holdout, settings.seed)
    return evaluate_folds(samples, settings, folds, how, choice)


def evaluate_folds(samples: Samples, settings: FitSettings, folds: list[Fold], how: str, choice: Choice) -> Evaluation:
    """Evaluate the method on given splits. how: the kind of split, in words."""
    results = [_test(samples, fold, settings) for fold in folds]
    before, after = (np.concatenate([result[number] for result in results]) for number in (0, 1))
    curve = _learning_curve(samples, folds, settings, [parameter for *_, parameter in results], after)
    calibration = calibrate(choice.logits, samples.targets[choice.rows], samples.multi_label)
    return assess(samples, folds, how, before, after, choice, curve, calibration.note)


def assess(
    samples: Samples,
    folds: list[Fold],
    how: str,
    before: Scores,
    after: Scores,
    choice: Choice,
    curve: tuple[tuple[int, float, float], ...] = (),
    temperature_note: str = "",
) -> Evaluation:
    """The figures of scores on the images that the folds leave out, in that order.

    before, after: without and with the temperature. choice: its logits show doubtful labels. curve and temperature_note
    are those of `Evaluation`.
    """
    tested = np.concatenate([left_out for _, left_out in folds])
    targets = samples.targets[tested]
    guesses = predictions(after, samples.multi_label)
    by_class = _by_class(samples.names, targets, guesses, after)
    frequent = int(samples.targets[folds[0][0]].sum(axis=0).argmax())
    accuracy = _accuracy(targets, guesses)
    always = _accuracy(targets, np.eye(len(samples.names), dtype=np.float32)[[frequent] * len(targets)])
    return Evaluation(
        how=how,
        images=len(tested),
        accuracy=accuracy,
        balanced_accuracy=_balanced_accuracy(targets, guesses, samples.multi_label),
        macro_f1=float(np.mean([each.f1 for each in by_class])),
        baseline=samples.names[frequent],
        baseline_accuracy=always,
        classes=by_class,
        confusion=() if samples.multi_label else _confusion(targets, guesses),
        ece_before=calibration_error(before, targets, samples.multi_label),
        ece_after=calibration_error(after, targets, samples.multi_label),
        curve=curve,
        mistakes=_mistakes(samples, tested, guesses, after),
        doubtful=_doubtful(samples, choice),
        warnings=(
            *_general_warnings(len(tested), accuracy, always, samples.names[frequent]),
            *_warnings(samples, folds),
        ),
        temperature_note=temperature_note,
    )


def predictions(scores: Scores, multi_label: bool) -> Targets:
    """[N, C] of 0 and 1: the class of the highest score, or with `multi_label` all of at least 0.5."""
    if multi_label:
        return np.asarray(scores >= 0.5, np.float32)
    return np.asarray(np.eye(scores.shape[1])[scores.argmax(axis=1)], np.float32)


def calibration_error(scores: Scores, targets: Targets, multi_label: bool) -> float:
    """Expected calibration error: how far scores are from the share of them that is right, on average (15 bins).

    Of the highest score of each image, or with `multi_label` of all scores.
    """
    if multi_label:
        confidence, is_right = scores.reshape(-1), targets.reshape(-1)
    else:
        best = scores.argmax(axis=1)
        confidence, is_right = scores[np.arange(len(best)), best], targets[np.arange(len(best)), best]
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [
        (bins == number).mean() * abs(confidence[bins == number].mean() - is_right[bins == number].mean())
        for number in np.unique(bins)
    ]
    return float(sum(gaps))


def probabilities(logits: Logits, temperature: float, multi_label: bool) -> Scores:
    """Scores of logits, as `Head.scores` computes them."""
    scaled = torch.from_numpy(logits) / temperature
    return np.asarray((scaled.sigmoid() if multi_label else scaled.softmax(1)).numpy(), np.float32)


def _split(samples: Samples, rows: Rows, holdout: float | None, seed: int) -> tuple[list[Fold], str]:
    by_group = "" if samples.groups is None else ", groups kept together"
    sampled = "" if len(rows) == len(samples) else f", of a sample of {len(rows):,} labels"
    if holdout is None and len(rows) <= MANY_LABELS:
        folds = folds_of(samples, rows, FOLDS, seed)
        return folds, f"{len(folds)}-fold cross-validation{by_group}{sampled}"
    folds = folds_of(samples, rows, round(1 / (holdout or 1 / FOLDS)), seed)[:1]
    return folds, f"hold-out of {len(folds[0][1]):,} labels{by_group}{sampled}"


def _test(samples: Samples, fold: Fold, settings: FitSettings) -> tuple[Scores, Scores, float]:
    """Scores of the images left out, without and with the temperature, and the parameter of the fit."""
    fitted, left_out = fold
    choice = choose(samples, fitted, settings)
    head = fit_rows(samples, fitted, settings, choice.parameter)
    temperature = calibrate(choice.logits, samples.targets[choice.rows], samples.multi_label).temperature
    logits = _logits(head, samples, left_out)
    before, after = (probabilities(logits, each, samples.multi_label) for each in (1.0, temperature))
    return before, after, choice.parameter


def _logits(head: Head, samples: Samples, rows: Rows) -> Logits:
    return np.asarray(head.logits(torch.from_numpy(samples.take(rows))).numpy(), np.float32)


def _accuracy(targets: Targets, guesses: Targets) -> float:
    return float((targets == guesses).all(axis=1).mean())


def _balanced_accuracy(targets: Targets, guesses: Targets, multi_label: bool) -> float:
    """Mean recall of the classes; with `multi_label` the mean of recall and specificity, over the classes."""
    truth, guess = targets > 0, guesses > 0
    recalls = [guess[truth[:, c], c].mean() for c in range(truth.shape[1]) if truth[:, c].any()]
    if multi_label:
        recalls += [(~guess[~truth[:, c], c]).mean() for c in range(truth.shape[1]) if (~truth[:, c]).any()]
    return float(np.mean(recalls))


def _by_class(names: tuple[str, ...], targets: Targets, guesses: Targets, scores: Scores) -> tuple[ClassResult, ...]:
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(targets, guesses, average=None, zero_division=0)
    labels = targets.sum(axis=0)
    return tuple(
        ClassResult(
            name,
            int(labels[c]),
            float(precision[c]),
            float(recall[c]),
            float(f1[c]),
            float(metrics.average_precision_score(targets[:, c], scores[:, c])) if labels[c] else 0.0,
        )
        for c, name in enumerate(names)
    )


def _confusion(targets: Targets, guesses: Targets) -> tuple[tuple[int, ...], ...]:
    counts = targets.T.astype(np.int64) @ guesses.astype(np.int64)
    return tuple(tuple(row) for row in counts.tolist())


def _learning_curve(
    samples: Samples, folds: list[Fold], settings: FitSettings, parameters: list[float], after: Scores
) -> tuple[tuple[int, float, float], ...]:
    """Accuracy and macro-F1 with an eighth, a quarter, half and all of the labels that a fold is fitted to.

    All points are tested on the same images, those that the folds leave out, so that they can be compared with each
    other and with the evaluation. parameters: of each fold. after: scores with all labels.
    """
    targets = samples.targets[np.concatenate([left_out for _, left_out in folds])]
    points = []
    for fraction in FRACTIONS:
        results, sizes = [], []
        for draw in range(DRAWS if len(folds) == 1 else 1):
            logits = []
            for (fitted, left_out), parameter in zip(folds, parameters, strict=True):
                rows = _draw(samples, fitted, fraction, [settings.seed, draw])
                sizes.append(len(rows))
                logits.append(_logits(fit_rows(samples, rows, settings, parameter), samples, left_out))
            scores = probabilities(np.concatenate(logits), 1.0, samples.multi_label)
            results.append(_accuracy_and_f1(targets, predictions(scores, samples.multi_label)))
        accuracy, macro_f1 = (float(value) for value in np.mean(results, axis=0))
        points.append((round(float(np.mean(sizes))), accuracy, macro_f1))
    every = round(float(np.mean([len(fitted) for fitted, _ in folds])))
    return (*points, (every, *_accuracy_and_f1(targets, predictions(after, samples.multi_label))))


def _accuracy_and_f1(targets: Targets, guesses: Targets) -> tuple[float, float]:
    return _accuracy(targets, guesses), float(metrics.f1_score(targets, guesses, average="macro", zero_division=0))


def _draw(samples: Samples, rows: Rows, fraction: float, seed: list[int]) -> Rows:
    """A random part of the rows, with the same share of each class and at least one image of it."""
    classes = samples.classes(rows)
    order = np.random.default_rng(seed).permutation(len(rows))
    chosen = [order[classes[order] == each] for each in np.unique(classes)]
    parts = [each[: max(1, round(fraction * len(each)))] for each in chosen]
    drawn: Rows = rows[np.sort(np.concatenate(parts))]
    return drawn


def _mistakes(samples: Samples, rows: Rows, guesses: Targets, scores: Scores) -> tuple[Example, ...]:
    """The images with a wrong prediction, the most confident first."""
    wrong = np.flatnonzero((guesses != samples.targets[rows]).any(axis=1))
    confidence = np.where(guesses != samples.targets[rows], np.maximum(scores, 1 - scores), 0).max(axis=1)
    if not samples.multi_label:
        confidence = scores.max(axis=1)
    ordered = wrong[np.argsort(-confidence[wrong], kind="stable")][:MAX_SHOWN]
    return tuple(
        Example(
            samples.image_ids[rows[place]],
            _text(samples.names, samples.targets[rows[place]]),
            _text(samples.names, guesses[place]),
            float(confidence[place]),
        )
        for place in ordered
    )


def _doubtful(samples: Samples, choice: Choice) -> tuple[Example, ...]:
    """Labels that are probably wrong, by confident learning (Northcutt et al. 2021).

    An image counts if the score of another class is at least the mean score of the images labelled so. They are sorted
    by how much that score exceeds the score of the given label.
    """
    if samples.multi_label:
        return ()
    targets = samples.targets[choice.rows]
    temperature = calibrate(choice.logits, targets, multi_label=False).temperature
    scores = probabilities(choice.logits, temperature, multi_label=False)
    given = targets.argmax(axis=1)
    means = np.array([scores[given == c, c].mean() if (given == c).any() else np.inf for c in range(scores.shape[1])])
    others = np.where((targets == 0) & (scores >= means), scores, 0)
    own = scores[np.arange(len(given)), given]
    margin = others.max(axis=1) - own
    chosen = np.flatnonzero(margin > 0)
    ordered = chosen[np.argsort(-margin[chosen], kind="stable")][:MAX_SHOWN]
    return tuple(
        Example(
            samples.image_ids[choice.rows[place]],
            samples.names[given[place]],
            samples.names[int(others[place].argmax())],
            float(others[place].max()),
        )
        for place in ordered
    )


def _text(names: tuple[str, ...], flags: Targets) -> str:
    return ", ".join(names[c] for c in np.flatnonzero(flags)) or "none"


def _general_warnings(tested: int, accuracy: float, always: float, frequent: str) -> list[str]:
    """always: accuracy of predicting the most frequent class."""
    warnings = []
    if tested < FEW_TESTED:
        warnings.append(
            f"only {counted(tested, 'label')} tested the classes: all figures are uncertain; label more images, so "
            f"that at least {FEW_TESTED} test them"
        )
    if accuracy <= always:
        warnings.append(
            f"the accuracy of {100 * accuracy:.1f} % is not better than that of always answering {frequent}, "
            f"{100 * always:.1f} %: check the labels, label more images, or take another network"
        )
    return warnings


def _warnings(samples: Samples, folds: list[Fold]) -> tuple[str, ...]:
    warnings = [
        f"{name} has {counted(count, 'label')}: its figures are not reliable; label at least {FEW_LABELS} images per "
        "class"
        for name, count in zip(samples.names, samples.counts.tolist(), strict=True)
        if count < FEW_LABELS
    ]
    for c, name in enumerate(samples.names):
        if any(
            samples.targets[left_out, c].any() and not samples.targets[fitted, c].any() for fitted, left_out in folds
        ):
            warnings.append(f"{name} occurs in one group only, so it could not be fitted when it was tested")
    return tuple(warnings)
