"""The one-GPU benchmark: its parts, what follows from figures, and a whole one without a GPU. No speed is judged."""

import json
import os
import subprocess
import sys
import weakref
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pytest
from whole import ROOT, wait_for, write_folder

from jobs import bench_gpu
from jobs.bench import archives, embed_job, feed, gpu
from jobs.bench.feed import Feed
from jobs.bench.gpu_monitor import GpuMonitor, Sample
from jobs.bench.gpu_table import NO_GPU, Figure
from pipeline.config import RunConfig, Transform
from pipeline.errors import InputRefused
from pipeline.loader import Loader
from pipeline.sources.discover import Archive


def test_the_share_is_of_the_limit() -> None:
    assert Figure("run", "", 90.0, limit=100.0).share == 0.9
    assert Figure("run", "", None, NO_GPU, limit=100.0).share is None
    assert (Figure("run", "", None, NO_GPU).rate, Figure("run", "", 1234.56).rate) == ("no GPU", "1,234.6")
    assert Figure("run", "", 90.0, limit=100.0).as_json()["share"] == 0.9


def test_the_warm_up_of_a_pipeline_does_not_count() -> None:
    progress = gpu.Progress([100.0, 110.0, 111.0, 112.0, 113.0], [10, 10, 20, 30, 30])
    assert progress.window == (110.0, 113.0)
    assert progress.images_per_second == pytest.approx(80 / 3)
    assert gpu.Progress([100.0], [10]).images_per_second is None


def test_a_job_is_measured_from_its_first_commit_to_its_last(tmp_path: Path) -> None:
    (tmp_path / "_commits").mkdir()
    for number, (rows, time) in enumerate([(50, 1000), (30, 1002), (40, 1004)]):
        path = tmp_path / "_commits" / f"part-{number}.json"
        path.write_text(json.dumps({"rows": rows}))
        os.utime(path, (time, time))
    found = embed_job.steady(tmp_path)
    assert (found.images, found.start, found.stop, found.images_per_second) == (70, 1000, 1004, 17.5)
    assert embed_job.Steady(0, 5.0, 5.0).images_per_second is None


def test_the_rate_counts_every_thread_and_no_warm_up() -> None:
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        return 10

    assert gpu.rate(work, 0.05, 3) > 0
    assert len(calls) > 3 * gpu.WARM_UPS
    with pytest.raises(ZeroDivisionError):
        gpu.rate(lambda: 1 // 0, 0.05, 2)


def test_a_network_is_let_go_before_the_next_one_takes_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        def describe(self) -> str:
            return ""

    made: list[weakref.ref[Network]] = []

    def embedder(*_: object) -> Network:
        assert all(each() is None for each in made)
        network = Network()
        made.append(weakref.ref(network))
        return network

    monkeypatch.setattr(gpu, "embedder", embedder)
    monkeypatch.setattr(gpu, "predict_rate", lambda *_: 1.0)
    bench_gpu.GpuBenchmark(None, 1, "", [4, 8], 0.1, False, None, gpu="0")._network_alone()
    assert len(made) == 4


def test_idle_is_told_of_a_window() -> None:
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


def test_own_images_repeat(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "mine", 3)
    (tmp_path / "made").mkdir()
    archives.repeated_images(source).make(tmp_path / "made", 7)
    made = sorted((tmp_path / "made").iterdir())
    assert [path.read_bytes() for path in made] == [(source / f"{i % 3:04d}.jpg").read_bytes() for i in range(7)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match="holds no image"):
        archives.repeated_images(tmp_path / "empty").make(tmp_path / "made", 7)


def test_loader_processes_give_the_loaders_rows(tmp_path: Path) -> None:
    archive = Archive(RunConfig(input=str(write_folder(tmp_path / "photos", 21)), output="none"))
    loader = Loader(Transform(36, 32), archive.options(), {}, 10**6, True, False, False, 8, 1, leave_jpegs=True)
    found = Feed(loader, list(archive.shards()), 2)
    expected = pa.concat_tables(loader.load(found.shards[0], ((0, 21),)))
    before = set(feed.SHARED_MEMORY.glob("nightshift-*"))
    tables = list(found.tables())
    assert sorted(map(len, tables)) == sorted(len(table) for table in found.tables())
    rows = sorted(chain(*(table.to_pylist() for table in tables)), key=lambda row: row["row"])
    rows = [row for row in rows if row["image_id"]]
    assert len(rows) == 21
    for row, wanted in zip(rows, expected.to_pylist(), strict=False):
        assert (row["image_id"], row["row"], row["pixels"]) == (wanted["image_id"], wanted["row"], wanted["pixels"])
    assert sorted(found.images()) == [5, 8, 8]
    assert set(feed.SHARED_MEMORY.glob("nightshift-*")) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--count", "0"), "--count is 0"),
        (("--batch-sizes", "8", "0"), "--batch-sizes is 0"),
        (("--seconds", "0"), "--seconds is 0"),
        (("--images", "none"), "--images none is no folder"),
        (("--json", "none/figures.json"), "none/figures.json cannot be written"),
    ],
)
def test_bad_settings_end_in_a_sentence(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_gpu.main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--without-ray",)], ids=["with", "without"])
def test_a_whole_benchmark_without_a_gpu(flags: tuple[str, ...], tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    folder = write_folder(tmp_path / "photos", 20)
    script = tmp_path / "measured.py"  # a file: the loader processes import it anew
    script.write_text(
        "import sys\nfrom jobs import bench_gpu\n"
        "if __name__ == '__main__':\n"
        "    code = bench_gpu.main(sys.argv[1:])\n"
        "    print('Ray is here:', 'ray' in sys.modules, file=sys.stderr)\n"
        "    sys.exit(code)\n"
    )
    small = ("--images", folder, "--count", 64, "--model", "tiny:network", "--seconds", 0.1, "--batch-sizes", 4, 8)
    done = subprocess.run(
        [sys.executable, *map(str, (script, *small, *flags, "--json", figures))],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0].startswith("no GPU")
    assert done.stderr.splitlines()[-1] == "Ray is here: False", "it works in processes of its own, or not at all"
    record = json.loads(figures.read_text())
    assert record["machine"]["gpu"] is None
    measured = [each["what"] for each in record["figures"] if each["images_per_second"]]
    whole_runs = ["one process"] if flags else ["one process", "job with Ray"]
    assert measured == ["network", "network", "loaders", "loaders", *whole_runs]
    missing = {each["what"] for each in record["figures"] if each["why"] == NO_GPU}
    assert missing == {"network", "GPU decodes", *whole_runs}
    for each in record["figures"]:
        if each["what"] in whole_runs and each["images_per_second"]:
            assert each["share"] == pytest.approx(each["images_per_second"] / each["limit"])
    for said in ("tiny:network, batches of 8, 64 images", "share of", "GPU: none", "no GPU", *whole_runs):
        assert said in done.stdout
