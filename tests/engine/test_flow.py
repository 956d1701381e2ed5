"""How the stages share a cluster, and how Ray Data cuts tables into blocks and parts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import images
import pyarrow as pa
import pytest
from PIL import Image
from ray.data import DataContext
from ray.data._internal.output_buffer import BlockOutputBuffer, OutputBlockSizeOption
from small_run import run_python
from whole import write_tar

from pipeline.config import RunConfig
from pipeline.engine import cluster, flow
from pipeline.engine.allocation import Allocation
from pipeline.errors import SettingRefused
from pipeline.images.pixels import RGB8
from pipeline.images.transform import Transform
from pipeline.predictors.base import Allotment


def allocate(
    cpus: float, gpus: float, grows: bool = False, node_gpus: Sequence[float] | None = None, **settings: str
) -> Allocation:
    return Allocation.of(RunConfig(input="a", output="b", **settings), cpus, node_gpus or [gpus], grows)


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 8, 16, 64, 1000])
def test_all_stages_run_side_by_side_on_cpus(cpus: int) -> None:
    found = allocate(cpus, 0)
    used = found.read_cpus + found.actors[1] * found.actor_cpus
    assert used <= cpus
    assert min(found.read_cpus, found.actor_cpus) > 0
    assert found.read_cpus != found.actor_cpus, "Ray would fuse the stages and run them in turn"
    assert found.actor_threads is not None
    assert found.actor_threads * found.actors[1] <= max(cpus, 1)


def tables(rows: int, image_bytes: int, missing: list[int]) -> Iterator[pa.Table]:
    """Tables of a reader, of `rows` rows each. missing: rows without pixels, per table."""
    for without in missing:
        pixels = [bytes(image_bytes)] * (rows - without) + [None] * without
        yield pa.table({"pixels": pa.array(pixels, pa.binary()), "image_id": ["a" * 100] * rows})


def blocks(made: Iterator[pa.Table], target: int) -> list[int]:
    """Rows per block, as Ray makes blocks of tables."""
    buffer = BlockOutputBuffer(OutputBlockSizeOption.of(target_max_block_size=target))
    found = []
    for table in made:
        buffer.add_block(table)
        while buffer.has_next():
            found.append(buffer.next().num_rows)
    buffer.finalize()
    return [*found, *([buffer.next().num_rows] if buffer.has_next() else [])]


@pytest.mark.parametrize(
    ("crop", "image_bytes", "leaves", "missing"),
    [
        (64, 64 * 64 * 3, False, [0] * 8),
        (64, 64 * 64 * 3, False, [0, 1, 3, 0, 12, 1, 0, 2]),
        (64, 64 * 64 * 3, False, [19, 16, 19, 5, 0, 18, 19, 0]),
        (64, 8_000, True, [0] * 8),
        (64, 70_000, True, [3] * 8),
    ],
)
def test_a_block_is_whole_batches_even_with_missing_images(
    crop: int, image_bytes: int, leaves: bool, missing: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "MIN_BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(flow, "ENCODED_TABLE_BYTES", 64 * 80_000)
    loader: Any = SimpleNamespace(
        transform=Transform(crop=crop), pixel_format=RGB8, rows_per_table=64, leave_jpegs=leaves
    )
    found = blocks(tables(64, image_bytes, missing), flow.block_bytes(loader, 10_000))
    assert sum(found) == 64 * len(missing)
    assert all(rows % 64 == 0 for rows in found), found
    assert leaves or found == [64] * len(missing)


def test_the_size_of_vectors_decides_the_rows_of_a_part() -> None:
    plan: Any = SimpleNamespace(rows=10**9, size_bytes=0, uncounted_shards=0)
    kept = {"words": pa.list_(pa.string(), 2), "pairs": pa.list_(pa.struct([("a", pa.int8())]), 3)}
    result = pa.schema({"embedding": pa.list_(pa.float32(), 512), **kept})
    assert flow._rows_per_part(plan, result, 64) == flow.PART_BYTES // (200 + 4 * 512)


def test_the_address_of_a_dashboard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(SettingRefused, match=r"^RAY_ADDRESS is 'http://127.0.0.1:8265': it is HOST:PORT of a cluster"):
        cluster.connect()


def test_a_cluster_with_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "Version mismatch: The cluster was started with:\n    Ray: 2.59\nThis process was started with:\n    Ray: 2.60"
    )
    monkeypatch.setattr(flow.ray, "init", Mock(side_effect=RuntimeError(said)))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(SettingRefused, match=r"^RAY_ADDRESS=auto: Version mismatch: .* Ray: 2.59 .* Ray: 2.60$"):
        cluster.connect()


@pytest.mark.parametrize(("cpus", "units"), [(1, 9), (2, 1), (2, 99), (3, 99), (8, 1), (8, 3), (8, 99), (64, 99)])
def test_decoding_has_one_thread_per_core(cpus: int, units: int) -> None:
    tasks, threads = allocate(cpus, 0).read_tasks(units)
    assert tasks <= units
    assert tasks * threads <= cpus
    assert tasks * threads > cpus / 2
    assert allocate(cpus, 0, grows=True, actors="1:99").read_tasks(units)[0] >= 1


def test_gpus_are_all_taken_and_leave_the_cpus_to_decoding() -> None:
    found = allocate(64, 8)
    assert (found.actors, found.actor_gpus, found.actor_cpus) == ((8, 8), 1.0, 0.0)
    assert allocate(64, 8, gpus_per_actor="0.5").actors == (16, 16)
    assert allocate(64, 8, actors="2:4").actors == (2, 4)
    assert allocate(64, 8, gpus_per_actor="0").actor_gpus == 0


@pytest.mark.parametrize(
    ("node_gpus", "share", "actors"),
    [([4], "0.6", 4), ([4], "0.4", 8), ([1, 1], "0.2", 10), ([0, 8], "1", 8), ([4, 4], "3", 2), ([3, 3], "2", 2)],
)
def test_there_are_only_as_many_actors_as_fit(node_gpus: list[float], share: str, actors: int) -> None:
    found = allocate(64, sum(node_gpus), node_gpus=node_gpus, gpus_per_actor=share)
    assert found.actors == (actors, actors)


def test_an_actor_has_its_gpus_on_one_machine() -> None:
    with pytest.raises(
        SettingRefused, match="--gpus-per-actor is 2, and the cluster has 2 GPUs, but no machine has as many"
    ):
        allocate(64, 2, node_gpus=[1, 1], gpus_per_actor="2")


def test_an_allotment_says_whether_there_is_a_gpu() -> None:
    for gpus, share in ((0, 0.0), (2, 1.0)):
        assert allocate(8, gpus).assign(None).gpu_share == share


@pytest.mark.parametrize(
    ("cpus", "gpus", "settings", "said"),
    [
        (2, 0, {"gpus_per_actor": "1"}, "the cluster has 0 GPUs"),
        (8, 1, {"gpus_per_actor": "2"}, "the cluster has 1 GPUs"),
        (2, 0, {"decoder": "gpu"}, "the cluster has 0 GPUs, --gpus-per-actor is auto; use --decoder fast"),
        (8, 1, {"decoder": "gpu", "gpus_per_actor": "0"}, "--gpus-per-actor is 0; use --decoder fast"),
        (2, 0, {"actors": "200"}, "--actors 200 does not fit: the cluster has 2 CPUs"),
    ],
)
def test_settings_that_do_not_fit_are_refused(cpus: int, gpus: int, settings: dict[str, str], said: str) -> None:
    with pytest.raises(SettingRefused, match=said):
        allocate(cpus, gpus, **settings)


def test_a_cluster_that_grows_may_start_without_gpus() -> None:
    found = allocate(1, 0, grows=True, gpus_per_actor="1", actors="1:8")
    assert (found.actors, found.actor_gpus, found.actor_cpus) == ((1, 8), 1.0, 0.0)
    with pytest.raises(SettingRefused, match="the cluster has 0 GPUs; set --actors MIN:MAX"):
        allocate(1, 0, grows=True, gpus_per_actor="1")
    with pytest.raises(SettingRefused, match="the cluster has 0 GPUs"):
        allocate(1, 0, gpus_per_actor="1", actors="1:8")


def test_a_cluster_that_grows_may_start_without_cpus() -> None:
    found = allocate(0, 0, grows=True, actors="1:8")
    assert (found.actors, found.actor_threads, found.actor_gpus) == ((1, 8), 1, 0.0)
    assert found.read_cpus != found.actor_cpus <= 1
    with pytest.raises(SettingRefused, match="the cluster has 0 CPUs; set --actors MIN:MAX"):
        allocate(0, 0, grows=True)
    with pytest.raises(SettingRefused, match="the cluster has 0 CPUs"):
        allocate(0, 2)


TWO_AT_ONCE = """
import sys
import threading
import pyarrow as pa
import ray
from pipeline import Predictor, run, RunConfig, Transform

