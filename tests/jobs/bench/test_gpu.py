"""The one-GPU benchmark: its parts, its figures, and a whole benchmark without a GPU."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
from whole import ROOT, wait_for, write_folder

from jobs.bench import gpu
from jobs.bench.harness import archives, decoding, embed_job, gpu_parts
from jobs.bench.harness.gpu_monitor import GpuMonitor, Sample
from jobs.bench.harness.gpu_table import NO_GPU, Figure
from pipeline.config import RunConfig
from pipeline.errors import InputRefused
from pipeline.images.transform import Transform
from pipeline.planning.archive import Archive
from pipeline.stages.load import Loader


def test_the_share_is_of_the_limit() -> None:
    assert Figure("run", "", 90.0, limit=100.0).share == 0.9
    assert Figure("run", "", None, NO_GPU, limit=100.0).share is None
    assert (Figure("run", "", None, NO_GPU).rate, Figure("run", "", 1234.56).rate) == ("no GPU", "1,234.6")
    assert Figure("run", "", 90.0, limit=100.0).as_json()["share"] == 0.9


def test_the_warm_up_of_decoding_does_not_count() -> None:
    progress = decoding.Progress([100.0, 110.0, 111.0, 112.0, 113.0], [10, 10, 20, 30, 30])
    assert progress.images_per_second == pytest.approx(80 / 3)
    assert decoding.Progress([100.0], [10]).images_per_second is None


def test_a_job_is_measured_from_its_first_commit_to_its_last(tmp_path: Path) -> None:
    (tmp_path / "_commits").mkdir()
    for number, (rows, time) in enumerate([(50, 1000), (30, 1002), (40, 1004)]):
        path = tmp_path / "_commits" / f"part-{number}.json"
        path.write_text(json.dumps({"rows": rows}))
        os.utime(path, (time, time))
    steady = embed_job.steady(tmp_path)
    assert (steady.images, steady.start, steady.stop, steady.images_per_second) == (70, 1000, 1004, 17.5)
    assert embed_job.Steady(0, 5.0, 5.0).images_per_second is None


def test_the_rate_counts_every_thread_and_no_warm_up() -> None:
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        return 10

    assert gpu_parts.rate(work, 0.05, 3) > 0
    assert len(calls) > 3 * gpu_parts.WARM_UPS
    with pytest.raises(ZeroDivisionError):
        gpu_parts.rate(lambda: 1 // 0, 0.05, 2)


def test_a_network_is_freed_before_the_next_one_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        def describe(self) -> str:
            return ""

    networks: list[weakref.ref[Network]] = []

    def embedder(*_: object) -> Network:
        assert all(each() is None for each in networks)
        network = Network()
        networks.append(weakref.ref(network))
        return network

    monkeypatch.setattr(gpu_parts, "embedder", embedder)
    monkeypatch.setattr(gpu_parts, "predict_rate", lambda *_: 1.0)
    gpu.GpuBenchmark(None, 1, "", [4, 8], 0.1, None, gpu="0")._measure_network()
    assert len(networks) == 4


def test_idle_is_that_of_a_window() -> None:
    monitor = GpuMonitor("0", [Sample(1.0, 0.0, 5), Sample(2.0, 0.9, 30), Sample(3.0, 1.0, 20), Sample(9.0, 0.0, 9)])
    assert monitor.idle(1.5, 4.0) == pytest.approx(0.05)
    assert monitor.idle(4.0, 5.0) is None
    assert monitor.peak_memory_bytes == 30


def test_the_monitor_reads_what_nvidia_smi_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys, time\n"
        f"open({str(tmp_path / 'arguments')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
        "for line in ('37, 1024', '[N/A], [N/A]', '100, 2048'): print(line, flush=True)\ntime.sleep(600)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with GpuMonitor("GPU-1") as monitor:
        wait_for(lambda: len(monitor.samples) == 2)
    assert [(each.utilization, each.memory_bytes) for each in monitor.samples] == [(0.37, 1 << 30), (1.0, 2 << 30)]
    assert (tmp_path / "arguments").read_text().startswith("-i GPU-1 --query-gpu=utilization.gpu,memory.used")
    monkeypatch.setenv("PATH", "")
    for name in ("GPU-1", None):
        with GpuMonitor(name) as monitor:
            assert monitor.samples == []
        assert (monitor.idle(0.0, 1e12), monitor.peak_memory_bytes) == (None, None)


def test_your_own_images_repeat(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "mine", 3)
    (tmp_path / "made").mkdir()
    archives.repeated_images(source).make(tmp_path / "made", 7)
    made = sorted((tmp_path / "made").iterdir())
    assert [path.read_bytes() for path in made] == [(source / f"{i % 3:04d}.jpg").read_bytes() for i in range(7)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match="holds no images"):
        archives.repeated_images(tmp_path / "empty").make(tmp_path / "made", 7)


def test_all_images_are_decoded_by_processes(tmp_path: Path) -> None:
    archive = Archive(RunConfig(input=str(write_folder(tmp_path / "photos", 21)), output="none"))
    loader = Loader(Transform(36, 32), archive.options(), {}, 10**6, True, False, False, 8, 1, leave_jpegs=True)
    assert decoding.run(loader, archive.shards(), 2).counts == [8, 8, 5]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--count", "0"), "--count is 0"),
        (("--batch-sizes", "8", "0"), "--batch-sizes is 0"),
        (("--seconds", "0"), "--seconds is 0"),
        (("--images", "none"), "--images none is not a folder"),
        (("--json", "none/figures.json"), "none/figures.json cannot be written"),
    ],
)
def test_bad_settings_end_in_a_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.long
def test_a_whole_benchmark_without_a_gpu(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    folder = write_folder(tmp_path / "photos", 20)
    small = ("--images", folder, "--count", 64, "--model", "tiny:network", "--seconds", 0.1, "--batch-sizes", 4, 8)
    done = subprocess.run(
        [sys.executable, *map(str, (ROOT / "jobs" / "bench" / "gpu.py", *small, "--json", figures))],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("no GPU")
    record = json.loads(figures.read_text())
    assert record["machine"]["gpu"] is None
    measured = [each["part"] for each in record["figures"] if each["images_per_second"]]
    assert measured == ["network", "network", "readers", "readers", "job"]
    missing = {each["part"] for each in record["figures"] if each["why"] == NO_GPU}
    assert missing == {"network", "GPU decodes", "job"}
    (job,) = [each for each in record["figures"] if each["part"] == "job" and each["images_per_second"]]
    assert job["share"] == pytest.approx(job["images_per_second"] / job["limit"])
    for text in ("tiny:network, batches of 8, 64 images", "share of", "GPU: none", "no GPU", "job"):
        assert text in done.stdout
