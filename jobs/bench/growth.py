"""Memory and speed of whole jobs as the archive grows, with small images and a predictor that computes nothing.

    python jobs/bench/growth.py --images 10000 --images 100000 --images 1000000

Makes archives of 64 × 64 JPEGs, as tars and as loose files, in a temporary folder. Prints for each the images/s after
the first commit, the peak memory of the driver and of all workers together, the peak use of the object store and the
size of the ledger. The memory of a process is its unique set (USS), without shared pages.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from jobs.bench.harness import embed_job
from jobs.bench.harness.archives import encoded_tiles, write_tars

IMAGES_PER_TAR = 10_000
IMAGES_PER_FOLDER = 1_000
SAMPLE_SECONDS = 1.0


@dataclass
class Peaks:
    """MiB."""

    driver: float = 0.0
    workers: float = 0.0
    store: float = 0.0

    def sample(self, driver: psutil.Process) -> None:
        workers = store = 0.0
        for process in driver.children(recursive=True):
            try:
                memory = process.memory_full_info()
                name = process.name()
            except psutil.Error:
                continue
            if name == "raylet":  # its shared memory is the object store
                store = memory.shared / 2**20
            elif name.startswith("ray::"):
                workers += memory.uss / 2**20
        self.driver = max(self.driver, driver.memory_full_info().uss / 2**20)
        self.workers = max(self.workers, workers)
        self.store = max(self.store, store)


def write_loose(folder: Path, count: int, tiles: list[bytes]) -> None:
    for i in range(count):
        path = folder / f"{i // IMAGES_PER_FOLDER:05d}" / f"{i:08d}.jpg"
        if i % IMAGES_PER_FOLDER == 0:
            path.parent.mkdir()
        path.write_bytes(tiles[i % len(tiles)])


def measure(archive: Path, output: Path) -> tuple[float, Peaks, float]:
    """Run the job. Return its images/s, its peaks, and the MiB of its commits and attempts."""
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    job = [sys.executable, "-m", "jobs.bench.harness.null", str(archive), str(output)]
    process = psutil.Popen([*job, "--resize", "64", "--crop", "64", "--batch-size", "256"], env=environment)
    peaks = Peaks()
    while process.poll() is None:
        try:
            peaks.sample(psutil.Process(process.pid))
        except psutil.Error:
            break
        time.sleep(SAMPLE_SECONDS)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, ["the job over", str(archive)])
    ledger = sum(path.stat().st_size for name in ("_commits", "_attempts") for path in (output / name).iterdir())
    return embed_job.steady(output).images_per_second or float("nan"), peaks, ledger / 2**20


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--images", metavar="N", type=int, action="append", help="size of an archive; may be given again"
    )
    return flags


def main() -> int:
    counts = parser().parse_args().images or [10_000, 100_000, 1_000_000]
    tiles = encoded_tiles()
    print(
        f"{'archive':>18} {'images/s':>9} {'driver MiB':>11} {'workers MiB':>12} {'store MiB':>10} {'ledger MiB':>11}"
    )
    for kind, write in (("tars", partial(write_tars, per_tar=IMAGES_PER_TAR)), ("loose", write_loose)):
        for count in counts:
            with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
                archive = Path(folder) / "archive"
                archive.mkdir()
                write(archive, count, tiles)
                speed, peaks, ledger = measure(archive, Path(folder) / "output")
            print(
                f"{count:>12,} {kind:>5} {speed:>9,.0f} {peaks.driver:>11,.0f} {peaks.workers:>12,.0f} "
                f"{peaks.store:>10,.0f} {ledger:>11,.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
