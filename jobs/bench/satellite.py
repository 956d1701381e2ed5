"""Compare archives of satellite imagery: the same tiles in a tar, MBTiles and PMTiles, and a scene with its peers.

    python jobs/bench/satellite.py
    python jobs/bench/satellite.py --tiles 500 4000 --windows 20 60 --rounds 3 --json figures.json
    python jobs/bench/satellite.py --cases windows --model null

Each command runs on a small and on a large archive, in turn; the marginal rate (more images / more seconds) is the rate
of a long run. Tiles are 256 × 256 JPEGs of 20 KB. A scene is a drawn cloud-optimized GeoTIFF, cut into windows of
224 × 224 pixels. Its peers are a rasterio loop with a DataLoader and, if TorchGeo is installed, its GridGeoSampler.
Weights are random, and the same for all. Nightshift chooses the number format of the network, which is bfloat16 if the
hardware has it; peers compute in float32, so Nightshift also runs in float32.

Dollars per million are those of a rented machine, whose cores are assumed to be as fast as those here. Joules are those
of the CPU packages. The exit code is 1 if MBTiles or PMTiles have less than 0.9 of the tar's rate, or if windows have
less than 3 times a peer's.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.table import Table

from jobs.bench.harness import command, machine, satellite_archives, show
from jobs.bench.harness.contest import BENCH, JOBS, Result, Run, one_gpu, our_name
from jobs.bench.harness.measure import CommandFailed, spend
from pipeline.errors import SettingRefused
from pipeline.estimates.costs import CPU, Estimate
from pipeline.estimates.machines import Cluster, Machine, Prices

WINDOW = 224
MIN_TILE_RATIO, MIN_WINDOW_RATIO = 0.9, 3.0
TAR, OURS_ON_SCENE = "tar", "Nightshift"
TILES, WINDOWS = "tiles", "windows"
MILLION = 1_000_000
RENTED = "c7i.2xlarge"
NOT_READABLE = "joules: not readable here (no counters of RAPL)"

Line = Callable[[Path, Path, str], list[str]]
"""(archive, output, network) → arguments of Python."""


@dataclass(frozen=True)
class Contestant:
    """A command over one archive. write: (path, size). package: what it needs."""

    write: Callable[[Path, int], None]
    suffix: str
    line: Line
    package: str = "rasterio"
    is_peer: bool = False


def ours(*flags: str) -> Line:
    def line(archive: Path, output: Path, model: str) -> list[str]:
        job = [str(JOBS / "embed.py"), "--input", str(archive), "--output", str(output)]
        return [*job, "--model", our_name(model), "--weights", "random", *flags]

    return line


def peer(script: str) -> Line:
    def line(archive: Path, output: Path, model: str) -> list[str]:
        return [str(BENCH / "peers" / script), str(archive), str(output), "--model", model]

    return line


def write_scene(path: Path, windows: int) -> None:
    """windows: along one side."""
    satellite_archives.write_scene(path, windows * WINDOW)


ON_TILES = {
    TAR: Contestant(satellite_archives.write_tar, ".tar", ours()),
    "MBTiles": Contestant(satellite_archives.write_mbtiles, ".mbtiles", ours()),
    "PMTiles": Contestant(satellite_archives.write_pmtiles, ".pmtiles", ours(), "pmtiles"),
}
IN_WINDOWS = ("--tile-size", str(WINDOW))
ON_SCENES = {
    OURS_ON_SCENE: Contestant(write_scene, ".tif", ours(*IN_WINDOWS)),
    "Nightshift, float32": Contestant(write_scene, ".tif", ours(*IN_WINDOWS, "--precision", "float32")),
    "rasterio + DataLoader": Contestant(write_scene, ".tif", peer("windows.py"), is_peer=True),
    "TorchGeo": Contestant(write_scene, ".tif", peer("torchgeo_grid.py"), "torchgeo", is_peer=True),
}


@dataclass(frozen=True)
class Case:
    """A contest. reference: the contestant that the others are divided by."""

    title: str
    contestants: dict[str, Contestant]
    reference: str


CASES = {
    TILES: Case("tiles", ON_TILES, TAR),
    WINDOWS: Case("windows of a scene", ON_SCENES, OURS_ON_SCENE),
}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--cases", metavar="CASE,…", default=",".join(CASES), help="default: tiles,windows")
    flags.add_argument("--model", metavar="NAME", default="resnet18", help="default: resnet18")
    flags.add_argument(
        "--tiles", metavar="N", type=int, nargs=2, default=(500, 4_000), help="of both archives (default: 500 4000)"
    )
    flags.add_argument(
        "--windows", metavar="N", type=int, nargs=2, default=(20, 60), help="along a scene's side (default: 20 60)"
    )
    flags.add_argument("--rounds", metavar="N", type=int, default=1, help="the figures are medians (default: 1)")
    flags.add_argument(
        "--cluster", metavar="SHAPE", default=RENTED, help=f"machines for the dollars (default: {RENTED})"
    )
    flags.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    command.exit_on_signals()
    return command.guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """Run the contests. Returns the exit code. Raises SettingRefused and CommandFailed."""
    cases = _checked(options)
    cluster = Prices.load().cluster(options.cluster)
    command.check_writable(options.json)
    here, console = machine.describe(), show.console()
    console.print(show.machine_line(here))
    figures: dict[str, Any] = {}
    missed: list[str] = []
    for name in cases:
        case, sizes = CASES[name], options.tiles if name == TILES else options.windows
        images = sizes if name == TILES else [side**2 for side in sizes]
        results = contest(case.contestants, sizes, images, options)
        console.print(table(case, results, cluster))
        figures[name] = {each: figures_of(result, cluster) for each, result in results.items()}
        missed += missed_limits(case, results)
    console.print(f"dollars: of {cluster} on demand, with cores as fast as those here")
    if not all(each["joules_per_million"] for case in figures.values() for each in case.values()):
        console.print(NOT_READABLE)
    if options.json:
        options.json.write_text(json.dumps({"machine": here, "model": options.model, **figures}, indent=1))
    for sentence in missed:
        command.say(sentence)
    return 1 if missed else 0


def _checked(options: argparse.Namespace) -> list[str]:
    """The cases. Raises SettingRefused."""
    for name, (small, large) in {"--tiles": options.tiles, "--windows": options.windows}.items():
        if not 2 <= small < large:
            raise SettingRefused(f"{name} is {small} {large}: the first must be at least 2, and the second larger")
    if options.rounds < 1:
        raise SettingRefused(f"--rounds is {options.rounds}: it must be at least 1")
    cases: list[str] = options.cases.split(",")
    if unknown := [name for name in cases if name not in CASES]:
        raise SettingRefused(f"--cases has {unknown[0]!r}: the cases are {', '.join(CASES)}")
    return cases


def contest(
    contestants: dict[str, Contestant], sizes: Sequence[int], images: Sequence[int], options: argparse.Namespace
) -> dict[str, Result]:
    """Run every contestant on its small and its large archive; each round begins with another one.

    images: of both archives. Raises CommandFailed.
    """
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        for name, each in contestants.items():
            if importlib.util.find_spec(each.package) is None:
                command.say(f"{name} is left out: {each.package} is not installed")
                continue
            results[name] = Result(images[0], images[1])
            for size in sizes:
                if not (archive := _archive(folder, each, size)).exists():
                    each.write(archive, size)
        names = list(results)
        for number in range(options.rounds):
            first = number % len(names)
            for name in [*names[first:], *names[:first]]:
                command.say(f"round {number + 1} of {options.rounds}: {name}")
                each = contestants[name]
                archives = [_archive(folder, each, size) for size in sizes]
                runs = [measured(name, each, *pair, options.model) for pair in zip(archives, images, strict=True)]
                results[name].add(*runs)
    return results


def _archive(folder: str, contestant: Contestant, size: int) -> Path:
    return Path(folder) / f"archive-{size}{contestant.suffix}"


def measured(name: str, contestant: Contestant, archive: Path, images: int, model: str) -> Run:
    """Run one command. Raises CommandFailed if it fails or does not write one row per image."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        output = Path(folder) / "output"
        quiet = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
        environment = {**os.environ, **quiet, **one_gpu(os.environ)}
        spent = spend([sys.executable, *contestant.line(archive, output, model)], environment)
        files = [*output.glob("*.parquet"), *output.glob("results/*.parquet")]  # of a peer, of ours
        rows = sum(pq.read_metadata(path).num_rows for path in files)
        if rows != images:
            raise CommandFailed(f"{name} wrote {rows} rows for {images} images of {archive.name}")
        report = output / "_report.json"
        return Run(spent, len(files), json.loads(report.read_text())["networks"] if report.is_file() else {})


