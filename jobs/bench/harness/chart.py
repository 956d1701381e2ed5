"""The chart of jobs/bench/compare.py: marginal rates as bars, one panel per case and network."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.bench.harness.contest import OURS
from jobs.bench.harness.record import Outcome, title
from jobs.bench.harness.show import number

COLOURS = {OURS: "#0b6e4f", "dataloader": "#8d99ae", "ray": "#a9b4c2", "daft": "#c5ccd6"}
INK, FAINT = "#22262b", "#6b7280"
PANEL_INCHES = (4.2, 3.0)
MAX_COLUMNS = 3


def draw(outcomes: Sequence[Outcome], machine: str, path: Path) -> None:
    """Write a PNG. Each panel has its own axis, since rates of tiles and of large photos differ a thousandfold."""
    columns = min(MAX_COLUMNS, len(outcomes))
    rows = -(-len(outcomes) // columns)
    width, height = max(7.0, PANEL_INCHES[0] * columns), PANEL_INCHES[1] * rows + 1.3
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, outcome in zip(panels, outcomes, strict=False):
        _panel(axes, outcome)
    for axes in panels[len(outcomes) :]:
        axes.set_visible(False)
    figure.text(
        0.3 / width, 1 - 0.38 / height, "Images per second in a long run", fontsize=15, weight="bold", color=INK
    )
    explained = "marginal rate of whole commands: more images / more seconds; longer bars are better"
    figure.text(0.3 / width, 1 - 0.65 / height, explained, fontsize=9, color=FAINT)
    figure.text(0.3 / width, 0.16 / height, machine, fontsize=7, color=FAINT)
    figure.tight_layout(rect=(0.01, 0.35 / height, 0.99, 1 - 0.75 / height), w_pad=2.0, h_pad=1.5)
    figure.savefig(path, format="png")


def _panel(axes: Axes, outcome: Outcome) -> None:
    names = list(outcome.results)
    lengths = [outcome.results[name].rate or 0.0 for name in names]
    colours = [COLOURS[name] for name in names]
    bars = axes.barh([title(name) for name in names], lengths, height=0.62, color=colours)
    labels = [_label(outcome, name) for name in names]
    axes.bar_label(bars, labels, padding=4, fontsize=9, color=INK)
    axes.set_xlim(0, 1.6 * max(*lengths, 1e-9))  # room for the labels
    axes.set_title(f"{outcome.case}, {outcome.model}", loc="left", fontsize=11, weight="bold", color=INK)
    axes.set_xlabel("images/s", fontsize=9, color=FAINT)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0, labelsize=10, colors=INK)
    axes.tick_params(axis="x", labelsize=8, colors=FAINT)
    axes.xaxis.grid(True, color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#d1d5db")


def _label(outcome: Outcome, name: str) -> str:
    """The rate, and how many times faster Nightshift is."""
    rate = outcome.results[name].rate
    text = number(rate, ",.1f" if rate is not None and rate < 100 else ",.0f")
    times = outcome.times_faster(name)
    return text if name == OURS or times is None else f"{text}   Nightshift: {times:.2f}×"
