"""Fit a head to labelled vectors: a linear probe, nearest neighbours, a small network or centroids.

Every method has one parameter that is chosen by cross-validation. The logits of images that were left out in it also
give the temperature that calibrates the scores.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import InputRefused, SettingRefused, counted
from pipeline.explore.vectors import Vectors
from pipeline.models.heads import SHARPNESS, Head
from pipeline.training.samples import Samples, Targets, VectorFile

try:
    import sklearn.exceptions
    import sklearn.linear_model
    import sklearn.model_selection
    import sklearn.neural_network
    import threadpoolctl
except ImportError as error:
    raise SettingRefused("`nightshift fit` needs scikit-learn: pip install 'nightshift[fit]'") from error

FOLDS = 5
INVERSE_L2 = tuple(10.0**power for power in range(-1, 5))
"""C of scikit-learn, for vectors whose mean squared length is 1."""
NEIGHBOURS = (1, 3, 5, 10, 20, 50)
MLP_L2 = (1e-5, 1e-3, 1e-1)
HIDDEN = 256
MAX_ITERATIONS = 1000
FEW_PRODUCTS = 1 << 24
"""Up to this size, products on one core are faster than on several, which wait for each other after each of them."""
LBFGS_ITERATIONS = 100
BALANCE_RATIO = 3
"""With class weights `auto`, classes are weighted if the largest has so many times the images of the smallest."""
SAME_LOSS = 1e-3
"""Parameters whose log-losses differ by less are as good as each other; the first one of the grid is taken."""
MIN_SHARPENING = 30
"""Labels left out that a temperature below 1 needs: of fewer, or without an error among them, none can be known."""
MIN_ROWS = 4
"""Labels to fit to, on one side of a split."""
ABSENT = -30.0
"""Logit of a class that the images of a fold do not have."""
SELECT_BYTES = 128 << 20
"""Vectors that choose a parameter if there are more than memory should hold. The head itself is fitted to all."""

Rows = NDArray[np.int64]
Fold = tuple[Rows, Rows]
Logits = NDArray[np.float32]
"""[N, C]"""


@dataclass(frozen=True)
class FitSettings:
    """How a head is fitted. method: linear, knn, mlp or centroid. class_weights: auto, balanced or none."""

    method: str = "linear"
    class_weights: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Choice:
    """The result of a cross-validation. losses: mean log-loss of each parameter. logits: [N, C] of images left out.

    rows: the images that `logits` is of.
    """

    parameter: float
    losses: dict[float, float]
    logits: Logits
    rows: Rows


@dataclass(frozen=True)
class Calibration:
    """The temperature of a head's scores. note: why it is 1, although a smaller one has a smaller log-loss, or ""."""

    temperature: float
    note: str = ""


def folds_of(samples: Samples, rows: Rows, number: int, seed: int) -> list[Fold]:
    """Split rows into at most `number` folds: (rows to fit, rows left out), stratified by class and kept by group.

    There are as many folds as the smallest class has images, and as there are groups. Raises InputRefused if these are
    too few.
    """
    targets, groups = samples.targets[rows], None if samples.groups is None else samples.groups[rows]
    counts = targets.sum(axis=0).astype(int)
    number = min(number, len(rows) if samples.multi_label else int(min(count for count in counts if count)))
    if groups is not None:
        number = min(max(number, 2), len(np.unique(groups)))
    if number < 2:
        names = [name for name, count in zip(samples.names, counts, strict=True) if count == 1]
        reason = "all labelled images are in one group" if groups is not None else f"{', '.join(names[:5])} has 1 label"
        raise InputRefused(f"the labels cannot be divided to fit and to test: {reason}; add labels")
    return _split(samples, rows, number, seed, groups, stratify=not samples.multi_label)


