"""What one GPU machine does: each part of a run alone, then whole jobs.

    python jobs/bench/gpu.py --json figures.json
    python jobs/bench/gpu.py --images photos/ --model resnet50

The parts: the network alone by batch size, eager and compiled, with pixels on the device and in memory; decoding on all
cores of the CPU, and on the GPU. Then files in and embeddings out, as a job with one and with two actors on the GPU. A
job cannot be faster than the slower of decoding and the network at the same batch size: that is its limit. GPU idle is
the time without a kernel, after the warm-up.

Weights are random. Without --images photos are drawn. Without a GPU everything runs on few images, which shows that it
works and says nothing about speed.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.bench.harness import archives, command, decoding, embed_job, gpu_parts, machine, show
from jobs.bench.harness.gpu_monitor import GpuMonitor
from jobs.bench.harness.gpu_table import NO_GPU, Figure, table
from pipeline.errors import SettingRefused
from pipeline.predictors.embed import Embedder

SAMPLE_FILES = 256
DECODERS = ("fast", "gpu")


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--images", metavar="FOLDER", type=Path, help="your own JPEGs and PNGs (default: drawn)")
    flags.add_argument("--count", metavar="N", type=int, help="images of a whole job; they repeat, as links")
    flags.add_argument("--model", metavar="NAME", default="resnet50", help="default: resnet50")
    flags.add_argument(
        "--batch-sizes", metavar="N", type=int, nargs="+", help="of the network alone; jobs use the last one"
    )
    flags.add_argument("--seconds", metavar="S", type=float, default=5.0, help="for each part alone (default: 5)")
    flags.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return command.guarded(lambda: GpuBenchmark.of(options).run())


@dataclass
class GpuBenchmark:
    """The settings of one benchmark, and its figures so far.

    gpu: its id, None without a GPU. network_limit, decode_limit: images/s at the batch size of the jobs, by where the
    pixels are (device, memory) and by decoder.
    """

    images: Path | None
    count: int
    model: str
    batch_sizes: list[int]
    seconds: float
    json: Path | None
    gpu: str | None
    predictor: Embedder = field(init=False)
    figures: list[Figure] = field(default_factory=list)
    network_limit: dict[str, float] = field(default_factory=dict)
    decode_limit: dict[str, float | None] = field(default_factory=dict)

    @staticmethod
    def of(options: argparse.Namespace) -> "GpuBenchmark":
        """Check the flags. Raises SettingRefused."""
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU, for the jobs too
        gpu = gpu_parts.gpu_id()
        count = (200_000 if gpu else 96) if options.count is None else options.count
        batch_sizes = options.batch_sizes or ([64, 128, 512, 256] if gpu else [8])
        for flag, value in (("--count", count), ("--batch-sizes", min(batch_sizes)), ("--seconds", options.seconds)):
            if value <= 0:
                raise SettingRefused(f"{flag} is {value}: it must be more than 0")
        if options.images and not options.images.is_dir():
            raise SettingRefused(f"--images {options.images} is not a folder")
        command.check_writable(options.json)
        if not gpu:
            command.say("no GPU: the figures show that the benchmark works, not how fast anything is")
        return GpuBenchmark(options.images, count, options.model, batch_sizes, options.seconds, options.json, gpu)

    def run(self) -> int:
        console = show.console()
        for line in (show.machine_line(self.machine), f"GPU: {self.machine['gpu'] or 'none'}"):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
            archive = Path(folder) / "archive"
            archive.mkdir()
            command.say(f"making an archive of {self.count:,} images")
            case = archives.repeated_images(self.images) if self.images else archives.CASES["photos"]
            case.make(archive, self.count)
            self._measure_network()
            self._measure_decoding(archive)
            self._unload()
            self._measure_jobs(archive, Path(folder))
        console.print(table(self.figures, f"{self.model}, batches of {self.batch_size}, {self.count:,} images"))
        return 0

    @property
    def batch_size(self) -> int:
        """Of the jobs."""
        return self.batch_sizes[-1]

    @cached_property
    def machine(self) -> dict[str, Any]:
        return {**machine.describe(), "gpu": gpu_parts.gpu_name()}

    def _measure_network(self) -> None:
        for compile in ("off", "on") if self.gpu else ("off",):
            for batch_size in self.batch_sizes:
                self._unload()
                self.predictor = gpu_parts.embedder(self.model, batch_size, compile)
                for place in ("device", "memory"):
                    setting = f"pixels {'on the device' if place == 'device' else 'in memory'}, batch {batch_size}"
                    if place == "device" and not self.gpu:
                        self._add_missing("network", setting)
                        continue
                    rate = gpu_parts.predict_rate(self.predictor, batch_size, self.seconds, place == "device")
                    self.network_limit[place] = rate  # the last one stays: the jobs' batch size, compiled
                    self._add(Figure("network", f"{setting}; {self.predictor.describe()}", rate))

    def _measure_decoding(self, archive: Path) -> None:
        for decoder in DECODERS:
            task = "decode to pixels" if decoder == "fast" else "leave JPEGs encoded"
            rate = decoding.measure(archive, self.model, decoder, self.batch_size)
            self.decode_limit[decoder] = rate
            self._add(Figure("readers", f"{self.machine['cores']} processes, {task}", rate))
        if not self.gpu:
            self._add_missing("GPU decodes", "JPEG bytes to pixels of the network's size")
            return
        files = [path.read_bytes() for path in sorted(archive.iterdir())[:SAMPLE_FILES]]
        rate = gpu_parts.decode_rate(self.predictor, files, self.batch_size, self.seconds)
        self._add(Figure("GPU decodes", "JPEG bytes to pixels of the network's size", rate))
        self.decode_limit["gpu"] = min(rate, self.decode_limit["gpu"] or rate)

    def _unload(self) -> None:
        """Free the GPU's memory."""
        vars(self).pop("predictor", None)
        gpu_parts.release_memory()

    def _measure_jobs(self, archive: Path, folder: Path) -> None:
        for decoder in DECODERS if self.gpu else DECODERS[:1]:
            for actors in (1, 2) if self.gpu else (1,):
                network = ["--model", self.model, "--weights", "random", "--compile", "on" if self.gpu else "off"]
                share = ["--gpus-per-actor", f"{1 / actors:g}" if self.gpu else "0"]
                sizes = ["--actors", str(actors), *share, "--batch-size", str(self.batch_size)]
                output = folder / f"{decoder}-{actors}"
                with GpuMonitor(self.gpu) as monitor:
                    steady = embed_job.run(archive, output, [*network, *sizes, "--decoder", decoder])
                self._add_job(decoder, actors, steady, monitor)
        if not self.gpu:
            self._add_missing("job", "--decoder gpu")

    def _add_job(self, decoder: str, actors: int, steady: embed_job.Steady, monitor: GpuMonitor) -> None:
        network = self.network_limit["device" if decoder == "gpu" else "memory"]
        decode = self.decode_limit[decoder]
        self._add(
            Figure(
                "job",
                f"--decoder {decoder}, {actors} actor{'s' * (actors > 1)}",
                steady.images_per_second,
                limit=None if decode is None else min(decode, network),
                idle=monitor.idle(steady.start, steady.stop),
                peak_memory_bytes=monitor.peak_memory_bytes,
            )
        )

    def _add_missing(self, part: str, setting: str) -> None:
        self._add(Figure(part, setting, None, NO_GPU))

    def _add(self, figure: Figure) -> None:
        """Add a figure and write the file, so that an interrupted benchmark loses little."""
        self.figures.append(figure)
        command.say(f"{figure.part}, {figure.setting}: {figure.rate} images/s")
        if self.json:
            figures = [each.as_json() for each in self.figures]
            settings = {"model": self.model, "count": self.count, "batch_size": self.batch_size}
            record = {"machine": self.machine, "settings": settings, "figures": figures}
            self.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    command.exit_on_signals()
    sys.exit(main())
