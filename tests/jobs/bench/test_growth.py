"""The benchmarks without a contest, on tiny archives: growth, commits and estimates."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
from whole import ROOT

from jobs.bench import estimates, growth
from jobs.bench.estimates import Outcome
from jobs.bench.harness.archives import encoded_tile, write_tars


@pytest.mark.slow
def test_the_memory_of_a_job_is_sampled(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    archive.mkdir()
    write_tars(archive, 200, [encoded_tile(0)], per_tar=100)
    speed, peaks, ledger = growth.measure(archive, tmp_path / "output")
    assert math.isnan(speed) or speed > 0, "a run with one commit has no speed"
    assert min(peaks.driver, peaks.workers, peaks.store) > 1
    assert 0 < ledger < 1


def test_loose_images_are_spread_over_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "IMAGES_PER_FOLDER", 4)
    growth.write_loose(tmp_path, 9, [b"a", b"b"])
    files = sorted(tmp_path.rglob("*.jpg"))
    assert [path.parent.name for path in files] == ["00000"] * 4 + ["00001"] * 4 + ["00002"]
    assert [path.read_bytes() for path in files] == [b"a", b"b"] * 4 + [b"a"]


@pytest.mark.slow
def test_commits_are_read_back_from_s3() -> None:
    """In its own process, since it sets environment variables."""
    command = [sys.executable, str(ROOT / "jobs" / "bench" / "commits.py"), "--commits", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 commits of 5,000 rows read from S3 in ")


def test_an_estimate_is_close_within_a_quarter() -> None:
    assert Outcome("photos", 100.0, 80.0, "CPUs", ()).is_close
    assert not Outcome("photos", 100.0, 70.0, "CPUs", ()).is_close
    assert not Outcome("photos", 100.0, None, "CPUs", ()).is_close


@pytest.mark.slow
def test_an_estimate_is_compared_with_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    case = estimates.Case("tiles", estimates.CASES["tiles"].model, small=50, large=100)
    outcome = estimates.check("tiles", case, rounds=1)
    assert outcome.estimated > 0
    assert outcome.forecasts[0]["sample"]["images"] == 100
    assert outcome.bottleneck in outcome.forecasts[0]["estimate"]["limits_images_per_second"]