def _inner_folds(samples: Samples, rows: Rows, seed: int) -> list[Fold]:
    """The folds that choose a parameter. They may lack a class, and divide a group if there is only one.

    Raises InputRefused if the groups leave fewer than MIN_ROWS images on one side of a split.
    """
    if len(rows) < MIN_ROWS:
        raise InputRefused(
            f"the labels cannot be divided to fit and to test: without one group only {len(rows)} are left; label "
            "images of more groups, or leave out --group-by"
        )
    groups = None if samples.groups is None else samples.groups[rows]
    if groups is not None and len(np.unique(groups)) < 2:
        groups = None
    counts = samples.targets[rows].sum(axis=0).astype(int)
    least = len(rows) if samples.multi_label else min(count for count in counts.tolist() if count)
    number = max(2, min(FOLDS, least, len(rows) if groups is None else len(np.unique(groups))))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return _split(samples, rows, number, seed, groups, stratify=not samples.multi_label and counts.max() >= number)


def _split(samples: Samples, rows: Rows, number: int, seed: int, groups: Rows | None, *, stratify: bool) -> list[Fold]:
    model_selection = sklearn.model_selection
    kinds = {
        (True, False): model_selection.StratifiedKFold,
        (True, True): model_selection.StratifiedGroupKFold,
        (False, False): model_selection.KFold,
        (False, True): model_selection.GroupKFold,
    }
    splitter = kinds[stratify, groups is not None](number, shuffle=True, random_state=seed)
    splits = splitter.split(np.zeros(len(rows)), samples.classes(rows), groups)
    return [(rows[fitted], rows[left_out]) for fitted, left_out in splits]


def choose(samples: Samples, rows: Rows, settings: FitSettings) -> Choice:
    """Choose the method's parameter by cross-validation on some rows, by the smallest log-loss."""
    method = _METHODS[settings.method]
    rows = some(samples, rows, settings.seed)
    folds = _inner_folds(samples, rows, settings.seed)
    place = np.full(len(samples), -1)
    place[rows] = np.arange(len(rows))
    logits = {value: np.zeros((len(rows), len(samples.names)), np.float32) for value in method.grid}
    for fitted, left_out in folds:
        fit = method(samples.take(fitted), samples.targets[fitted], samples.multi_label, settings)
        x = torch.from_numpy(samples.take(left_out))
        for value in method.grid:
            head = _head(samples, settings.method, fit(value))
            logits[value][place[left_out]] = head.logits(x).numpy()
    targets = samples.targets[rows]
    losses = {value: log_loss(each, targets, best_temperature(each, targets, samples.multi_label), samples.multi_label)
              for value, each in logits.items()}  # fmt: skip
    best = next(value for value in losses if losses[value] <= min(losses.values()) + SAME_LOSS)
    return Choice(best, losses, logits[best], rows)


def fit_rows(samples: Samples, rows: Rows, settings: FitSettings, parameter: float, temperature: float = 1.0) -> Head:
    """Fit a head with a parameter to some rows, which are in memory at once."""
    method = _METHODS[settings.method]
    fit = method(samples.take(rows), samples.targets[rows], samples.multi_label, settings)
    return _head(samples, settings.method, fit(parameter), temperature)


def fit_all(samples: Samples, settings: FitSettings, choice: Choice) -> Head:
    """Fit the final head to all samples. More vectors than memory should hold are streamed, for a linear probe."""
    temperature = calibrate(choice.logits, samples.targets[choice.rows], samples.multi_label).temperature
    if isinstance(samples.vectors, VectorFile):
        if settings.method not in ("linear", "centroid"):
            raise SettingRefused(
                f"--method {settings.method} needs all vectors in memory, and {len(samples):,} of "
                f"{samples.vectors.dim} numbers are too many: use linear or centroid, or fewer labels"
            )
        is_linear = settings.method == "linear"
        tensors = _stream_linear(samples, settings, choice.parameter) if is_linear else _stream_centroids(samples)
        return _head(samples, settings.method, tensors, temperature)
    return fit_rows(samples, np.arange(len(samples)), settings, choice.parameter, temperature)


