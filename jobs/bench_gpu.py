"""What one GPU machine does: each part of a run alone, then all of them together, without Ray and with it.

    python jobs/bench_gpu.py --json figures.json
    python jobs/bench_gpu.py --images photos/ --model resnet50 --without-ray

The network alone by batch size, eager and compiled, from pixels on the device and in memory; the decode limit of the
CPU's cores and of the GPU; files in and embeddings out, in one process and as a job with one and two actors on the GPU.
The limit of a whole run is the smaller one of the decode limit and the network's rate at the same batch size; GPU idle
is the time without a kernel, after the warm-up. Weights are random. Without --images photos are drawn. Without a GPU it
runs all the same, on few images: that shows that it works, not how fast anything is.
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
from typing import TYPE_CHECKING, Any

from jobs.bench import archives, command, embed_job, machine, show
from jobs.bench.feed import Feed
from jobs.bench.gpu_monitor import GpuMonitor
from jobs.bench.gpu_table import NO_GPU, Figure, table
from pipeline.config import RunConfig
from pipeline.errors import SettingRefused
from pipeline.loader import Loader
from pipeline.sources.discover import Archive

if TYPE_CHECKING:  # torch takes its time, and loader processes, which import this module, need none
    from pipeline.predictors import Embedder

SAMPLE_FILES = 256
DECODERS = ("fast", "gpu")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--images", metavar="FOLDER", type=Path, help="JPEGs and PNGs of your own (default: drawn)")
    made.add_argument("--count", metavar="N", type=int, help="images of a whole run; they repeat, as links")
    made.add_argument("--model", metavar="NAME", default="resnet50", help="default: resnet50")
    made.add_argument("--batch-sizes", metavar="N", type=int, nargs="+", help="of the network alone; the last one runs")
    made.add_argument("--seconds", metavar="S", type=float, default=5.0, help="for each part alone (default: 5)")
    made.add_argument("--without-ray", action="store_true", help="leave out the jobs; Ray need not be installed")
    made.add_argument("--json", metavar="FILE", type=Path, help="write every figure")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return command.guarded(lambda: GpuBenchmark.of(given).run())


@dataclass
class GpuBenchmark:
    """One benchmark, as the flags ask for it, and what it has found so far.

    gpu: its id, None where there is none. batch_sizes: the last one is that of the whole runs. network_limit,
    decode_limit: images/s, by where the pixels are (device, memory) and by decoder.
    """

    images: Path | None
    count: int
    model: str
    batch_sizes: list[int]
    seconds: float
    with_ray: bool
    json: Path | None
    gpu: str | None
    predictor: "Embedder" = field(init=False)
    figures: list[Figure] = field(default_factory=list)
    network_limit: dict[str, float] = field(default_factory=dict)
    decode_limit: dict[str, float | None] = field(default_factory=dict)

    @staticmethod
    def of(given: argparse.Namespace) -> "GpuBenchmark":
        """Raises SettingRefused, before any work."""
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU, also for the jobs
        from jobs.bench import gpu

        found = gpu.gpu_id()
        count = (200_000 if found else 96) if given.count is None else given.count
        batch_sizes = given.batch_sizes or ([64, 128, 512, 256] if found else [8])
        for flag, value in (("--count", count), ("--batch-sizes", min(batch_sizes)), ("--seconds", given.seconds)):
            if value <= 0:
                raise SettingRefused(f"{flag} is {value}: it must be more than 0")
        if given.images and not given.images.is_dir():
            raise SettingRefused(f"--images {given.images} is no folder")
        command.check_writable(given.json)
        if not found:
            command.say("no GPU: the numbers show that it runs here, not how fast anything is")
        ray = not given.without_ray
        return GpuBenchmark(given.images, count, given.model, batch_sizes, given.seconds, ray, given.json, found)

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
            self._network_alone()
            self._decoding_alone(archive)
            self._without_ray(archive)
            if self.with_ray:
                self._with_ray(archive, Path(folder))
        console.print(table(self.figures, f"{self.model}, batches of {self.batch_size}, {self.count:,} images"))
        return 0

    @property
    def batch_size(self) -> int:
        return self.batch_sizes[-1]

    @cached_property
    def machine(self) -> dict[str, Any]:
        from jobs.bench import gpu

        return {**machine.describe(), "gpu": gpu.gpu_name()}

    @property
    def decoders(self) -> tuple[str, ...]:
        return DECODERS if self.gpu else DECODERS[:1]

    # The parts

    def _network_alone(self) -> None:
        from jobs.bench import gpu

        for compile in ("off", "on") if self.gpu else ("off",):
            for batch_size in self.batch_sizes:
                self._let_go()
                self.predictor = gpu.embedder(self.model, batch_size, compile)
                for place in ("device", "memory"):
                    setting = f"pixels {'on the device' if place == 'device' else 'in memory'}, batch {batch_size}"
                    if place == "device" and not self.gpu:
                        self._missing("network", setting)
                        continue
                    rate = gpu.predict_rate(self.predictor, batch_size, self.seconds, place == "device")
                    self.network_limit[place] = rate  # in the end that of the whole runs
                    self._add(Figure("network", f"{setting}; {self.predictor.describe()}", rate))

    def _decoding_alone(self, archive: Path) -> None:
        from jobs.bench import gpu

        for decoder in DECODERS:
            what = "decode to pixels" if decoder == "fast" else "leave JPEGs encoded"
            rate = gpu.run_feed(self._feed(archive, decoder)).images_per_second
            self.decode_limit[decoder] = rate
            self._add(Figure("loaders", f"{self.machine['cores']} processes, {what}", rate))
        if not self.gpu:
            self._missing("GPU decodes", "JPEG bytes to pixels of the network's size")
            return
        files = [path.read_bytes() for path in sorted(archive.iterdir())[:SAMPLE_FILES]]
        rate = gpu.decode_rate(self.predictor, files, self.batch_size, self.seconds)
        self._add(Figure("GPU decodes", "JPEG bytes to pixels of the network's size", rate))
        self.decode_limit["gpu"] = min(rate, self.decode_limit["gpu"] or rate)

    # Files in, embeddings out

    def _without_ray(self, archive: Path) -> None:
        from jobs.bench import gpu

        for decoder in self.decoders:
            with GpuMonitor(self.gpu) as monitor:
                progress = gpu.run_pipeline(self._feed(archive, decoder), self.predictor)
            self._add_whole("one process", decoder, "", progress.images_per_second, progress.window, monitor)
        if not self.gpu:
            self._missing("one process", "--decoder gpu")
        self._let_go()

    def _let_go(self) -> None:
        """Give the GPU's memory to whoever comes next."""
        from jobs.bench import gpu

        vars(self).pop("predictor", None)
        gpu.release_memory()

    def _with_ray(self, archive: Path, folder: Path) -> None:
        for decoder in self.decoders:
            for actors in (1, 2) if self.gpu else (1,):
                network = ["--model", self.model, "--weights", "random", "--compile", "on" if self.gpu else "off"]
                share = ["--gpus-per-actor", f"{1 / actors:g}" if self.gpu else "0"]
                spread = ["--actors", str(actors), *share, "--batch-size", str(self.batch_size)]
                output = folder / f"{decoder}-{actors}"
                with GpuMonitor(self.gpu) as monitor:
                    steady = embed_job.run(archive, output, [*network, *spread, "--decoder", decoder])
                setting = f", {actors} actor{'s' * (actors > 1)}"
                window = (steady.start, steady.stop)
                self._add_whole("job with Ray", decoder, setting, steady.images_per_second, window, monitor)
        if not self.gpu:
            self._missing("job with Ray", "--decoder gpu")

    def _feed(self, archive: Path, decoder: str) -> Feed:
        """As a run reads this archive: a process a core, each with one thread."""
        found = Archive(RunConfig(input=str(archive), output="none", decoder=decoder))
        loader = Loader.of(found.config, self.predictor, found.options(), rows_per_table=self.batch_size)
        return Feed(loader, list(found.shards()), self.machine["cores"])

    # What was found

    def _add_whole(
        self,
        what: str,
        decoder: str,
        setting: str,
        rate: float | None,
        window: tuple[float, float],
        monitor: GpuMonitor,
    ) -> None:
        network = self.network_limit["device" if decoder == "gpu" else "memory"]
        decode = self.decode_limit[decoder]
        limit = None if decode is None else min(decode, network)
        idle, memory = monitor.idle(*window), monitor.peak_memory_bytes
        self._add(Figure(what, f"--decoder {decoder}{setting}", rate, limit=limit, idle=idle, peak_memory_bytes=memory))

    def _missing(self, what: str, setting: str) -> None:
        self._add(Figure(what, setting, None, NO_GPU))

    def _add(self, figure: Figure) -> None:
        """Also into the file, so that a stop loses little."""
        self.figures.append(figure)
        command.say(f"{figure.what}, {figure.setting}: {figure.rate} images/s")
        if self.json:
            figures = [each.as_json() for each in self.figures]
            settings = {"model": self.model, "count": self.count, "batch_size": self.batch_size}
            record = {"machine": self.machine, "settings": settings, "figures": figures}
            self.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    command.leave_on_signals()
    sys.exit(main())