def table(case: Case, results: dict[str, Result], cluster: Cluster) -> Table:
    shown = Table(title=case.title, title_justify="left")
    shown.add_column("medians")
    costs = ("seconds per\nmillion", "dollars per\nmillion", "joules per\nmillion")
    for header in ("images/s", f"/ {case.reference}", "core-ms\nper image", "peak MiB", *costs):
        shown.add_column(header, justify="right")
    for name, result in results.items():
        figures = figures_of(result, cluster)
        shown.add_row(
            name,
            show.number(result.rate, ",.1f"),
            show.number(ratio(result, results[case.reference]), ".2f"),
            show.milliseconds(result.core_seconds_per_image),
            show.number(result.peak_memory_bytes / 2**20, ",.0f"),
            show.number(figures["seconds_per_million"], ",.0f"),
            show.number(figures["usd_per_million"], ",.2f"),
            show.number(figures["joules_per_million"], ",.0f"),
        )
    return shown


def figures_of(result: Result, cluster: Cluster) -> dict[str, Any]:
    """The figures of a contestant, by name. None for what is unknown: the large archive took no longer than the small
    one, no counter of energy can be read, or a machine has no price."""
    rate, joules = result.rate, result.joules_per_image
    return {
        "images_per_second": rate,
        "startup_seconds": result.startup_seconds,
        "core_seconds_per_image": result.core_seconds_per_image,
        "peak_memory_bytes": result.peak_memory_bytes,
        "networks": result.large_networks,
        "seconds_per_million": rate and MILLION / rate,
        "usd_per_million": rate and usd_per_million(rate, cluster),
        "joules_per_million": joules and MILLION * joules,
    }


def usd_per_million(rate: float, cluster: Cluster) -> float | None:
    """Dollars on a rented cluster without GPUs. rate: images/s on the CPUs of this machine."""
    here = Machine.local()
    return Estimate(cluster, MILLION, {CPU: rate * cluster.cores / here.cores}).usd_per_million


def ratio(result: Result, reference: Result) -> float | None:
    return None if not result.rate or not reference.rate else result.rate / reference.rate


def missed_limits(case: Case, results: dict[str, Result]) -> list[str]:
    """A sentence for each limit that is missed."""
    missed = []
    reference = results[case.reference]
    for name, result in results.items():
        share = ratio(result, reference)
        if share is None or name == case.reference:
            continue
        if case.contestants[name].is_peer and 1 / share < MIN_WINDOW_RATIO:
            missed.append(f"windows are {1 / share:.2f} times as fast as {name}; the limit is {MIN_WINDOW_RATIO:g}")
        if case.reference == TAR and share < MIN_TILE_RATIO:
            missed.append(f"{name} has {share:.2f} of the tar's rate; the limit is {MIN_TILE_RATIO}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
