"""The evaluation for people: a table on the terminal, and one HTML page with pictures that needs no other file."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import SettingRefused, printable
from pipeline.training.evaluate import Evaluation, Example
from pipeline.training.history import FROZEN, Epoch

MAX_MATRIX = 30
MAX_PICTURES = 24
MAX_TABLE = 40
CHART_WIDTH, CHART_HEIGHT = 640, 240


def percent(share: float) -> str:
    """0.8512 → "85.1 %"."""
    return f"{100 * share:.1f} %"


def figures(evaluation: Evaluation, temperature: float) -> list[tuple[str, str]]:
    """The main figures by name, as text."""
    curve = evaluation.curve
    more = [f"{labels:,} labels give {percent(accuracy)}" for labels, accuracy, _ in curve[-2:]]
    return [
        ("tested on", f"{evaluation.images:,} labels, {evaluation.how}"),
        ("accuracy", percent(evaluation.accuracy)),
        ("always " + evaluation.baseline, percent(evaluation.baseline_accuracy)),
        ("balanced accuracy", percent(evaluation.balanced_accuracy)),
        ("macro-F1", percent(evaluation.macro_f1)),
        (
            "calibration error",
            f"{percent(evaluation.ece_after)} (before temperature scaling by {temperature:.2f}: "
            f"{percent(evaluation.ece_before)})",
        ),
        *(
            [("temperature", f"{temperature:.2f}: {evaluation.temperature_note}")]
            if evaluation.temperature_note
            else []
        ),
        *([("more labels", ", ".join(more))] if more else []),
    ]


def show(evaluation: Evaluation, temperature: float, console: Console | None = None) -> None:
    """Print the figures, and those of each class; of many classes, the MAX_TABLE with the worst F1."""
    console = console or Console()
    for name, value in figures(evaluation, temperature):
        console.print(Text(f"{printable(name):<20} {printable(value)}"))
    table = Table("class", "labels", "precision", "recall", "F1")
    for each in sorted(evaluation.classes, key=lambda each: each.f1)[:MAX_TABLE]:
        row = (str(each.labels), percent(each.precision), percent(each.recall), percent(each.f1))
        table.add_row(Text(printable(each.name)), *row)
    console.print(table)
    for warning in evaluation.warnings:
        console.print(Text(f"warning: {printable(warning)}"))


def html(
    title: str,
    summary: str,
    evaluation: Evaluation,
    temperature: float,
    pictures: Mapping[str, bytes],
    training: "Training | None" = None,
) -> str:
    """The page. pictures: JPEGs by image_id. Every name is escaped. Raises SettingRefused without Jinja."""
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise SettingRefused("the page needs Jinja: pip install 'nightshift[fit]'") from error

    template = Environment(autoescape=True).from_string(resources.files(__package__).joinpath("page.html").read_text())
    return template.render(
        title=title,
        summary=summary,
        evaluation=evaluation,
        figures=figures(evaluation, temperature),
        matrix=_matrix(evaluation),
        training=training,
        chart=training and loss_chart(training.history),
        groups=[
            (
                "Most confident mistakes",
                "Images whose prediction differs from the label, the highest score first.",
                _with_pictures(evaluation.mistakes, pictures),
            ),
            (
                "Labels that are probably wrong",
                "Look at these first: a wrong label costs more than a missing one.",
                _with_pictures(evaluation.doubtful, pictures),
            ),
        ],
        percent=percent,
    )


@dataclass(frozen=True)
class Training:
    """What the page says of a fine-tuning. history: its epochs. figures: further figures by name, as text."""

    history: Sequence[Epoch]
    figures: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Line:
    """A line of a chart. points: x and y in pixels, as SVG has them. colour: of CSS."""

    name: str
    points: str
    colour: str


@dataclass(frozen=True)
class Chart:
    """A chart of losses by epoch, CHART_WIDTH × CHART_HEIGHT pixels. highest: the loss at its top; 0 is at the bottom.

    best: x of the best epoch. all_layers: x of the last epoch that trained the classifier only.
    """

    lines: tuple[Line, ...]
    highest: float
    last: int
    best: float
    all_layers: float


def loss_chart(history: Sequence[Epoch]) -> Chart:
    """The losses of the training and of the images that end it."""
    highest = max([each.stop_loss for each in history] + [each.loss or 0 for each in history]) or 1.0
    step = CHART_WIDTH / max(len(history) - 1, 1)

    def line(name: str, colour: str, losses: Iterable[tuple[int, float | None]]) -> Line:
        points = (f"{n * step:.1f},{CHART_HEIGHT * (1 - loss / highest):.1f}" for n, loss in losses if loss is not None)
        return Line(name, " ".join(points), colour)

    training = line("training", "#888", ((each.number, each.loss) for each in history))
    stop = line("images that end the training", "#28a050", ((each.number, each.stop_loss) for each in history))
    best = max(each.number for each in history if each.is_best)
    frozen = max(each.number for each in history if each.phase == FROZEN)
    return Chart((training, stop), highest, history[-1].number, best * step, frozen * step)


def shown(evaluation: Evaluation) -> list[str]:
    """The image_ids whose pictures the page has."""
    examples = [*evaluation.mistakes[:MAX_PICTURES], *evaluation.doubtful[:MAX_PICTURES]]
    return list(dict.fromkeys(each.image_id for each in examples))


def _with_pictures(examples: tuple[Example, ...], pictures: Mapping[str, bytes]) -> list[dict[str, Any]]:
    return [
        {**vars(each), "picture": base64.b64encode(pictures.get(each.image_id, b"")).decode()}
        for each in examples[:MAX_PICTURES]
    ]


def _matrix(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The cells of the confusion matrix, of at most the MAX_MATRIX classes with the most mistakes."""
    confusion, names = evaluation.confusion, [each.name for each in evaluation.classes]
    wrong = {c: sum(row) - row[c] + sum(each[c] for each in confusion) - row[c] for c, row in enumerate(confusion)}
    chosen = sorted(sorted(wrong, key=lambda c: -wrong[c])[:MAX_MATRIX])
    return [
        {
            "name": names[c],
            "cells": [
                {"name": names[d], "count": confusion[c][d] or "", "colour": _colour(confusion[c], c, d)}
                for d in chosen
            ],
        }
        for c in chosen
    ]


def _colour(row: tuple[int, ...], label: int, guess: int) -> str:
    """Green for right predictions and red for wrong ones, by their share of the row."""
    share = row[guess] / max(sum(row), 1)
    return f"rgb({'40 160 80' if label == guess else '220 60 40'} / {share:.2f})"
