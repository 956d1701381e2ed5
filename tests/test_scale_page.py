"""SCALE.md says what jobs/bench/arithmetic.py computes."""

from dataclasses import replace

import pytest
from whole import ROOT

from jobs.bench import arithmetic
from jobs.bench.arithmetic import COSTS, LARGE, MACHINES, SMALL, Machine, Network, Run, apart, together
from pipeline import engine

PAGE = ROOT / "jobs" / "bench" / "SCALE.md"
SLOW, FAST = Network("slow", 100.0), Network("fast", 1e9)


def test_every_table_is_the_computed_one() -> None:
    page = PAGE.read_text()
    shown = [block for block in page.split("\n\n") if block.startswith("|")]
    assert shown == arithmetic.tables(), "python -m jobs.bench.arithmetic prints the tables as they are"


def test_the_page_is_short() -> None:
    assert len(PAGE.read_text().splitlines()) <= 90


def test_a_run_is_bound_by_decoding_or_by_the_gpu() -> None:
    assert (together(SMALL, SLOW).bound, together(SMALL, SLOW).rate) == ("GPU", MACHINES * 100.0)
    assert together(SMALL, FAST).bound == "decoding"
    assert together(LARGE, FAST).rate == pytest.approx(4 * together(SMALL, FAST).rate), "4 times the vCPU"
    assert together(SMALL, FAST).rate == pytest.approx(MACHINES * 2000 / COSTS.image), "2 cores a machine"


def test_hours_and_dollars() -> None:
    run = Run(rate=1e9 / 3600, bound="", usd_hour=8.0)
    assert run.hours == pytest.approx(1.0)
    assert run.gpu_hours == pytest.approx(8.0)
    assert run.usd_per_million == pytest.approx(0.008)


def test_decoders_apart_are_as_many_as_the_gpus_need() -> None:
    run, decoders = apart(Network("middling", 1_000.0))
    assert run.bound == "GPU"
    cores = 8_000 * (COSTS.image + COSTS.transfer) / 1000
    assert (decoders - 1) * 8 < cores - MACHINES * 2 <= decoders * 8
    assert apart(FAST)[0].bound == "network card"


def test_the_driver_takes_batches_and_tasks() -> None:
    costs = replace(COSTS, driver_per_batch=36.0, driver_per_task=0.0)
    assert arithmetic.driver_core_hours(costs) == pytest.approx(1e9 / 256 * 0.036 / 3600)
    assert arithmetic.driver_limit(costs) == pytest.approx(256 / 0.036)


def test_what_the_engine_does_is_what_is_assumed() -> None:
    assert arithmetic.READ_TASKS == engine.MAX_READ_TASKS
    assert isinstance(SMALL, Machine)
