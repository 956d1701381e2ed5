"""SCALE.md shows the tables that jobs/bench/harness/scale.py computes."""

import pytest
from whole import ROOT

from jobs.bench.harness import scale
from jobs.bench.harness.scale import BATCH_SIZE, BILLION, NETWORKS, READ_TASKS, estimate, with_cpu_machines
from pipeline.config import RunConfig
from pipeline.engine import flow
from pipeline.engine.allocation import Allocation

PAGE = ROOT / "jobs" / "bench" / "SCALE.md"
RESNET18, RESNET50 = NETWORKS


def test_every_table_is_the_computed_one() -> None:
    shown = [block for block in PAGE.read_text().split("\n\n") if block.startswith("|")]
    assert shown == scale.tables(), "python -m jobs.bench.harness.scale prints the tables"


def test_the_page_is_short() -> None:
    assert len(PAGE.read_text().splitlines()) <= 90


def test_more_cpus_per_gpu_are_faster_until_the_gpu_is_the_bottleneck() -> None:
    small, large = (estimate(RESNET50, f"8x{machine}") for machine in ("g6.xlarge", "g6.4xlarge"))
    assert large.images_per_second == pytest.approx(4 * small.images_per_second), "four times the vCPU"
    best = with_cpu_machines(RESNET50)
    assert best.bottleneck == "GPUs"
    assert best.images_per_second == pytest.approx(8 * scale.PRICES.gpus["L4"].images_per_second["resnet50"])


def test_the_number_of_cpu_machines_is_the_cheapest() -> None:
    best = with_cpu_machines(RESNET18)
    (_, gpu_machine), (count, cpu_machine) = best.cluster.groups
    for other in (count - 1, count + 1):
        shape = f"8x{gpu_machine.name}+{other}x{cpu_machine.name}"
        assert estimate(RESNET18, shape).usd_per_million >= best.usd_per_million


def test_the_driver_pays_for_batches_and_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "DRIVER_PER_BATCH", 0.256)
    monkeypatch.setattr(scale, "DRIVER_PER_TASK", 100.0)
    assert scale.driver_core_seconds() == pytest.approx(0.001 + 100 * READ_TASKS / BILLION)


def test_the_engine_does_as_assumed() -> None:
    assert flow.MAX_READ_TASKS == READ_TASKS
    on_gpus = Allocation.of(RunConfig(input="photos", output="none"), 32, [1] * 8)
    assert on_gpus.assign(None).batch_size == BATCH_SIZE