class Meeting(Predictor):
    transform = Transform(resize=32, crop=32)
    columns = pa.schema([("met", pa.bool_())])
    max_concurrency = 2

    def load(self, allotment):
        self.barrier = threading.Barrier(2)

    def predict(self, pixels):
        self.barrier.wait(60)  # raises without a second batch
        return {"met": [True] * len(pixels)}

ray.init(num_cpus=2, num_gpus=int(sys.argv[3]), include_dashboard=False, object_store_memory=200 << 20)
report = run(RunConfig(input=sys.argv[1], output=sys.argv[2], batch_size=8), Meeting())
print(report.rows, report.errors)
"""


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [0, 1])
def test_an_actor_has_two_batches_under_way(tmp_path: Path, gpus: int) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    for seed in range(32):
        (archive / f"{seed:02d}.png").write_bytes(images.encode(images.tile(seed=seed), "PNG"))
    assert run_python("-c", TWO_AT_ONCE, archive, tmp_path / "output", gpus).split()[-2:] == ["32", "0"]


@pytest.mark.parametrize(("rows", "size_bytes", "parts"), [(10, 1, [4, 4, 1]), (10, 300 << 20, [2, 2, 2, 2, 1])])
def test_parts_are_cut_by_rows_and_by_bytes(rows: int, size_bytes: int, parts: list[int]) -> None:
    block = SimpleNamespace(ref="block", metadata=SimpleNamespace(num_rows=rows, size_bytes=size_bytes))
    bundles = [SimpleNamespace(blocks=[block] * 3)] * 3
    assert [len(blocks) for blocks in flow._cut(iter(bundles), 40)] == parts


BATCHES = """
import sys
import pandas as pd
import pyarrow as pa
import ray
from pipeline import Predictor, run, RunConfig, Transform

