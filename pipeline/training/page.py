"""The evaluation for people: a table on the terminal, and one HTML page with pictures that needs no other file."""

import base64
from collections.abc import Mapping
from importlib import resources
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import SettingRefused, printable
from pipeline.training.evaluate import Evaluation, Example

MAX_MATRIX = 30
MAX_PICTURES = 24
MAX_TABLE = 40


def percent(share: float) -> str:
    """0.8512 → "85.1 %"."""
    return f"{100 * share:.1f} %"


def figures(evaluation: Evaluation, temperature: float) -> list[tuple[str, str]]:
    """The main figures by name, as text."""
    curve = evaluation.curve
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
        (
            "more labels",
            f"{curve[-2][0]:,} labels give {percent(curve[-2][1])}, {curve[-1][0]:,} give {percent(curve[-1][1])}",
        ),
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


def html(title: str, summary: str, evaluation: Evaluation, temperature: float, pictures: Mapping[str, bytes]) -> str:
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
