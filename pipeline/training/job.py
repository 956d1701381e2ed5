"""From the embeddings of an output and some labels to a head with its evaluation."""

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import check_choices, flag
from pipeline.errors import InputRefused, SettingRefused, counted
from pipeline.explore.choices import duplicates_of
from pipeline.explore.table import Output, open_output
from pipeline.explore.vectors import network_of, space_of
from pipeline.storage import access, uris
from pipeline.training import labels as label_files
from pipeline.training.labels import Labels

if TYPE_CHECKING:
    from pipeline.models.heads import Head

METHODS = ("linear", "knn", "mlp", "centroid")
SUFFIX = ".safetensors"
MAX_SHOWN = 10
MIN_LABELS = 3
"""Of a class: one to test, and two to choose a parameter with."""
MAX_SUGGESTIONS = 10_000
RANKED = 1000
"""Images of the ranking of one concept."""


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit. Every field is a command-line flag. Raises SettingRefused if a value is not valid."""

    labels: str = flag(
        "CSV, JSON or Parquet of images and classes; GeoJSON of places; folder; column:NAME, a kept column",
        "",
        metavar="FILE",
    )
    positives: str | None = flag(
        "instead of --labels: names of images of one concept; the archive is ranked for it", None, metavar="FILE"
    )
    negatives: str | None = flag("with --positives: names of images that are not of it", None, metavar="FILE")
    suggest: int = flag("write the next N images to label beside the head", 0, metavar="N")
    to: str = flag("the head to write; the evaluation is written beside it, as .json and .html", "", metavar="FILE")
    method: str = flag("kind of head; linear is a logistic regression", "linear", choices=METHODS)
    name_column: str = flag("column of the labels with the images' names", "image", metavar="COL")
    label_column: str = flag("column of the labels with the classes", "label", metavar="COL")
    multi_label: bool = flag("an image may have any number of classes", False)
    group_by: str | None = flag(
        "column of the output; images with one value are never on both sides of a split", None, metavar="COL"
    )
    holdout: float | None = flag(
        "share of the labels to test on (default: each label is tested once, in five folds)", None, metavar="F"
    )
    class_weights: str = flag(
        "balanced: classes count alike; auto: if one has three times the labels of another",
        "auto",
        choices=("auto", "balanced", "none"),
    )
    normalize: bool = flag("scale vectors to length 1", True)
    seed: int = flag("seed of the splits and of the mlp", 0, metavar="N")
    exclude: str | None = flag(
        "leave out the labels of duplicates that a file of `duplicates` does not keep", None, metavar="FILE.parquet"
    )
    pictures: bool = flag("put pictures of mistakes on the page, read from the archive", True)

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.labels and not self.positives:
            raise SettingRefused("--labels is missing: name a file of images and classes, or folder, or column:NAME")
        if self.labels and self.positives:
            raise SettingRefused("--labels and --positives are two ways to label: use one of them")
        if self.negatives and not self.positives:
            raise SettingRefused("--negatives needs --positives, the images of the concept")
        if self.positives and self.multi_label:
            raise SettingRefused("--multi-label does not fit --positives, which has one concept: leave it out")
        if not 0 <= self.suggest <= MAX_SUGGESTIONS:
            raise SettingRefused(f"--suggest is {self.suggest}: it must be a number from 0 to {MAX_SUGGESTIONS}")
        if not self.to:
            raise SettingRefused("--to is missing: name the head to write, as in head.safetensors")
        if not self.to.endswith(SUFFIX):
            raise SettingRefused(f"--to is {uris.redact(self.to)!r}: the name of a head must end in {SUFFIX}")
        if problem := uris.check_output(self.to):
            raise SettingRefused(f"--to {uris.redact(self.to)} {problem}")
        if self.holdout is not None and not 0 < self.holdout <= 0.5:
            raise SettingRefused(f"--holdout is {self.holdout:g}: it must be greater than 0 and at most 0.5")
        if not 0 <= self.seed < 1 << 32:
            raise SettingRefused(f"--seed is {self.seed}: it must be a number from 0 to {(1 << 32) - 1}")


@dataclass(frozen=True)
class FitResult:
    """A head, its evaluation, the labels, and the files that were written. notes: sentences for the user."""

    head: "Head"
    evaluation: Any
    labels: Labels
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


def fit(embeddings: str, config: FitConfig) -> FitResult:
    """Fit a head to the labelled vectors of an output, evaluate it, and write both.

    Raises InputRefused, OutputRefused and SettingRefused before anything is written.
    """
    from pipeline.models.head_flags import windows_of  # imports torch
    from pipeline.training.evaluate import evaluate  # imports scikit-learn
    from pipeline.training.fit import FitSettings, choose, fit_all, some
    from pipeline.training.samples import read_samples

    output = open_output(embeddings)
    space = space_of(output)
    labels = _labels(output, config)
    _check_classes(labels, config)
    samples = read_samples(
        output, labels, group_by=config.group_by, multi_label=config.multi_label, normalize=config.normalize
    )
    settings = FitSettings(config.method, config.class_weights, config.seed)
    choice = choose(samples, some(samples, np.arange(len(samples)), config.seed), settings)
    evaluation = evaluate(samples, settings, config.holdout, choice)
    network = {**network_of(output), **windows_of(output.settings)}
    head = replace(fit_all(samples, settings, choice), space=space, network=network)
    _write(output, config, head, evaluation, labels)
    lists, suggested = _write_lists(output, config, head, labels)
    ends = (SUFFIX, ".json", ".html", *lists)
    files = tuple(uris.redact(config.to).removesuffix(SUFFIX) + end for end in ends)
    return FitResult(head, evaluation, labels, files, _notes(config, suggested, labels))


def _notes(config: FitConfig, suggested: int, labels: Labels) -> tuple[str, ...]:
    """What the user should know of the labels and suggestions. suggested: their number."""
    notes = [text] if (text := unknown_text(labels)) else []
    if config.suggest and not suggested:
        notes.append(f"--suggest {config.suggest}: no image is left to label, so the file of suggestions is empty")
    elif suggested < config.suggest:
        notes.append(f"--suggest {config.suggest}: only {counted(suggested, 'image')} without a label left")
    return tuple(notes)


def _labels(output: Output, config: FitConfig) -> Labels:
    labels = _all_labels(output, config)
    return labels.without(duplicates_of(config.exclude).to_pylist()) if config.exclude else labels


def _all_labels(output: Output, config: FitConfig) -> Labels:
    if config.positives:
        return label_files.find_concept(
            output, config.positives, config.negatives, name_column=config.name_column, seed=config.seed
        )
    return label_files.find(
        output,
        config.labels,
        name_column=config.name_column,
        label_column=config.label_column,
        multi_label=config.multi_label,
    )


def _write_lists(output: Output, config: FitConfig, head: "Head", labels: Labels) -> tuple[list[str], int]:
    """Write the ranking of a concept, and the suggestions: ends of the files' names, and the number of suggestions."""
    from pipeline.training.suggest import as_csv, rank, suggest

    base, ends, suggested = uris.normalize(config.to).removesuffix(SUFFIX), [], 0
    concept = label_files.concept_name(config.positives) if config.positives else None
    if concept:
        ends.append(".ranking.csv")
        access.write(base + ends[-1], as_csv(rank(output, head, concept, RANKED)))
    if config.suggest:
        marked = [row for row in labels.rows if row not in labels.background]
        suggestions = suggest(output, head, marked, config.suggest, concept)
        suggested = len(suggestions)
        ends.append(".suggest.csv")
        access.write(base + ends[-1], as_csv(suggestions))
    return ends, suggested


