"""The cost of each stage, one at a time, over a small archive."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from clocks import burn
from whole import jpeg, write_folder, write_tar

from pipeline import schema
from pipeline.config import RunConfig
from pipeline.estimates import stage_costs
from pipeline.estimates.stage_costs import Seconds, StageCosts
from pipeline.images.transform import Transform
from pipeline.planning.archive import Archive
from pipeline.predictors.base import Allotment, Predictor
from pipeline.sources.shard import Shard
from pipeline.stages.load import Loader
from pipeline.stages.predict import Predict
from pipeline.stages.write import Sink

SIDE = 16


@dataclass
class Sleeper(Predictor):
    """Needs no CPU for the time that it takes."""

    columns: ClassVar[pa.Schema] = pa.schema([("mean", pa.float32())])
    transform: ClassVar[Transform] = Transform(resize=SIDE, crop=SIDE)
    batches: int = 0

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        self.batches += 1
        time.sleep(0.05)
        return {"mean": pixels.mean(axis=(1, 2, 3), dtype="float32")}


def stage(batch_size: int) -> Predict:
    return Predict(Sleeper(), {}, Allotment(batch_size=batch_size))


def opened(folder: Path) -> tuple[Shard, Loader]:
    """The only shard of an archive."""
    archive = Archive(RunConfig(input=str(folder), output="none"))
    (shard,) = archive.shards()
    return shard, Loader.of(archive.config, Sleeper(), archive.options(), rows_per_table=4)


def test_costs_are_per_image_and_decoding_is_loading_without_reading() -> None:
    costs = StageCosts(Seconds(0.001, 1), Seconds(0.004, 1), Seconds(0.02, 1), Seconds(0.003, 1))
    assert costs.core_seconds == pytest.approx({"read": 0.001, "decode": 0.003, "predict": 0.02, "write": 0.003})
    quick = StageCosts(Seconds(0.004, 1), Seconds(0.001, 1), Seconds(0.02, 1), Seconds(0.003, 1))
    assert quick.core_seconds["decode"] == 0
    assert Seconds(4.0, 8.0).per(4) == Seconds(1.0, 2.0)


def test_core_seconds_are_cpu_time() -> None:
    seconds, result = stage_costs.timed(lambda: (burn(0.1), "done")[1])
    assert result == "done"
    assert seconds.core > 0.09
    assert stage_costs.timed(lambda: time.sleep(0.3))[0].core < 0.2


def test_a_shard_is_read_up_to_a_limit(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{i:02d}.jpg": jpeg(i) for i in range(10)})
    shard, loader = opened(tmp_path)
    first = stage_costs.read(shard, loader.options, max_images=4)
    assert (first.images, first.is_whole, first.shard) == (4, False, shard)
    assert first.encoded_bytes == sum(len(jpeg(i)) for i in range(4))
    whole = stage_costs.read(shard, loader.options, max_images=10)
    assert (whole.images, whole.is_whole) == (10, True)
    assert stage_costs.read(shard, loader.options, max_images=10, max_seconds=0).images < 10


def test_only_the_images_that_were_read_are_loaded(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", 9)
    (tmp_path / "photos" / "0003.jpg").write_bytes(b"no image")
    shard, loader = opened(tmp_path / "photos")
    loaded = stage_costs.load(loader, [stage_costs.read(shard, loader.options, max_images=5)])
    assert loaded.images["row"].to_pylist() == [0, 1, 2, 4]
    assert loaded.error_rate == pytest.approx(0.2)
    assert loaded.seconds.wall > 0


def test_predicting_and_writing_repeat_the_images(tmp_path: Path) -> None:
    shard, loader = opened(write_folder(tmp_path / "photos", 3))
    loaded = stage_costs.load(loader, [stage_costs.read(shard, loader.options, max_images=3)])
    predict = stage(batch_size=8)
    seconds, results = stage_costs.predict(predict, loaded.images, 0.2)
    assert 0.9 * 0.05 / 8 < seconds.wall < 0.05, "of one image, also on a machine that is busy"
    assert seconds.core < seconds.wall
    assert len(results) % 8 == 0
    sink = Sink("", 1, schema.result(Sleeper.columns, {}), "{}")
    write, result_bytes = stage_costs.write(sink, results, rows=100)
    assert write.wall > 0
    assert 4 < result_bytes < 200, "100 rows in one part, none dropped as a repetition"
