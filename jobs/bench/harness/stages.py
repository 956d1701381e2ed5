"""The stages of a run, one at a time in one process.

    python -m jobs.bench.harness.stages ARCHIVE --model resnet18 --rows-per-part 64 --networks

Prints JSON: CPU core-seconds per image of read, decode, predict and write, medians of several rounds over the first
images of the archive's first shard; and `gpus`: with a GPU, predict is not the CPU's work. --networks adds the network
in three forms (eager, compiled, and `plain`, as the peers run it) with their images/s, and its operations per image.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jobs.bench.harness.roofline import Speed
from pipeline import cli, schema
from pipeline.config import RunConfig
from pipeline.estimates import stage_costs
from pipeline.estimates.machines import cpus_here
from pipeline.estimates.stage_costs import Seconds, StageCosts, timed
from pipeline.models import spec as model_specs
from pipeline.models.classifier import Network
from pipeline.planning.archive import Archive
from pipeline.predictors.base import Allotment, Predictor
from pipeline.predictors.embed import Embedder
from pipeline.sources.shard import Shard
from pipeline.stages.load import Loader
from pipeline.stages.predict import Predict
from pipeline.stages.write import Sink

IMAGES = 512
ROUNDS = 3
PREDICT_SECONDS = 1.0
NETWORK_SECONDS = 10.0


@dataclass(frozen=True)
class Stages:
    """The stages of a run over the first images of one shard."""

    shard: Shard
    loader: Loader
    predict: Predict
    sink: Sink
    rows_per_part: int

    @staticmethod
    def of(config: RunConfig, predictor: Predictor, rows_per_part: int) -> "Stages":
        predictor.prepare()
        archive, allotment = Archive(config), Allotment(cores=cpus_here())
        shard = replace(next(archive.shards()), index=0)
        loader = Loader.of(config, predictor, archive.options(), rows_per_table=allotment.batch_size)
        sink = Sink(config.output, 1, schema.result(predictor.columns, {}), "{}")
        return Stages(shard, loader, Predict(predictor, {}, allotment), sink, rows_per_part)

    def measure(self) -> StageCosts:
        read = stage_costs.read(self.shard, self.loader.options, IMAGES)
        load = stage_costs.load(self.loader, [read])
        predict, results = stage_costs.predict(self.predict, load.images, PREDICT_SECONDS)
        write, _ = stage_costs.write(self.sink, results, self.rows_per_part)
        return StageCosts(read.seconds.per(read.images), load.seconds, predict, write)

    def images(self) -> pa.Table:
        """The decoded images."""
        read = stage_costs.read(self.shard, self.loader.options, IMAGES)
        return stage_costs.load(self.loader, [read]).images


def alone(archive: Path, predictor: Predictor, rows_per_part: int) -> dict[str, float]:
    """Core-seconds per image of each stage, medians of ROUNDS."""
    return medians(Stages.of(RunConfig(input=str(archive), output="none"), predictor, rows_per_part))


def medians(stages: Stages) -> dict[str, float]:
    stages.measure()  # warms up caches and allocators
    rounds = [stages.measure().core_seconds for _ in range(ROUNDS)]
    return {name: median(each[name] for each in rounds) for name in rounds[0]}


def networks(predictor: Embedder, stages: Stages) -> dict[str, Any]:
    """The network in each form, with the fields of roofline.Networks."""
    compiled = Predict(replace(predictor, compile="on"), {}, stages.predict.allotment)
    images, spec = stages.images(), predictor.spec
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = model_specs.build(spec).to(device)
    side = spec.transform.crop
    batch = torch.randn(stages.predict.allotment.batch_size, spec.in_channels, side, side)
    speeds = {}
    for form, predict in (("eager", stages.predict), ("compiled", compiled)):
        speeds[form] = speed(stage_costs.predict(predict, images, NETWORK_SECONDS)[0])
    with torch.inference_mode():
        counter = FlopCounterMode(display=False)
        with counter:
            plain.features(batch[:1].to(device))
        plain_pass(plain, batch, device)  # warms up
        rounds = [timed(lambda: plain_pass(plain, batch, device))[0].per(len(batch)) for _ in range(ROUNDS)]
    speeds["plain"] = speed(Seconds(median(each.core for each in rounds), median(each.wall for each in rounds)))
    return {
        "dtype": predictor.describe().split(", ")[1],
        "flops_per_image": counter.get_total_flops(),
        "speeds": {form: asdict(each) for form, each in speeds.items()},
    }


def speed(per_image: Seconds) -> Speed:
    return Speed(per_image.core, 1 / per_image.wall)


def plain_pass(network: Network, images: Tensor, device: str) -> Tensor:
    """Run the network as the peers do: float32, channels first, batch normalisation not folded, not compiled."""
    return network.features(images.to(device)).cpu()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", metavar="ARCHIVE")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rows-per-part", metavar="N", type=int, default=64)
    parser.add_argument("--networks", action="store_true", help="also measure the network in other forms")
    options = parser.parse_args()
    return cli.guarded(lambda: report(options))


def report(options: argparse.Namespace) -> int:
    predictor = Embedder(model=options.model, weights="random", compile="off")
    config = RunConfig(input=options.archive, output="none")
    stages = Stages.of(config, predictor, options.rows_per_part)
    figures: dict[str, Any] = medians(stages)
    if options.networks:
        figures["networks"] = networks(predictor, stages)
    print(json.dumps({**figures, "gpus": torch.cuda.device_count()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
