"""The benchmark's tables."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.bench.record import Outcome, title

WIDTH = 120


def console() -> Console:
    """Wide enough for the tables where the output is a file or a pipe."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def machine_line(machine: Mapping[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"


def versions_line(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in machine["versions"].items())


def contest_table(outcome: Outcome) -> Table:
    small, large = outcome.ours.small_images, outcome.ours.large_images
    table = Table(title=f"{outcome.case}, {outcome.model}: {outcome.what}", title_justify="left")
    table.add_column("medians")
    for header in (
        f"{small:,} images\ns",
        f"{large:,} images\ns",
        "marginal\nimages/s",
        "start-up\ns",
        "peak memory\nMiB",
        "core-seconds\nan image",
        "Nightshift's rate\n/ this one's",
    ):
        table.add_column(header, justify="right")
    for name, result in outcome.results.items():
        table.add_row(
            title(name),
            number(result.small_seconds, ".1f"),
            number(result.large_seconds, ".1f"),
            number(result.rate, ",.1f"),
            number(result.startup_seconds, ".1f"),
            number(result.peak_memory_bytes / 2**20, ",.0f"),
            number(result.core_seconds_per_image, ".4f"),
            number(outcome.times_faster(name), ".2f"),
        )
    return table


def roofline_table(outcome: Outcome) -> Table:
    roofline, ours = outcome.roofline, outcome.ours
    total = ours.core_seconds_per_image
    table = Table(title=f"{outcome.case}, {outcome.model}: where Nightshift's core-seconds go", title_justify="left")
    table.add_column("", min_width=36)
    table.add_column("core-seconds\nan image", justify="right")
    table.add_column("share of\nthe run", justify="right")
    stages = {f"{name}, alone": seconds for name, seconds in roofline.stages.items()}
    rows = {**stages, "everything else": roofline.everything_else(total), "the run, marginal": total}
    for name, seconds in rows.items():
        share = None if seconds is None or total is None else seconds / total
        table.add_row(name, number(seconds, ".5f"), number(share, ".0%"))
    return table


def roofline_line(outcome: Outcome) -> str:
    roofline, rate = outcome.roofline, outcome.ours.rate
    if roofline.gpus:
        return "no roofline: the network runs on a GPU, and these are core-seconds of the CPU"
    return (
        f"roofline: {roofline.cores} cores / (read + decode + predict) = {roofline.ceiling:,.1f} images/s; "
        f"Nightshift reaches {number(rate, ',.1f')}, {number(roofline.share(rate), '.0%')} of it"
    )


def fidelity_line(found: Mapping[str, Any]) -> str:
    return (
        f"fidelity: error in spread of the default settings against float32 and torchvision's transform, "
        f"{found['images']} images: median {found['median']:.2g}, worst {found['worst']:.2g}"
    )


def number(value: float | None, format: str) -> str:
    """A dash for what could not be told: the large archive took no longer than the small one."""
    return "–" if value is None else f"{value:{format}}"
