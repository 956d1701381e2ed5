"""Faults during whole jobs. Afterwards the output is whole, with the same results as a run without faults."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
from servers import ROOT, RayCluster, start_ray_head, stop_ray_head
from whole import SLOW, Jobs, count_commits, embeddings, jpeg, same, wait_for, write_folder

from pipeline.output.verify import verify

IMAGES = 240
SETTINGS = (*SLOW, "--batch-size", "8", "--rows-per-part", "16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("archive") / "loose", IMAGES)


@pytest.fixture(scope="module")
def uninterrupted(ray_cluster: RayCluster, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    Jobs(ray_cluster.environment).run("embed", "--input", folder, "--output", out, *SETTINGS)
    return out


def check(out: Path, uninterrupted: Path) -> None:
    result = verify(str(out))
    assert result.is_whole, result.problems
    assert (result.rows, result.errors) == (IMAGES, 0)
    assert same(embeddings(out), embeddings(uninterrupted))
    assert not [path for path in out.rglob(".*") if path.is_file()], "there are temporary files"


@pytest.mark.faults
def test_twenty_kills_at_random_moments(jobs: Jobs, folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    moments = random.Random(20)
    out = tmp_path / "out"
    for _ in range(20):
        process = jobs.start("embed", "--input", folder, "--output", out, *SETTINGS)
        time.sleep(moments.uniform(2, 14))
        process.kill()
        process.communicate()
    jobs.run("embed", "--input", folder, "--output", out, *SETTINGS)
    check(out, uninterrupted)


@pytest.mark.faults
@pytest.mark.parametrize("where", ["part-half", "before-commit", "commit-half", "after-commit"])
def test_a_kill_at_each_step_of_a_write(folder: Path, uninterrupted: Path, tmp_path: Path, where: str) -> None:
    out = tmp_path / "out"
    (tmp_path / "sabotage").mkdir()
    tests = ROOT / "tests/support"
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": f"{tests / 'sabotage'}:{ROOT}:{tests}"}
    command = [sys.executable, "jobs/embed.py", "--input", str(folder), "--output", str(out), *SETTINGS]
    sabotaged = {**environment, "SABOTAGE": f"{where}:4:{tmp_path / 'sabotage'}"}
    process = subprocess.Popen(command, cwd=ROOT, env=sabotaged, stderr=subprocess.DEVNULL)
    (tmp_path / "sabotage" / "driver").write_text(str(process.pid))
    assert process.wait(120) == -signal.SIGKILL
    assert not verify(str(out)).is_whole
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=180)
    check(out, uninterrupted)


def worker_processes(title: str, driver: int) -> list[psutil.Process]:
    """Ray workers of this title that were started after the driver."""
    started = psutil.Process(driver).create_time()
    workers = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        line = " ".join(process.info["cmdline"] or [])
        if line.startswith("ray::") and title in line and process.info["create_time"] >= started:
            workers.append(process)
    return workers


@pytest.mark.faults
@pytest.mark.parametrize("title", ["Embedder", "Read and decode", "Write part"])
def test_a_killed_worker_changes_no_result(
    jobs: Jobs,
    folder: Path,
    uninterrupted: Path,
    tmp_path: Path,
    title: str,
) -> None:
    out = tmp_path / "out"
    process = jobs.start("embed", "--input", folder, "--output", out, *SETTINGS)
    if title != "Read and decode":  # reading ends soon, so its worker is killed at once
        wait_for(lambda: count_commits(out) >= 1)
    killed = 0
    while not killed and process.poll() is None:
        for worker in worker_processes(title, process.pid):
            worker.kill()
            killed += 1
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert killed
    check(out, uninterrupted)


@pytest.mark.faults
def test_a_paused_and_resumed_driver_commits_nothing(folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    jobs = Jobs(
        {"RAY_ADDRESS": "local", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
    )  # a local cluster each: the paused job keeps its CPUs
    paused = jobs.start("embed", "--input", folder, "--output", out, *SETTINGS)
    wait_for(lambda: count_commits(out) >= 2)
    paused.send_signal(signal.SIGSTOP)
    jobs.run("embed", "--input", folder, "--output", out, *SETTINGS)
    check(out, uninterrupted)
    paused.send_signal(signal.SIGCONT)
    _, err = paused.communicate(timeout=60)
    assert paused.returncode == 4, err
    assert "took over" in err
    late = verify(str(out))
    assert [problem for problem in late.problems if "belongs to no commit" not in problem] == []
    assert (late.rows, late.errors) == (IMAGES, 0)
    assert {json.loads(path.read_text())["status"] for path in (out / "_attempts").glob("2.json")} == {"done"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("a small disk cannot be mounted here (that needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_with_one_line_and_the_job_resumes(
    jobs: Jobs,
    folder: Path,
    small_disk: Path,
    uninterrupted: Path,
) -> None:
    out = small_disk / "out"
    done = jobs.run("embed", "--input", folder, "--output", out, *SETTINGS, code=1)
    assert "No space left on device" in done.stderr
    assert done.stderr.count("nightshift: ") == 2, "the first line of life, and the error"
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    jobs.run("embed", "--input", folder, "--output", out, *SETTINGS)
    check(out, uninterrupted)


@pytest.mark.slow
def test_an_archive_that_changes_during_a_run(jobs: Jobs, folder: Path, tmp_path: Path) -> None:
    archive, out = tmp_path / "loose", tmp_path / "out"
    shutil.copytree(folder, archive)
    settings = ("--input", archive, "--output", out, *SETTINGS, "--limit", 100)
    process = jobs.start("embed", *settings)
    wait_for(lambda: count_commits(out) >= 2)
    process.kill()
    process.communicate()
    (archive / "0097.jpg").unlink()
    (archive / "0098.jpg").write_bytes(jpeg(7))
    (archive / "0050b.jpg").write_bytes(jpeg(8))
    jobs.run("embed", *settings)
    assert verify(str(out)).is_whole
    errors = pd.read_parquet(out / "_errors").set_index("image_id")["error_type"].to_dict()
    assert errors == {f"{archive}/0097.jpg": "not_found", f"{archive}/0098.jpg": "changed"}
    assert len(pd.read_parquet(out)) == 98
    assert f"{archive}/0050b.jpg" not in embeddings(out)


@pytest.mark.faults
def test_a_full_object_store_spills_to_disk(folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    spilling = {"RAY_object_spilling_threshold": "0.0001", "RAY_min_spilling_size": "0"}
    spilling["RAY_max_direct_call_object_size"] = "1000"  # puts all but the smallest blocks into the store
    environment = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}", **spilling}
    head, cluster = start_ray_head(environment)
    ray_folder = Path(str(head.args[-1]))  # type: ignore[index]
    out, spilled = tmp_path / "out", set()
    try:
        jobs = Jobs({**environment, "RAY_ADDRESS": cluster.address})
        process = jobs.start("embed", "--input", folder, "--output", out, *SETTINGS)
        while process.poll() is None:
            spilled |= {path.name for path in ray_folder.glob("session_*/ray_spilled_objects*/*")}
            time.sleep(0.05)
        assert process.returncode == 0, process.communicate()[1]
    finally:
        stop_ray_head(head)
    assert spilled
    check(out, uninterrupted)


@pytest.mark.faults
def test_a_node_is_lost_and_another_one_joins(folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
    command = [sys.executable, str(ROOT / "tests/support/lose_node.py"), str(folder), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost a node, the job continues" in done.stdout
    assert "another node joined, the job continues" in done.stdout
    check(out, uninterrupted)