def calibrate(logits: Logits, targets: Targets, multi_label: bool) -> Calibration:
    """The best temperature, but at least 1 without an error or with few labels: these cannot show how sure it may be.

    logits: [N, C] of images that were left out of the fit.
    """
    best = best_temperature(logits, targets, multi_label)
    if multi_label:
        is_wrong = ((logits >= 0) != (targets > 0)).any()
    else:
        is_wrong = (logits.argmax(axis=1) != targets.argmax(axis=1)).any()
    if best >= 1 or (is_wrong and len(targets) >= MIN_SHARPENING):
        return Calibration(best)
    labels = counted(len(targets), "label")
    reason = f"only {labels} left out" if is_wrong else f"no error among {labels} left out"
    return Calibration(1.0, f"{reason}, so nothing shows that the scores may be surer")


def best_temperature(logits: Logits, targets: Targets, multi_label: bool) -> float:
    """The divisor of logits with the smallest log-loss, from 0.05 to 20 (Guo et al. 2017)."""
    from scipy.optimize import minimize_scalar

    result = minimize_scalar(
        lambda power: log_loss(logits, targets, float(np.exp(power)), multi_label),
        bounds=(np.log(0.05), np.log(20)),
        method="bounded",
    )
    return float(np.exp(result.x))


def log_loss(logits: Logits, targets: Targets, temperature: float, multi_label: bool) -> float:
    """Mean negative log-likelihood of the true classes, per image and with `multi_label` per class."""
    scaled, truth = torch.from_numpy(logits).double() / temperature, torch.from_numpy(targets).double()
    if multi_label:
        return float(functional.binary_cross_entropy_with_logits(scaled, truth))
    return float(functional.cross_entropy(scaled, truth))


def class_weights(targets: Targets, kind: str) -> NDArray[np.float64]:
    """Weight of each class: 1, or `balanced` as in scikit-learn: inverse to its number of images, 1 on average."""
    counts = targets.sum(axis=0, dtype=np.float64)
    present = counts[counts > 0]
    if kind == "none" or (kind == "auto" and present.max() < BALANCE_RATIO * present.min()):
        return np.ones(len(counts))
    return np.where(counts > 0, len(targets) / (len(present) * np.maximum(counts, 1)), 0.0)


def some(samples: Samples, rows: Rows, seed: int) -> Rows:
    """At most SELECT_BYTES of the rows, drawn at random."""
    most = SELECT_BYTES // (4 * samples.vectors.shape[1])
    if len(rows) <= most or not isinstance(samples.vectors, VectorFile):
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def _head(samples: Samples, method: str, tensors: dict[str, Tensor], temperature: float = 1.0) -> Head:
    return Head(method, tensors, samples.names, EmbeddingSpace({}), temperature, samples.multi_label, samples.normalize)


class _Method:
    """A method on the images of a fold: [N, dim] vectors and [N, C] targets. Called with a parameter of the grid."""

    grid: tuple[float, ...] = (0.0,)

    def __init__(self, x: Vectors, targets: Targets, multi_label: bool, settings: FitSettings) -> None:
        self.x, self.targets, self.multi_label, self.settings = x, targets, multi_label, settings
        self.classes = targets.argmax(axis=1)

    def __call__(self, parameter: float) -> dict[str, Tensor]:
        """The tensors of a head."""
        raise NotImplementedError

    def weights(self) -> "NDArray[np.float64]":
        """Weight of each image of a fold."""
        weights: NDArray[np.float64] = class_weights(self.targets, self.settings.class_weights)[self.classes]
        return weights


