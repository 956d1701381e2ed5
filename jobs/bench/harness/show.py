"""The tables and sentences of jobs/bench/compare.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.bench.harness.contest import OURS
from jobs.bench.harness.programme import NULL
from jobs.bench.harness.record import Outcome, title
from jobs.bench.harness.roofline import Networks, largest_ratio

WIDTH = 120
MAX_ROLES = 8
FORMS = {"eager": "Nightshift's, eager", "compiled": "Nightshift's, compiled", "plain": "the peers' form"}
ROLES = {"ray::IDLE": "Ray workers, idle or starting", "default_worker.py": "Ray workers, being started"}


def console() -> Console:
    """A console that is wide enough for the tables if the output is a file or a pipe."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=WIDTH)


def machine_line(machine: Mapping[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"


def versions_line(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in machine["versions"].items())


def peak_line(peak_gflops: Mapping[str, float]) -> str:
    figures = ", ".join(f"{dtype} {gflops:,.0f}" for dtype, gflops in peak_gflops.items())
    return f"peak GFLOP/s of a matrix product: {figures}"


def contest_table(outcome: Outcome) -> Table:
    small, large = outcome.ours.small_images, outcome.ours.large_images
    table = Table(title=f"{outcome.case}, {outcome.model}: {outcome.description}", title_justify="left")
    table.add_column("medians")
    for header in (
        f"{small:,} images\ns",
        f"{large:,} images\ns",
        "marginal\nimages/s",
        "start-up\ns",
        f"peak MiB\n{small:,} images",
        f"peak MiB\n{large:,} images",
        "core-ms\nper image",
        "Nightshift's rate\n/ this rate",
    ):
        table.add_column(header, justify="right")
    for name, result in outcome.results.items():
        table.add_row(
            title(name),
            number(result.small_seconds, ".1f"),
            number(result.large_seconds, ".1f"),
            number(result.rate, ",.1f"),
            number(result.startup_seconds, ".1f"),
            number(result.small_memory_bytes / 2**20, ",.0f"),
            number(result.peak_memory_bytes / 2**20, ",.0f"),
            milliseconds(result.core_seconds_per_image),
            number(outcome.times_faster(name), ".2f"),
        )
    return table


def memory_line(outcome: Outcome) -> str:
    ours = outcome.ours
    more = ours.peak_memory_bytes - ours.small_memory_bytes
    growth = f"{more / 2**20:+,.0f} MiB ({more / ours.small_memory_bytes:+.1%})"
    images = f"{ours.large_images / ours.small_images:.0f} times the images"
    peers = [
        f"{ours.peak_memory_bytes / result.peak_memory_bytes:.2f} of {title(name)}'s"
        for name, result in outcome.results.items()
        if name != OURS
    ]
    return f"memory: {growth} for {images}; " + (f"{', '.join(peers)}" if peers else "no peer took part")


def roofline_table(outcome: Outcome) -> Table:
    """Core-seconds of the run: by stage, each measured alone, and by process, measured in the run."""
    roofline, ours = outcome.roofline, outcome.ours
    total = ours.core_seconds_per_image
    table = Table(title=f"{outcome.case}, {outcome.model}: where Nightshift's CPU time goes", title_justify="left")
    table.add_column("", min_width=44)
    table.add_column("core-ms\nper image", justify="right")
    table.add_column("share of\nthe run", justify="right")
    stages = {f"{name}, alone": seconds for name, seconds in roofline.stages.items()}
    _add_shares(table, {**stages, "everything else": roofline.everything_else(total)}, total)
    table.add_section()
    _add_shares(table, _main_roles(ours.by_role), total)
    table.add_section()
    _add_shares(table, {"the run, marginal": total}, total)
    return table


def _add_shares(table: Table, rows: Mapping[str, float | None], total: float | None) -> None:
    for name, seconds in rows.items():
        share = None if seconds is None or total is None else seconds / total
        table.add_row(name, milliseconds(seconds), number(share, ".0%"))


def _main_roles(by_role: Mapping[str, float]) -> dict[str, float]:
    """The roles with most CPU time, and the sum of the others."""
    names = list(by_role)
    main = {ROLES.get(name, name): by_role[name] for name in names[:MAX_ROLES]}
    return {**main, "other processes": sum(by_role[name] for name in names[MAX_ROLES:])}


def roofline_line(outcome: Outcome) -> str:
    roofline, rate = outcome.roofline, outcome.ours.rate
    if roofline.gpus:
        return "no roofline: the network runs on a GPU, and these are core-seconds of the CPU"
    return (
        f"roofline: {roofline.cores} cores / (read + decode + predict) = {roofline.ceiling:,.1f} images/s; "
        f"Nightshift reaches {number(rate, ',.1f')}, {number(roofline.share(rate), '.0%')} of it"
    )


def network_table(outcome: Outcome, networks: Networks, peak_gflops: Mapping[str, float]) -> Table:
    name = f"{outcome.model} alone, {networks.flops_per_image / 1e9:.2f} GFLOP per image"
    table = Table(title=name, title_justify="left")
    table.add_column("", min_width=28)
    for header in ("core-ms\nper image", "images/s", "GFLOP/s", "of the peak"):
        table.add_column(header, justify="right")
    for form, speed in networks.speeds.items():
        dtype = "float32" if form == "plain" else networks.dtype
        gflops, peak = networks.gflops(form), peak_gflops.get(dtype)
        table.add_row(
            f"{FORMS[form]}, {dtype}",
            milliseconds(speed.core_seconds),
            number(speed.images_per_second, ",.1f"),
            number(gflops, ",.1f"),
            number(peak and gflops / peak, ".0%"),
        )
    return table


def network_line(outcome: Outcome, networks: Networks, peak_gflops: Mapping[str, float]) -> str:
    """Say how many times faster than the peers' form the network runs, and how many times the machine allows.

    The limit is left out if the network is faster than the matrix product that gives the peak: on AMX, packed weights
    can make it so.
    """
    share = outcome.roofline.compiled_share
    form = "compiled" if share > 0.5 else "eager"
    gflops, peak = networks.gflops(form), peak_gflops.get(networks.dtype)
    of_peak = f" of the machine's {peak:,.0f} GFLOP/s ({gflops / peak:.0%})" if peak else " GFLOP/s"
    ratio, largest = gflops / networks.gflops("plain"), largest_ratio(networks, peak_gflops)
    return (
        f"network: {share:.0%} of the marginal images ran compiled; {form}, alone, it runs at {gflops:,.0f}{of_peak}, "
        f"{ratio:.2f} times the peers' form"
        + (f"; at the machine's peak it would be {largest:.2f} times" if largest > ratio else "")
    )


def cpu_table(outcomes: Sequence[Outcome]) -> Table:
    """CPU cost outside the network, from the runs with the null network."""
    shown = [outcome for outcome in outcomes if outcome.model == NULL]
    table = Table(
        title="CPU cost outside the network: core-ms per image, marginal, all processes", title_justify="left"
    )
    table.add_column("null network")
    for outcome in shown:
        table.add_column(outcome.case, justify="right")
    names = dict.fromkeys(name for outcome in shown for name in outcome.results)
    for name in names:
        results = [outcome.results.get(name) for outcome in shown]
        table.add_row(
            title(name), *(milliseconds(result.core_seconds_per_image if result else None) for result in results)
        )
    return table


def fidelity_line(figures: Mapping[str, Any]) -> str:
    return (
        f"fidelity: error in spread of the default settings, against float32 and torchvision's transform, "
        f"{figures['images']} images: median {figures['median']:.2g}, worst {figures['worst']:.2g}"
    )


def agreement_line(figures: Mapping[str, Any]) -> str:
    return (
        f"fidelity: a network trained on drawn scenes gives the class of float32 and torchvision's transform for "
        f"{figures['same']:.1%} of {figures['images']} images; it is in doubt about {figures['in_doubt']:.0%} of them"
    )


def milliseconds(seconds: float | None) -> str:
    return number(seconds if seconds is None else 1000 * seconds, ",.2f")


def number(value: float | None, format: str) -> str:
    """A dash for None, which means that the large archive took no longer than the small one."""
    return "–" if value is None else f"{value:{format}}"
