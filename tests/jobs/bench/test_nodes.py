"""The benchmark of clusters: roles of processes, figures from runs, and a whole small benchmark."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from whole import ROOT

from jobs.bench import nodes
from jobs.bench.nodes import ROLES, Meter, Outcome, Spent, role


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("raylet", "daemons"),
        ("gcs_server", "daemons"),
        ("ray::MapWorker(MapBatches(Embedder resnet50)).submit", "actors"),
        ("ray::Read and decode", "decoders"),
        ("ray::Write part", "decoders"),
        ("ray::_StatsActor.update_execution_metrics", "agents"),
        ("ray::DashboardAgent", "agents"),
        ("ray::IDLE", None),
        ("python", None),
    ],
)
def test_the_role_of_a_process_comes_from_its_title(title: str, expected: str | None) -> None:
    assert role(title) == expected


def spent(seconds: float, driver: float, decoders: float) -> Spent:
    return Spent(seconds, dict.fromkeys(ROLES, 0.0) | {"driver": driver, "decoders": decoders}, 3 << 20)


def test_figures_are_marginal() -> None:
    small, large, many = [spent(10, 2, 5), spent(12, 3, 7), spent(11, 9, 6)], [spent(21, 4, 36)], [spent(15, 8, 6)]
    alone = [{"read": 0.001, "decode": 0.002, "write": 0.0, "predict": 1.0}]
    outcome = Outcome("cpu", 1, (100, 1_100), (10, 60), small, large, many, alone)
    assert outcome.per_image_ms("driver") == pytest.approx(1.0), (
        "(4 − 3) s over 1,000 images, with the median of the small runs"
    )
    assert outcome.per_image_ms("decoders") == pytest.approx(30.0)
    assert outcome.per_task_ms == pytest.approx(100.0), "(8 − 3) s over 50 tasks"
    assert outcome.rate == pytest.approx(100.0)
    assert outcome.agents_share == 0
    assert outcome.alone_ms("read", "decode", "write") == pytest.approx(3.0)


def test_earlier_cpu_time_of_a_process_does_not_count() -> None:
    before, after = Meter(), Meter()
    before.sample(0)
    burner = subprocess.Popen(
        [sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass\ntime.sleep(60)"]
    )
    try:
        deadline = time.monotonic() + 60
        while sum(after.since(before).values()) < 0.9:  # the kernel reports whole ticks
            assert time.monotonic() < deadline, "no CPU time of the process was counted"
            time.sleep(0.05)
            after.sample(0)
        later = Meter()
        later.sample(0)
    finally:
        burner.kill()
        burner.wait()
    assert later.since(after)["agents"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--nodes", "0"), "--nodes 0"),
        (("--topology", "apart", "--nodes", "1"), "--topology apart needs --nodes of at least 2"),
        (("--few", "16", "--many", "16"), "each must be larger than the one before"),
        (("--small", "2001", "--many", "3"), "--few 16"),
    ],
)
def test_bad_settings_end_in_a_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nodes.main(arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.long
def test_a_whole_benchmark_on_two_nodes(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    sizes = ("--small", "32", "--large", "96", "--few", "4", "--many", "16", "--rounds", "1")
    done = subprocess.run(
        [sys.executable, "jobs/bench/nodes.py", "--topology", "apart", "--nodes", "2", *sizes, "--json", str(figures)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "apart, 2 nodes" in done.stdout
    (cluster,) = json.loads(figures.read_text())["clusters"]
    for name in ("small", "large", "many"):
        (run,) = cluster[name]
        assert set(run["core_seconds"]) == set(ROLES)
        assert min(run["core_seconds"].values()) > 0, "a role without a process"
        assert run["driver_bytes"] > 20 << 20
    assert set(cluster["core_ms_per_image"]) == set(ROLES) - {"agents"}
    assert 0 < cluster["agents_share"] < 2