class Together(Predictor):
    transform = Transform(resize=32, crop=32)
    columns = pa.schema([("batch", pa.int32())])

    def predict(self, pixels):
        return {"batch": [len(pixels)] * len(pixels)}

ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=200 << 20)
run(RunConfig(input=sys.argv[1], output=sys.argv[2], batch_size=8), Together())
print(pd.read_parquet(sys.argv[2])["batch"].value_counts().to_dict())
"""


@pytest.mark.slow
def test_the_ends_of_shards_make_no_batch_smaller(tmp_path: Path) -> None:
    (archive := tmp_path / "archive").mkdir()
    photo = images.encode(images.tile(), "PNG")
    for name in ("a", "b", "c"):
        write_tar(archive / f"{name}.tar", {f"{i:02d}.png": photo for i in range(16)})
    assert run_python("-c", BATCHES, archive, tmp_path / "output").splitlines()[-1] == "{8: 48}"


WAITING = """
import os
import sys
import time
import pyarrow as pa
import ray
from pipeline import Predictor, run, RunConfig, Transform
from pipeline.engine import flow

class Slow(Predictor):
    transform = Transform()
    columns = pa.schema([("brightness", pa.float32())])

    def load(self, allotment):
        self.is_first = True

    def predict(self, pixels):
        if self.is_first:
            time.sleep(8)  # time to decode everything, unless the queue is bounded
            os.unlink(self.last_image)
            self.is_first = False
        return {"brightness": pixels.mean((1, 2, 3))}

