"""An analysis on the terminal: a few tables, and a line for each count."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import printable
from pipeline.explore.analysis import Analysis

MAX_CLUSTERS, MAX_CLASSES, MAX_IMAGES = 20, 20, 10
BARS = " ▁▂▃▄▅▆▇█"


def show(analysis: Analysis, console: Console | None = None) -> None:
    """Print the tables, then the notes. Each list is cut; the files of `--to` and the JSON have more."""
    console = console or Console()
    figures = analysis.figures
    state = "" if figures["is_finished"] else " so far"
    _line(console, f"{figures['output']}: {figures['rows']:,} images{state} + {figures['errors']:,} errors")
    for part in (_clusters, _outliers, _contradictions, _classes, _quality):
        part(console, figures)
    if against := figures.get("against"):
        _against(console, against)
    for note in analysis.notes:
        _line(console, f"note: {note}")


def _clusters(console: Console, figures: Mapping[str, Any]) -> None:
    if not (clusters := figures.get("clusters")):
        return
    more = ["earlier"] if any("earlier_share" in row for row in clusters["rows"]) else []
    rows = [
        [
            str(row["cluster"]),
            row["name"] or "",
            f"{row['images']:,}",
            _percent(row["share"]),
            *([_percent(row["earlier_share"])] if more else []),
            "" if row["label_share"] is None else _percent(row["label_share"]),
            f"{row['mean_distance']:.3f}",
            row["exemplars"][0],
        ]
        for row in clusters["rows"]
    ]
    headers = ("cluster", "name", "images", "share", *more, "of its class", "distance", "exemplar")
    _table(console, clusters["how"], headers, rows, MAX_CLUSTERS)
    if clusters["in_no_cluster"]:
        _line(console, f"{clusters['in_no_cluster']:,} images are in no cluster")


def _outliers(console: Console, figures: Mapping[str, Any]) -> None:
    if not (outliers := figures.get("outliers")):
        return
    title = f"{outliers['images']:,} outliers, farther than {outliers['limit']:.2f} medians: {outliers['how']}"
    rows = [[f"{row['outlier']:.2f}", row["image_id"]] for row in outliers["rows"]]
    _table(console, title, ("outlier", "image_id"), rows, MAX_IMAGES)


def _contradictions(console: Console, figures: Mapping[str, Any]) -> None:
    if not (found := figures.get("contradictions")):
        return
    title = f"{found['images']:,} images whose {found['column']} their neighbours contradict"
    rows = [
        [_percent(row["contradiction"]), row["label"], row["neighbour_label"], row["image_id"]] for row in found["rows"]
    ]
    _table(console, title, ("disagree", "label", "of the neighbours", "image_id"), rows, MAX_IMAGES)


def _classes(console: Console, figures: Mapping[str, Any]) -> None:
    rows = figures["classes"]
    more = ["earlier"] if any("earlier_share" in row for row in rows) else []
    for column in dict.fromkeys(row["column"] for row in rows):
        own = [row for row in rows if row["column"] == column]
        texts = [
            [
                row["label"],
                f"{row['images']:,}",
                _percent(row["share"]),
                *([_percent(row["earlier_share"])] if more else []),
                "" if row["mean_score"] is None else f"{row['mean_score']:.3f}",
                _histogram(row["scores"]),
            ]
            for row in own
        ]
        headers = ("class", "images", "share", *more, "mean score", "scores 0 to 1")
        _table(console, f"{len(own):,} classes of {column}", headers, texts, MAX_CLASSES)


def _quality(console: Console, figures: Mapping[str, Any]) -> None:
    counts = ", ".join(f"{images:,} {name.replace('_', ' ')}" for name, images in figures["quality"].items())
    _line(console, f"quality: {counts}")


def _against(console: Console, against: Mapping[str, Any]) -> None:
    counts = ", ".join(f"{images:,} {name}" for name, images in against["images"].items())
    _line(console, f"against {against['output']}: {counts}")
    if "moved" in against:
        title = f"{against['moved_images']:,} images whose vector changed; mean cosine {against['mean_similarity']:.4f}"
        rows = [[f"{row['earlier_similarity']:.4f}", row["image_id"]] for row in against["moved"]]
        _table(console, title, ("cosine", "image_id"), rows, MAX_IMAGES)
    shares = {f"shares of {name}": each for name, each in against["classes"].items()}
    for name, each in {**shares, "shares of clusters": against.get("clusters")}.items():
        if each:
            _line(console, f"{name}: {each['verdict']}, PSI {each['psi']:.4f} ({each['psi_by_chance']:.4f} by chance)")
    if drift := against.get("drift"):
        verdict = "drift" if drift["is_significant"] else "no significant drift"
        of = " and ".join(f"{count:,}" for count in drift["sampled"])
        _line(console, f"vectors: {verdict}, MMD {drift['mmd']:.4f}, p = {drift['p_value']:.3f} ({of} images)")
        if drift["is_significant"]:
            rows = [[image_id] for image_id in drift["typical"]]
            _table(console, "images of a kind that is now more frequent", ("image_id",), rows, MAX_IMAGES)


def _table(console: Console, title: str, headers: Iterable[str], rows: Sequence[Sequence[str]], limit: int) -> None:
    """Print the first rows. Of no rows, only the title."""
    if not rows:
        _line(console, title)
        return
    cut = f" (the first {limit} of {len(rows):,})" if len(rows) > limit else ""
    _line(console, title + cut)
    table = Table(*headers)
    for row in rows[:limit]:
        table.add_row(*(Text(printable(text)) for text in row))
    console.print(table)


def _line(console: Console, text: str) -> None:
    console.print(Text(printable(text)), soft_wrap=True)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _histogram(counts: Sequence[int] | None) -> str:
    """A bar per bin, relative to the highest one."""
    if not counts or not max(counts):
        return ""
    return "".join(BARS[-(-count * (len(BARS) - 1) // max(counts))] for count in counts)
