"""The sample of an archive: how many images the archive holds, and the cost of one of them."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from zipfile import ZipFile

import images
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from whole import jpeg, write_folder, write_tar

from pipeline.config import RunConfig
from pipeline.errors import InputRefused
from pipeline.estimates import sample, stage_costs
from pipeline.estimates.machines import Machine
from pipeline.estimates.sample import Sample
from pipeline.estimates.stage_costs import Seconds
from pipeline.images.transform import Transform
from pipeline.output import directory
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan
from pipeline.predictors.base import Allotment, Predictor
from pipeline.stages.load import Loader

SIDE = 16
LOCAL, ALLOTMENT = Machine("local", 2, 1), Allotment(batch_size=8)


@dataclass
class Warming(Predictor):
    """Describes itself as cold until it has seen `warm_up` batches."""

    columns: ClassVar[pa.Schema] = pa.schema([("mean", pa.float32())])
    transform: ClassVar[Transform] = Transform(resize=SIDE, crop=SIDE)
    warm_up: int = 0
    batches: int = 0
    allotment: Allotment | None = None

    def load(self, allotment: Allotment) -> None:
        self.allotment = allotment

    def describe(self) -> str:
        return "warm" if self.batches > self.warm_up else "cold"

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        self.batches += 1
        return {"mean": pixels.mean(axis=(1, 2, 3), dtype="float32")}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "PREDICT_SECONDS", 0.05)
    monkeypatch.setattr(sample, "IMAGES_PER_SHARD", 16)


@contextmanager
def planned(folder: Path) -> Iterator[tuple[Plan, Loader]]:
    config = RunConfig(input=str(folder), output=str(folder / "out"))
    archive = Archive(config)
    with directory.draft(archive) as plan:
        keep = {name: (name, plan.keep.field(name).type) for name in plan.keep.names}
        yield plan, Loader(Warming.transform, archive.options(), keep, 10**6, True, True, False, 8, 1)


def measured(
    folder: Path,
    predictor: Predictor | None = None,
    machine: Machine = LOCAL,
    allotment: Allotment = ALLOTMENT,
) -> Sample:
    with planned(folder) as (plan, loader):
        return sample.measure(plan, loader, predictor or Warming(), allotment, machine, 1, lambda _: None)


def members(count: int, sidecars: int) -> dict[str, bytes]:
    files = {}
    for i in range(count):
        files |= {f"{i:05d}.jpg": jpeg(i)} | {f"{i:05d}.{n}": b"x" * 700 for n in range(sidecars)}
    return files


def test_a_folder_is_counted_and_the_costs_of_an_image_are_measured(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 40)
    sampled = measured(folder)
    assert (sampled.images, sampled.sampled, sampled.shards, sampled.error_rate) == (40, 16, 1, 0)
    assert 40 <= sampled.width <= 48
    assert sampled.height == 48
    costs = sampled.costs
    sizes = [path.stat().st_size for path in sorted(folder.iterdir())[:16]]
    assert costs.encoded_bytes == pytest.approx(np.mean(sizes))
    assert costs.pixel_bytes == SIDE * SIDE * 3
    for name in (
        "read",
        "decode",
        "predict",
        "write",
        "read_seconds",
        "load_seconds",
        "predict_seconds",
        "result_bytes",
    ):
        assert getattr(costs, name) > 0, name
    assert costs.gpu_seconds == {}
    assert sampled.read_bytes_per_second > 0


@pytest.mark.parametrize("sidecars", [0, 3])
def test_tars_are_counted_by_their_bytes_per_image(tmp_path: Path, sidecars: int) -> None:
    for number, count in enumerate((200, 300, 100)):
        write_tar(tmp_path / f"{number}.tar", members(count, sidecars))
    sampled = measured(tmp_path)
    assert sampled.images == pytest.approx(600, rel=0.03)
    assert sampled.sampled == 48


def test_compressed_tars_and_zips_are_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", members(200, 0))
    (tmp_path / "a.tar.zst").write_bytes(zstandard.ZstdCompressor().compress((tmp_path / "a.tar").read_bytes()))
    (tmp_path / "a.tar").unlink()
    assert measured(tmp_path).images == pytest.approx(200, rel=0.1)
    with ZipFile(tmp_path / "b.zip", "w") as file:
        for name, data in members(150, 2).items():
            file.writestr(name, data)
    (tmp_path / "a.tar.zst").unlink()
    assert measured(tmp_path).images == 150


def test_a_shard_that_is_read_to_its_end_is_counted_exactly(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", members(11, 1))
    assert measured(tmp_path).images == 11


def test_bad_images_are_counted_as_a_share(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 12)
    for i in range(4):
        (folder / f"bad{i}.jpg").write_bytes(b"no image")
    sampled = measured(folder)
    assert sampled.error_rate == 0.25
    assert sampled.sampled == 16


def test_an_archive_without_a_good_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(InputRefused, match=r"no image could be decoded in .*see their _errors/"):
        measured(tmp_path)
    (tmp_path / "bad.jpg").unlink()
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(InputRefused, match="no image could be decoded"):
        measured(tmp_path)


def test_an_archive_of_no_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "in/empty.parquet")
    with pytest.raises(InputRefused, match="no image in 1 shard:"):
        measured(tmp_path / "in")


def test_batches_that_warm_up_do_not_count(tmp_path: Path) -> None:
    """A network that is compiled meanwhile describes itself differently."""
    folder = write_folder(tmp_path / "photos", 16)
    predictor = Warming(warm_up=6)
    sampled = measured(folder, predictor)
    assert sampled.network == "warm"
    assert predictor.batches > 6 + stage_costs.MIN_BATCHES
    assert predictor.allotment == Allotment(batch_size=8, images=16)


def test_a_gpu_of_the_machine_is_measured(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "photos", 16)
    sampled = measured(folder, machine=Machine("local", 4, 2, gpus=1, gpu="T4"))
    assert sampled.costs.gpu_seconds == {"T4": sampled.costs.predict_seconds}


@pytest.mark.parametrize(
    ("threads", "machine", "cores", "share"),
    [
        (2, Machine("local", 2, 1), 2, 1),  # a core for each thread
        (4, Machine("local", 4, 2), 2, 0.5),  # two threads share a core
        (4, Machine("local", 16, 2), 4, 1),  # the cores of other actors are idle
    ],
)
def test_core_seconds_are_of_whole_cores(
    tmp_path: Path, threads: int, machine: Machine, cores: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "photos", 16)
    predict = stage_costs.predict
    monkeypatch.setattr(stage_costs, "predict", lambda *arguments: (Seconds(0.25, 0.125), predict(*arguments)[1]))
    costs = measured(folder, machine=machine, allotment=Allotment(cores=threads, batch_size=8)).costs
    assert (costs.predict, costs.predict_seconds, costs.predict_cores) == (0.25 * share, 0.125, cores)


def test_shards_are_spread_over_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        write_tar(tmp_path / f"{number}.tar", {"a.png": images.encode(images.tile("urban", number), "PNG")})
    monkeypatch.setattr(sample, "SHARDS", 3)
    with planned(tmp_path) as (plan, _):
        assert sample._spread(plan) == [1, 4, 7]