def _check_classes(labels: Labels, config: FitConfig) -> None:
    """Refuse labels that no head can be fitted to and tested with."""
    given = f"--labels {uris.redact(config.labels)}" if config.labels else f"--positives {config.positives}"
    if len(labels.names) < (1 if config.multi_label else 2):
        classes = f"one class, {labels.names[0]}" if labels.names else "no class"
        raise InputRefused(f"{given} has {classes}: label images of two classes or more")
    counts = Counter(name for each in labels.classes for name in each)
    if rare := [name for name, count in counts.items() if count < MIN_LABELS]:
        raise InputRefused(
            f"{given} has fewer than {MIN_LABELS} labels of {', '.join(sorted(rare)[:MAX_SHOWN])}, too few to fit and "
            "to test a class: label more images of these classes, or leave the classes out"
        )


def _write(output: Output, config: FitConfig, head: "Head", evaluation: Any, labels: Labels) -> None:
    """Write the evaluation, then the head."""
    from pipeline.explore.pictures import pictures
    from pipeline.training import page

    base = uris.normalize(config.to).removesuffix(SUFFIX)
    title = f"{base.rpartition('/')[2]}: {len(head.classes)} classes from {len(labels.rows):,} labels"
    summary = f"{head.method} on {output.uri}, embedding space {head.space.id}. {unknown_text(labels)}"
    seen = pictures(output, page.shown(evaluation)) if config.pictures else {}
    text = page.html(title, summary, evaluation, head.temperature, seen)
    record = {
        "embeddings": output.uri,
        "method": head.method,
        "labels": len(labels.rows),
        "unknown": list(labels.unknown),
        "ambiguous": list(labels.ambiguous),
        "temperature": head.temperature,
        "embedding_space": head.space.to_json(),
        **evaluation.to_json(),
    }
    access.write(f"{base}.json", json.dumps(record, indent=1).encode())
    access.write(f"{base}.html", text.encode())
    head.save(config.to)


def unknown_text(labels: Labels, places: str = "rows of the output") -> str:
    """Sentences about the labels that are no image of the output, or of several classes; "" if there are none."""
    sentences = []
    if labels.unknown:
        unreadable = f", {len(labels.unreadable)} of them could not be read" if labels.unreadable else ""
        is_one = len(labels.unknown) == 1
        names = (
            "1 name of the labels is not among the" if is_one else f"{len(labels.unknown)} names of the labels are no"
        )
        sentences.append(f"{names} {places}{unreadable}")
        sentences[-1] += f": {_listed(labels.unknown)}."
    if labels.ambiguous:
        images = counted(len(labels.ambiguous), "image")
        sentences.append(f"{images} in places of several classes left out: {_listed(labels.ambiguous)}.")
    return " ".join(sentences)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (", …" if len(names) > MAX_SHOWN else "")