flow.MIN_QUEUE_BYTES = 1 << 20
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=1 << 30)
predictor = Slow()
predictor.last_image = sys.argv[3]
report = run(RunConfig(input=sys.argv[1], output=sys.argv[2], batch_size=8), predictor)
print(report.rows, report.errors)
"""


@pytest.mark.long
def test_a_decoder_does_not_get_far_ahead_of_a_network_on_a_cpu(tmp_path: Path) -> None:
    """The object store has room for all 45 MB of pixels, but the last image is not read yet."""
    (archive := tmp_path / "archive").mkdir()
    for number in range(300):
        (archive / f"{number:03d}.jpg").write_bytes(images.encode(images.tile(seed=number % 9)))
    last = archive / "299.jpg"
    assert run_python("-c", WAITING, archive, tmp_path / "output", last).splitlines()[-1] == "299 1"


def test_a_run_on_gpus_does_not_keep_the_limit_of_a_run_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    context = DataContext()
    monkeypatch.setattr(flow.DataContext, "get_current", lambda: context)
    loader: Any = SimpleNamespace(transform=Transform(), pixel_format=RGB8, rows_per_table=64, leave_jpegs=False)
    limits = []
    for gpus in (0, 1):
        nothing: Any = None
        predictor: Any = SimpleNamespace(runs_in_readers=False)
        sized = flow.Flow(nothing, [], {}, loader, predictor, nothing, allocate(2, gpus), Allotment(), 1000, {})
        sized._set_context()
        limits.append(context.execution_options.resource_limits.object_store_memory)
    assert limits == [flow.MIN_QUEUE_BYTES, float("inf")]


LOST = """
import sys
import pyarrow as pa
import ray
from pipeline import Predictor, run, RunConfig, Transform
from pipeline.errors import NightshiftError

class Fragile(Predictor):
    transform = Transform(resize=32, crop=32)
    columns = pa.schema([("brightness", pa.float32())])
    max_concurrency = 2

    def lost(self):
        return self.breaks

    def predict(self, pixels):
        if self.breaks and pixels.max() == 255:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"brightness": pixels.mean((1, 2, 3))}

ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=200 << 20)
predictor = Fragile()
predictor.breaks = sys.argv[3] == "breaks"
try:
    report = run(RunConfig(input=sys.argv[1], output=sys.argv[2], batch_size=8), predictor)
    print("done:", report.rows, report.errors)
except NightshiftError as error:
    print("ended:", error)
"""


@pytest.mark.slow
def test_a_lost_gpu_ends_the_run_and_the_next_run_resumes(tmp_path: Path) -> None:
    (archive := tmp_path / "archive").mkdir()
    for number in range(32):
        colour = (255 if number == 20 else 90,) * 3
        (archive / f"{number:02d}.png").write_bytes(images.encode(Image.new("RGB", (40, 40), colour), "PNG"))
    given = ("-c", LOST, archive, output := tmp_path / "output")
    printed = run_python(*given, "breaks")
    assert " no longer answers: CUDA error: an illegal memory access was encountered; what was " in printed
    assert "run the same command again\n" in printed
    assert not list(output.glob("_errors/part-*"))
    assert run_python(*given, "holds").splitlines()[-1] == "done: 32 0"
