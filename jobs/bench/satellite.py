"""Compare archives of satellite imagery: the same tiles in a tar, MBTiles and PMTiles, and a scene with its peers.

    python jobs/bench/satellite.py
    python jobs/bench/satellite.py --tiles 500 3000 --windows 20 60 --rounds 3 --json figures.json

Each command runs on a small and on a large archive, in turn; the marginal rate (more images / more seconds) is the rate
of a long run. Tiles are 256 × 256 JPEGs of 20 KB. A scene is a drawn GeoTIFF, cut into windows of 224 × 224 pixels; its
peers are a rasterio loop with a DataLoader, and TorchGeo's GridGeoSampler if TorchGeo is installed. Weights are random.
The exit code is 1 if MBTiles or PMTiles have less than 0.9 of the tar's rate, or windows less than 3 times a peer's.
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

import pyarrow.parquet as pq
from rich.table import Table

from jobs.bench.harness import command, machine, satellite_archives, show
from jobs.bench.harness.contest import BENCH, JOBS, Result, Run, one_gpu
from jobs.bench.harness.measure import CommandFailed, spend
from pipeline.errors import SettingRefused
from pipeline.estimates.machines import cpus_here

WINDOW = 224
MIN_TILE_RATIO, MIN_WINDOW_RATIO = 0.9, 3.0
OURS_ON_SCENE = "Nightshift"


@dataclass(frozen=True)
class Contestant:
    """A command over one archive. line: (archive, output, network) → arguments of Python."""

    write: Callable[[Path, int], None]
    suffix: str
    line: Callable[[Path, Path, str], list[str]]
    package: str = "rasterio"


def ours(*flags: str) -> Callable[[Path, Path, str], list[str]]:
    def line(archive: Path, output: Path, model: str) -> list[str]:
        job = [str(JOBS / "embed.py"), "--input", str(archive), "--output", str(output)]
        return [*job, "--model", model, "--weights", "random", *flags]

    return line


def peer(script: str) -> Callable[[Path, Path, str], list[str]]:
    def line(archive: Path, output: Path, model: str) -> list[str]:
        return [str(BENCH / "peers" / script), str(archive), str(output), "--model", model]

    return line


def write_scene(path: Path, windows: int) -> None:
    """windows: along one side."""
    satellite_archives.write_scene(path, windows * WINDOW)


TILES = {
    "tar": Contestant(satellite_archives.write_tar, ".tar", ours()),
    "MBTiles": Contestant(satellite_archives.write_mbtiles, ".mbtiles", ours()),
    "PMTiles": Contestant(satellite_archives.write_pmtiles, ".pmtiles", ours(), "pmtiles"),
}
SCENES = {
    OURS_ON_SCENE: Contestant(write_scene, ".tif", ours("--tile-size", str(WINDOW))),
    "rasterio + DataLoader": Contestant(write_scene, ".tif", peer("windows.py")),
    "TorchGeo": Contestant(write_scene, ".tif", peer("torchgeo_grid.py"), "torchgeo"),
}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", metavar="NAME", default="resnet18", help="default: resnet18")
    flags.add_argument(
        "--tiles", metavar="N", type=int, nargs=2, default=(500, 3_000), help="of both archives (default: 500 3000)"
    )
    flags.add_argument(
        "--windows", metavar="N", type=int, nargs=2, default=(20, 50), help="along a scene's side (default: 20 50)"
    )
    flags.add_argument("--rounds", metavar="N", type=int, default=1, help="the figures are medians (default: 1)")
    flags.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return command.guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    for name, (small, large) in {"--tiles": options.tiles, "--windows": options.windows}.items():
        if not 2 <= small < large:
            raise SettingRefused(f"{name} is {small} {large}: the first must be at least 2, and the second larger")
    command.check_writable(options.json)
    here, console = machine.describe(), show.console()
    console.print(show.machine_line(here))
    tiles = contest(TILES, options.tiles, options.tiles, options)
    console.print(table("tiles", tiles, "tar"))
    small, large = options.windows
    windows = contest(SCENES, options.windows, (small**2, large**2), options)
    console.print(table("windows of a scene", windows, OURS_ON_SCENE))
    if options.json:
        rates = {name: result.rate for name, result in {**tiles, **windows}.items()}
        options.json.write_text(json.dumps({"machine": here, "images_per_second": rates}, indent=1))
    return judged(tiles, windows)


def contest(
    contestants: dict[str, Contestant], sizes: Sequence[int], images: Sequence[int], options: argparse.Namespace
) -> dict[str, Result]:
    """Run every contestant on its small and its large archive. images: of both. Raises CommandFailed."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        for name, each in contestants.items():
            if importlib.util.find_spec(each.package) is None:
                command.say(f"{name} is left out: {each.package} is not installed")
                continue
            results[name] = Result(images[0], images[1])
            for size in sizes:
                archive = Path(folder) / f"archive-{size}{each.suffix}"
                if not archive.exists():
                    each.write(archive, size)
        for number in range(options.rounds):
            for name in results:
                command.say(f"round {number + 1} of {options.rounds}: {name}")
                each = contestants[name]
                archives = [Path(folder) / f"archive-{size}{each.suffix}" for size in sizes]
                runs = [measured(name, each, *pair, options.model) for pair in zip(archives, images, strict=True)]
                results[name].add(*runs)
    return results