class _Linear(_Method):
    """Logistic regression: softmax over the classes, or with `multi_label` a sigmoid for each."""

    grid = INVERSE_L2

    def __call__(self, parameter: float) -> dict[str, Tensor]:
        if not self.multi_label:
            return _tensors(*self._fit(self.classes, self.weights(), parameter))
        kind = self.settings.class_weights
        rows = []
        for column in self.targets.T.astype(np.int64):
            both = np.stack([1 - column, column], axis=1).astype(np.float32)
            weight, bias = self._fit(column, class_weights(both, kind)[column], parameter, classes=2)
            rows.append((weight[1] - weight[0], bias[1] - bias[0]))
        return _tensors(np.stack([weight for weight, _ in rows]), np.array([bias for _, bias in rows]))

    def _fit(self, y: Rows, weights: Any, parameter: float, classes: int = 0) -> "tuple[NDArray[Any], NDArray[Any]]":
        """Weights [C, dim] and biases [C]. A class without images gets the logit ABSENT."""
        count = classes or self.targets.shape[1]
        weight, bias = np.zeros((count, self.x.shape[1])), np.full(count, ABSENT)
        present = np.unique(y)
        if len(present) == 1:
            bias[present] = 0
            return weight, bias
        c = parameter / float(np.mean(np.square(self.x).sum(axis=1)))
        model = sklearn.linear_model.LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
        with _quietly(self.x.size * count):
            model.fit(self.x, y, weights)
        if len(present) == 2:
            weight[present] = np.stack([-model.coef_[0] / 2, model.coef_[0] / 2])
            bias[present] = [-model.intercept_[0] / 2, model.intercept_[0] / 2]
        else:
            weight[present], bias[present] = model.coef_, model.intercept_
        return weight, bias


class _Neighbours(_Method):
    """The votes of the k nearest labelled images."""

    grid = NEIGHBOURS

    def __call__(self, parameter: float) -> dict[str, Tensor]:
        return {
            "vectors": torch.from_numpy(self.x),
            "targets": torch.from_numpy(self.targets),
            "k": torch.tensor(min(int(parameter), len(self.x))),
        }


class _Network(_Method):
    """A network of one hidden layer."""

    grid = MLP_L2

    def __call__(self, parameter: float) -> dict[str, Tensor]:
        model = sklearn.neural_network.MLPClassifier(
            (HIDDEN,), alpha=parameter, random_state=self.settings.seed, solver="lbfgs", max_iter=200
        )
        y = self.targets.astype(np.int64) if self.multi_label else self.classes
        with _quietly(self.x.size * HIDDEN):
            model.fit(self.x, y, None if self.multi_label else self.weights())
        (hidden, weight), (hidden_bias, bias) = model.coefs_, model.intercepts_
        present = np.arange(self.targets.shape[1]) if self.multi_label else np.unique(y)
        if weight.shape[1] < len(present):  # two classes: one output, the logit of the second
            weight, bias = np.concatenate([-weight / 2, weight / 2], axis=1), np.concatenate([-bias / 2, bias / 2])
        weights, biases = np.zeros((self.targets.shape[1], len(weight))), np.full(self.targets.shape[1], ABSENT)
        weights[present], biases[present] = weight.T, bias
        return {**_tensors(weights, biases), **_tensors(hidden.T, hidden_bias, "hidden.")}


class _Centroids(_Method):
    """The cosine similarity to the mean of each class; with `multi_label`, the nearer one of two means per class."""

    def __call__(self, parameter: float) -> dict[str, Tensor]:
        sums = _centroid_sums(self.x, self.targets)
        return _of_sums(*sums, self.multi_label)


_METHODS: dict[str, type[_Method]] = {
    "linear": _Linear,
    "knn": _Neighbours,
    "mlp": _Network,
    "centroid": _Centroids,
}


def _centroid_sums(x: Vectors, targets: Targets) -> "tuple[NDArray[np.float64], NDArray[np.float64]]":
    """Sums of the vectors without and with each class, [2, C, dim], and numbers of them, [2, C]."""
    both = np.stack([1 - targets, targets]).astype(np.float64)
    return both.transpose(0, 2, 1) @ x, both.sum(axis=1)


def _of_sums(sums: "NDArray[Any]", counts: "NDArray[Any]", multi_label: bool) -> dict[str, Tensor]:
    """A head of centroids. A class without images gets the logit ABSENT."""
    if multi_label:
        means = sums / np.maximum(counts, 1)[..., None]
        squares = np.square(means).sum(axis=2)
        return _tensors((means[1] - means[0]) / SHARPNESS, (squares[0] - squares[1]) / 2 / SHARPNESS)
    directions = sums[1] / np.maximum(np.linalg.norm(sums[1], axis=1, keepdims=True), 1e-12)
    return _tensors(directions / SHARPNESS, np.where(counts[1] > 0, 0.0, ABSENT))


