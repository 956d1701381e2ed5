"""A linear probe on the vectors of each network: the same images, classes and folds for all."""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.comparison.job import CompareConfig
from pipeline.comparison.measure import Embedded
from pipeline.errors import InputRefused
from pipeline.training import labels as label_files
from pipeline.training.evaluate import predictions
from pipeline.training.fit import FOLDS, FitSettings, choose, fit_rows, folds_of
from pipeline.training.samples import Samples


def samples_of(embedded: Mapping[str, Embedded], config: CompareConfig) -> dict[str, Samples]:
    """The labelled images that all networks embedded, with the vectors of each network, in the same order.

    Raises InputRefused if the labels do not fit the images, or have one class.
    """
    common = reduce(lambda ids, each: ids & set(each.table["image_id"].to_pylist()), embedded.values(), _ids(embedded))
    wanted = pa.array(sorted(common), pa.string())
    samples: dict[str, Samples] = {}
    for name, each in embedded.items():
        same = each.table.filter(pc.is_in(each.table["image_id"], wanted)).sort_by("image_id")
        samples[name] = _samples(Embedded(each.uri, same, each.failures), config)
    return samples


def _ids(embedded: Mapping[str, Embedded]) -> set[str]:
    return set(next(iter(embedded.values())).table["image_id"].to_pylist())


def _samples(images: Embedded, config: CompareConfig) -> Samples:
    labels = label_files.find(
        images,
        config.labels,
        name_column=config.name_column,
        label_column=config.label_column,
    )
    if len(labels.names) < 2:
        raise InputRefused(f"--labels has one class, {labels.names[0]}: label images of two classes or more")
    rows = np.array(labels.rows)
    index = {name: number for number, name in enumerate(labels.names)}
    targets = np.zeros((len(rows), len(index)), np.float32)
    for row, (name,) in enumerate(labels.classes):
        targets[row, index[name]] = 1
    return Samples(images.vectors()[rows], targets, labels.names, labels.image_ids, _groups(images, config, rows))


def _groups(images: Embedded, config: CompareConfig, rows: "np.ndarray") -> "np.ndarray | None":
    if config.group_by is None:
        return None
    images.require([config.group_by])
    values = np.array(images.table[config.group_by].to_pylist(), object).astype(str)[rows]
    return np.asarray(np.unique(values, return_inverse=True)[1], np.int64)


def figures(samples: Samples, seed: int) -> dict[str, Any]:
    """Accuracy on images left out, by folds that depend on the labels and the seed alone."""
    settings = FitSettings(seed=seed)
    folds = folds_of(samples, np.arange(len(samples)), FOLDS, seed)
    accuracies, recalls = [], []
    for fitted, left_out in folds:
        head = fit_rows(samples, fitted, settings, choose(samples, fitted, settings).parameter)
        logits = head.logits(torch.from_numpy(samples.take(left_out))).numpy()
        truth, guess = samples.targets[left_out] > 0, predictions(logits, multi_label=False) > 0
        accuracies.append(float((truth & guess).any(axis=1).mean()))
        recalls.append(float(np.mean([guess[truth[:, c], c].mean() for c in np.flatnonzero(truth.any(axis=0))])))
    return {
        "accuracy": float(np.mean(accuracies)),
        "spread": float(np.std(accuracies, ddof=1)),
        "fold_accuracies": tuple(accuracies),
        "balanced_accuracy": float(np.mean(recalls)),
    }