def measured(name: str, contestant: Contestant, archive: Path, images: int, model: str) -> Run:
    """Run one command. Raises CommandFailed if it fails or does not write one row per image."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        output = Path(folder) / "output"
        quiet = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
        environment = {**os.environ, **quiet, **one_gpu(os.environ)}
        spent = spend([sys.executable, *contestant.line(archive, output, model)], environment)
        files = [*output.glob("*.parquet"), *output.glob("results/*.parquet")]
        rows = sum(pq.read_metadata(path).num_rows for path in files)
        if rows != images:
            raise CommandFailed(f"{name} wrote {rows} rows for {images} images of {archive.name}")
        return Run(spent, len(files), {})


def table(title: str, results: dict[str, Result], reference: str) -> Table:
    """reference: the contestant that the others are divided by."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("medians")
    costs = ("core-ms\nper image", "peak MiB", "hours per\nmillion", "core-hours\nper million")
    for header in ("images/s", f"/ {reference}", *costs):
        shown.add_column(header, justify="right")
    for name, result in results.items():
        rate, core_seconds = result.rate, result.core_seconds_per_image
        hours = None if rate is None else 1e6 / rate / 3600
        shown.add_row(
            name,
            show.number(rate, ",.1f"),
            show.number(ratio(result, results[reference]), ".2f"),
            show.number(core_seconds and 1e3 * core_seconds, ".2f"),
            f"{result.peak_memory_bytes / 2**20:,.0f}",
            show.number(hours, ".2f"),
            show.number(hours and hours * cpus_here(), ".2f"),
        )
    return shown


def ratio(result: Result, reference: Result) -> float | None:
    return None if not result.rate or not reference.rate else result.rate / reference.rate


def judged(tiles: dict[str, Result], windows: dict[str, Result]) -> int:
    """Say which limits are missed. Returns the exit code."""
    missed = []
    for name, result in tiles.items():
        if (share := ratio(result, tiles["tar"])) is not None and share < MIN_TILE_RATIO:
            missed.append(f"{name} has {share:.2f} of the tar's rate, at least {MIN_TILE_RATIO} is asked for")
    for name, result in windows.items():
        times = ratio(windows[OURS_ON_SCENE], result)
        if name != OURS_ON_SCENE and times is not None and times < MIN_WINDOW_RATIO:
            missed.append(f"windows are {times:.2f} times as fast as {name}: at least {MIN_WINDOW_RATIO:g} is asked")
    for sentence in missed:
        command.say(sentence)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
