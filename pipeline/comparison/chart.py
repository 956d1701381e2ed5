"""A comparison as a table on the terminal, and as a picture of accuracy against speed."""

import io

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pipeline.comparison.job import Comparison, NetworkResult
from pipeline.errors import SettingRefused, printable

try:
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.ticker import LogFormatter
    from matplotlib.transforms import Bbox
except ImportError as error:
    raise SettingRefused("`nightshift compare` needs matplotlib: pip install 'nightshift[fit]'") from error

WIDTH = 110
RANDOM_WEIGHTS = "random weights"
NAME_HEIGHT = 9.0
"""Points that a name moves up from another one."""
INK, GREY = "#222222", "#666666"
TRAINED, RANDOM = "#1F77B4", "#999999"


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print the table."""
    console = console or Console()
    console = console if console.is_terminal or console.record else Console(width=WIDTH)
    classes = len(comparison.classes)
    console.print(
        Text(
            f"{comparison.images:,} labelled images of {classes} classes, {comparison.folds} folds; the most frequent "
            f"class alone has {100 * comparison.baseline:.1f} %"
        )
    )
    table = Table(
        Column("network", no_wrap=True),
        "accuracy",
        "spread",
        "images/s here",
        "width",
        f"$ per million on {comparison.cluster}",
    )
    for each in comparison.networks:
        if not each.fault:
            table.add_row(Text(printable(_name(each))), *_cells(each))
    console.print(table)
    for each in comparison.networks:
        if each.fault:
            console.print(Text(printable(f"left out: {each.model}: {each.fault}")))
    if comparison.failed:
        console.print(Text(f"{comparison.failed:,} images could not be read"))


def _name(each: NetworkResult) -> str:
    return f"{each.model} ({RANDOM_WEIGHTS})" if each.is_random else each.model


def _cells(each: NetworkResult) -> tuple[str, ...]:
    cost = "unknown" if each.usd_per_million is None else f"{each.usd_per_million:,.2f}"
    return (
        f"{100 * each.accuracy:.1f} %",
        f"± {100 * each.spread:.1f}",
        f"{each.images_per_second:,.1f}",
        f"{each.embedding_dim:,}",
        cost,
    )


def _separate(figure: Figure, names: list[Annotation]) -> None:
    """Move up each name that would cover another one."""
    figure.draw_without_rendering()  # places the axes
    placed: list[Bbox] = []
    for name in names:
        while any(name.get_window_extent().overlaps(other) for other in placed):
            right, up = name.xyann
            name.xyann = right, up + NAME_HEIGHT
        placed.append(name.get_window_extent())


def png(comparison: Comparison) -> bytes:
    """The picture: accuracy with its spread against images/s on a logarithmic axis; grey for random weights."""
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    names = []
    for each in (each for each in comparison.networks if not each.fault):
        color = RANDOM if each.is_random else TRAINED
        x, y = each.images_per_second, 100 * each.accuracy
        axes.errorbar(x, y, 100 * each.spread, fmt="o", color=color, capsize=3, linewidth=1)
        name = axes.annotate(printable(_name(each)), (x, y), (6, 5), textcoords="offset points", fontsize=8, color=INK)
        name.set_parse_math(False)
        names.append(name)
    axes.axhline(100 * comparison.baseline, color=GREY, linewidth=0.8, linestyle="--")
    axes.annotate("most frequent class", (0.995, 100 * comparison.baseline), (0, 3), fontsize=7, color=GREY, ha="right",
                  xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.margins(x=0.25)
    axes.set_xlabel("images/s of a run on this machine")
    axes.set_ylabel("accuracy of a linear probe, %")
    axes.set_title(f"{comparison.images:,} labelled images, {len(comparison.classes)} classes", fontsize=10, loc="left")
    axes.grid(True, which="major", linewidth=0.4, alpha=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _separate(figure, names)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