def _tensors(weight: "NDArray[Any]", bias: "NDArray[Any]", prefix: str = "") -> dict[str, Tensor]:
    arrays = {f"{prefix}weight": weight, f"{prefix}bias": bias}
    return {name: torch.from_numpy(np.ascontiguousarray(array, np.float32)) for name, array in arrays.items()}


def _stream_centroids(samples: Samples) -> dict[str, Tensor]:
    parts = (_centroid_sums(x, targets) for x, targets in samples.chunks())
    sums, counts = next(parts)
    for more_sums, more_counts in parts:
        sums, counts = sums + more_sums, counts + more_counts
    return _of_sums(sums, counts, samples.multi_label)


def _stream_linear(samples: Samples, settings: FitSettings, parameter: float) -> dict[str, Tensor]:
    """The linear probe of `_Linear` by L-BFGS over chunks of vectors: the same loss, with flat memory."""
    dim, count = samples.vectors.shape[1], len(samples.names)
    weight = torch.zeros(count, dim, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    weights = torch.from_numpy(_loss_weights(samples, settings))
    square = sum(float(np.square(x, dtype=np.float64).sum()) for x, _ in samples.chunks()) / len(samples)
    penalty = square / (2 * parameter)
    if count == 2 and not samples.multi_label:
        penalty *= 2  # `_Linear` has one vector for two classes, the difference of these two
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=LBFGS_ITERATIONS, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss_and_gradient() -> Tensor:
        optimizer.zero_grad()
        total = penalty * weight.square().sum()
        (total / len(samples)).backward()  # type: ignore[no-untyped-call]
        for x, targets in samples.chunks():
            part = _loss(x, targets, weight, bias, weights, samples.multi_label)
            (part / len(samples)).backward()  # type: ignore[no-untyped-call]
            total = total.detach() + part.detach()
        return total.detach() / len(samples)

    optimizer.step(loss_and_gradient)  # type: ignore[no-untyped-call]
    return _tensors(weight.detach().numpy(), bias.detach().numpy())


def _loss(x: Vectors, targets: Targets, weight: Tensor, bias: Tensor, weights: Tensor, multi_label: bool) -> Tensor:
    """Sum of the log-losses of a chunk. The large product is float32, all else float64."""
    logits = functional.linear(torch.from_numpy(x), weight.float(), bias.float()).double()
    truth = torch.from_numpy(targets).double()
    if multi_label:
        each = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        return (each * torch.where(truth > 0, weights[1], weights[0])).sum()
    losses = functional.cross_entropy(logits, truth, reduction="none")
    return (losses * (truth @ weights)).sum()


def _loss_weights(samples: Samples, settings: FitSettings) -> "NDArray[np.float64]":
    """Weights of the classes [C]; with `multi_label` those of an image without and with each class, [2, C]."""
    if not samples.multi_label:
        return class_weights(samples.targets, settings.class_weights)
    columns = [np.stack([1 - column, column], axis=1) for column in samples.targets.T]
    return np.stack([class_weights(both, settings.class_weights) for both in columns], axis=1)


@cache
def _thread_pools() -> "threadpoolctl.ThreadpoolController":
    """The libraries with threads. To find them takes longer than a small fit."""
    return threadpoolctl.ThreadpoolController()


@contextmanager
def _quietly(products: int) -> Iterator[None]:
    """Fit on one core if one step has few products, and without warnings.

    The steps are limited on purpose; the log-loss on images left out shows whether they suffice.
    """
    with warnings.catch_warnings(), _thread_pools().limit(limits=1 if products < FEW_PRODUCTS else None):
        warnings.simplefilter("ignore", sklearn.exceptions.ConvergenceWarning)
        yield
