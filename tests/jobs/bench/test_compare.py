"""The comparison with peers: its arithmetic, the measurement of commands, and whole small benchmarks."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from PIL import Image
from rich.console import Console
from whole import wait_for, write_folder

from jobs.bench import compare
from jobs.bench.harness import archives, chart, contest, measure, show
from jobs.bench.harness.archives import CASES, Archive, Case
from jobs.bench.harness.contest import CHECKOUT, OURS, PEERS, Result, Run, marginal_rate, startup_seconds, why_left_out
from jobs.bench.harness.measure import COMMAND, CommandFailed, Spent, spend
from jobs.bench.harness.programme import FORMS, NULL, Entry
from jobs.bench.harness.record import Outcome, title
from jobs.bench.harness.roofline import Networks, Roofline, Speed, largest_ratio
from pipeline.errors import InputRefused

ROOT = Path(__file__).resolve().parents[3]
BURN = "import time\nwhile time.process_time() < 1: pass\n"


def outcome(model: str = "resnet18", case: str = "photos") -> Outcome:
    """Ours: 100 images in 12, 10 and 14 s, 500 in 20 s; a peer at half the rate; a peer without a marginal rate."""
    ours = Result(100, 500, [Spent(s, 1, 4.0, 0.1) for s in (12, 10, 14)], [Spent(20, 3 << 20, 12.0, 0.1)] * 3, 8)
    slower = Result(100, 500, [Spent(10, 1, 4.0, 0.1)], [Spent(26, 1, 20.0, 0.1)])
    quick = Result(100, 500, [Spent(10, 1, 4.0, 0.1)], [Spent(9, 1, 4.0, 0.1)])
    stages = {"read": 0.001, "decode": 0.003, "predict": 0.012, "write": 0.002}
    speeds = {"eager": Speed(0.02, 100.0), "compiled": Speed(0.01, 200.0), "plain": Speed(0.04, 50.0)}
    networks = Networks("float32", 2_000_000_000, speeds)
    results = {OURS: ours, "dataloader": slower, "ray": quick}
    return Outcome(case, "made up", model, results, Roofline(stages, 2, networks=networks))


def test_the_marginal_rate_and_the_start_up() -> None:
    assert marginal_rate(100, 500, 12.0, 20.0) == 50.0
    assert startup_seconds(100, 12.0, 50.0) == 10.0
    assert marginal_rate(100, 500, 12.0, 12.0) is None
    assert startup_seconds(100, 12.0, None) is None


def test_figures_follow_from_the_runs() -> None:
    photos = outcome()
    assert photos.ours.small_seconds == 12, "the median"
    assert photos.ours.rate == 50.0
    assert photos.ours.core_seconds_per_image == pytest.approx(0.02)
    assert photos.times_faster("dataloader") == pytest.approx(2.0)
    assert photos.times_faster("ray") is None
    assert photos.roofline.ceiling == pytest.approx(125.0)
    assert photos.roofline.share(photos.ours.rate) == pytest.approx(0.4)
    assert photos.roofline.everything_else(0.02) == pytest.approx(0.002)
    assert Roofline(photos.roofline.stages, 2, gpus=1).share(50.0) is None


def test_a_network_against_the_peak_of_the_machine() -> None:
    networks = outcome().roofline.networks
    assert networks is not None
    assert networks.gflops("plain") == pytest.approx(100.0)
    assert largest_ratio(networks, {"float32": 500.0, "bfloat16": 900.0}) == pytest.approx(9.0)
    line = show.network_line(outcome(), networks, {"float32": 500.0})
    assert "eager, alone, it runs at 200 of the machine's 500 GFLOP/s (40%), 2.00 times the peers' form; at the" in line
    assert "at the machine's peak" not in show.network_line(outcome(), networks, {"float32": 150.0})


def test_compiled_images_and_roles_of_processes_are_counted() -> None:
    eager, compiled = "cpu, float32", "cpu, float32, compiled"
    result = Result(100, 500)
    small = Spent(10, 1, 4.0, 0.1, {"raylet": 1.0, "driver": 3.0})
    large = Spent(20, 1, 12.0, 0.1, {"raylet": 2.0, "driver": 4.0, "ray::write": 6.0})
    result.add(Run(small, 1, {eager: 100}), Run(large, 8, {eager: 200, compiled: 300}))
    assert result.compiled_share == pytest.approx(0.75)
    assert result.by_role == pytest.approx({"ray::write": 0.015, "raylet": 0.0025, "driver": 0.0025})
    assert next(iter(result.by_role)) == "ray::write"
    assert result.large_files == 8


def test_memory_and_cpu_cost_are_shown_for_all() -> None:
    photos = outcome(NULL)
    photos.ours.small[:] = [Spent(12, 2 << 20, 4.0, 0.1)]
    assert show.memory_line(photos).startswith("memory: +1 MiB (+50.0%) for 5 times the images; ")
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(show.cpu_table([photos, outcome("resnet18")]))
    lines = console.export_text().splitlines()
    assert any("Nightshift" in line and "20.00" in line for line in lines)
    assert any("PyTorch DataLoader" in line and "40.00" in line for line in lines)
    assert sum("photos" in line for line in lines) == 1, "the table is of null networks"


def test_the_agreement_is_shown() -> None:
    line = show.agreement_line({"images": 440, "same": 0.995, "in_doubt": 0.1})
    assert "for 99.5% of 440 images; it is in doubt about 10% of them" in line


def test_a_network_is_trained_for_real_networks_only() -> None:
    def trains(*arguments: str) -> bool:
        return compare.Benchmark.of(compare.parser().parse_args(["--cases", "photos", *arguments])).trains

    assert trains()
    assert not trains("--model", NULL)
    assert not trains("--form", "quick")


def test_a_form_has_its_entries() -> None:
    entries = FORMS["standard"].entries([], [], None, None)
    assert Entry("photos", "resnet18", 200, 1_000) in entries
    assert Entry("photos-s3", NULL, 500, 3_000) in entries
    assert {entry.case for form in FORMS.values() for entry in form.entries([], [], None, None)} == set(CASES)
    assert FORMS["standard"].entries(["large"], ["resnet50"], 7, 9) == [Entry("large", "resnet50", 7, 9)]


def test_a_command_is_all_of_its_processes() -> None:
    """One child is waited for, another is not. Each burns a second, the command itself none."""
    child = f"[sys.executable, '-c', {BURN!r}]"
    script = (
        f"import os, subprocess, sys, time\nleft = subprocess.Popen({child})\nsubprocess.run({child})\n"
        "os.waitid(os.P_PID, left.pid, os.WEXITED | os.WNOWAIT)\ntime.sleep(2)\n"
    )
    spent = spend([sys.executable, "-c", script])
    assert 1.7 < spent.core_seconds < 3.0
    assert spent.peak_memory_bytes > 5 << 20
    assert spent.seconds > 3
    assert sum(spent.by_role.values()) == pytest.approx(spent.core_seconds, abs=1.0)
    assert spent.by_role[COMMAND] < 0.5


def test_a_command_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "EXIT_SECONDS", 0.5)
    pid = tmp_path / "pid"
    script = (
        f"import subprocess, time\np = subprocess.Popen(['sleep', '600'])\nopen({str(pid)!r}, 'w').write(str(p.pid))\n"
    )
    spend([sys.executable, "-c", script + "time.sleep(2)"])
    left = int(pid.read_text())
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE


def test_a_failing_command_shows_the_end_of_its_output() -> None:
    with pytest.raises(CommandFailed, match=r"ended with 7$") as failed:
        spend([sys.executable, "-c", "print('x' * 9000); print('the disk is made of cheese'); raise SystemExit(7)"])
    assert failed.value.output.endswith("xxx\nthe disk is made of cheese")
    assert len(failed.value.output) <= measure.TAIL_CHARACTERS


def test_drawn_archives_match_their_descriptions() -> None:
    with archives.temporary(CASES["photos"], 4, 6) as (photos, _):
        sizes = [path.stat().st_size for path in photos.folder.iterdir()]
        assert len(sizes) == 4
        assert 90_000 < sum(sizes) / 4 < 130_000
        assert not photos.in_tars
    assert not photos.folder.exists()
    with archives.temporary(CASES["tiles"], 3, archives.TILES_PER_TAR + 1) as (tiles, more):
        assert tiles.in_tars
        assert len(list(more.folder.iterdir())) == 2
        with tarfile.open(next(tiles.folder.iterdir())) as tar:
            members = tar.getmembers()
            assert len({member.name for member in members}) == 3
            assert all(2_000 < member.size < 4_500 for member in members)
            assert Image.open(tar.extractfile(members[0])).size == (64, 64)
    with archives.temporary(CASES["one-tar"], 3, archives.TILES_PER_TAR + 1) as (_, more):
        assert len(list(more.folder.iterdir())) == 1
    data = archives.encoded_large(0)
    assert 3_000_000 < len(data) < 4_500_000


def test_your_own_images_are_links_in_the_order_of_their_names(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "mine" / "deep", 5).parent
    (source / "notes.txt").write_text("no image")
    images = archives.own(source)
    with archives.temporary(replace(CASES["photos"], images=images), 2, 5) as (small, large):
        assert [path.name for path in sorted(small.folder.iterdir())] == ["0000000.jpg", "0000001.jpg"]
        assert (large.folder / "0000004.jpg").read_bytes() == (source / "deep" / "0004.jpg").read_bytes()
    with (
        archives.temporary(replace(CASES["photo-tars"], images=images), 5) as (tars,),
        tarfile.open(tars.folder / "images-00000.tar") as tar,
    ):
        assert tar.getnames() == [f"{i:08d}.jpg" for i in range(5)]
    with pytest.raises(InputRefused, match="holds 5 images"), archives.temporary(Case(images, "loose"), 2, 6):
        pass


def test_another_checkout_runs_its_own_job(tmp_path: Path) -> None:
    archive = Archive(Path("/archive"), 3)
    name = f"{CHECKOUT}{tmp_path}"
    line = contest.command(name, "resnet18", archive, tmp_path / "output", None)
    assert line[:2] == [sys.executable, str(tmp_path / "jobs" / "embed.py")]
    assert line[2:] == contest.command(OURS, "resnet18", archive, tmp_path / "output", None)[2:]
    assert why_left_out(name, "resnet18") is None
    assert "null network" in str(why_left_out(name, NULL))
    assert title(name) == name


def test_peers_that_cannot_take_part_are_left_out() -> None:
    assert why_left_out("dataloader", "resnet18", in_tars=True) is None
    assert why_left_out("dataloader", NULL, on_s3=True) is None
    assert "ResNets" in str(why_left_out("ray", "tiny:network"))
    assert why_left_out("daft", "resnet18", in_tars=True), "no tars, or not installed"


@pytest.mark.parametrize(("gpus", "one"), [(None, "0"), ("", ""), ("3", "3"), ("GPU-5f,GPU-8a", "GPU-5f")])
def test_all_commands_have_the_same_gpu(gpus: str | None, one: str) -> None:
    environment = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    assert contest.one_gpu(environment) == {"CUDA_VISIBLE_DEVICES": one}


@pytest.mark.parametrize("name", [OURS, *PEERS])
def test_a_command_runs_on_one_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is checked; no command runs."""
    caught: list[Mapping[str, str]] = []

    def spend_nothing(line: Sequence[str], environment: Mapping[str, str], folder: Path | None) -> Spent:
        caught.append(environment)
        return Spent(1, 1, 1.0, 0.1)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(contest, "spend", spend_nothing)
    contest._run(name, NULL, Archive(tmp_path, 0), None)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in caught] == ["2"]


def test_peers_choose_their_batch_size_without_a_flag(tmp_path: Path) -> None:
    archive = Archive(tmp_path, 0)
    assert "--batch-size" not in contest.command("ray", NULL, archive, tmp_path, None)
    assert contest.command("ray", NULL, archive, tmp_path, 8)[-2:] == ["--batch-size", "8"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--cases", "photos,films"), "--cases is 'photos,films'"),
        (("--peers", "spark"), "--peers is 'spark'"),
        (("--small", "20", "--large", "20"), "--small is 20 and --large is 20"),
        (("--rounds", "0"), "--rounds is 0"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--images", "none"), "--images none is not a folder"),
        (("--json", "none/figures.json"), "none/figures.json cannot be written"),
    ],
)
def test_bad_settings_end_in_a_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_the_chart_is_a_png_for_any_number_of_panels(tmp_path: Path) -> None:
    for count in (1, 4):
        path = tmp_path / f"{count}.png"
        chart.draw([outcome(f"resnet{number}") for number in range(count)], "a machine", path)
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 900


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        pytest.param("tiles", NULL, marks=pytest.mark.slow),
        pytest.param("photos", "resnet18", marks=pytest.mark.long),
        pytest.param("photos-s3", NULL, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("peer", list(PEERS))
def test_each_peer_writes_one_row_per_image(peer: str, kind: str, model: str) -> None:
    with archives.temporary(CASES[kind], 6) as (archive,):
        if why := why_left_out(peer, model, archive.in_tars, archive.on_s3):
            pytest.skip(why)
        run = contest._run(peer, model, archive, 4)
    assert run.files >= 1
    assert run.spent.core_seconds > 0


@pytest.mark.slow
def test_a_peer_that_drops_images_is_refused() -> None:
    with (
        archives.temporary(CASES["photos"], 4) as (archive,),
        pytest.raises(CommandFailed, match="4 rows for 5 images"),
    ):
        contest._run("dataloader", NULL, replace(archive, images=5), 4)


def start_benchmark(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/support'}", **environment}
    command = [sys.executable, str(ROOT / "jobs" / "bench" / "compare.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    process = start_benchmark(*arguments)
    out, err = process.communicate(timeout=290)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.long
def test_a_whole_benchmark(tmp_path: Path) -> None:
    figures, bars = tmp_path / "figures.json", tmp_path / "bars.png"
    sizes = ("--form", "quick", "--small", 8, "--large", 24)
    done = run_benchmark(
        *("--cases", "photos", "--model", "tiny:network", "--peers", "daft"),
        *(*sizes, "--json", figures, "--chart", bars),
    )
    assert done.returncode == 0, done.stderr
    for text in ("marginal", "everything else", "roofline: ", "memory: ", "network: ", "fidelity: "):
        assert text in done.stdout
    assert "Daft is left out" in done.stdout
    record = json.loads(figures.read_text())
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["peak_gflops"]["float32"] > 0
    assert {"ray", "torch"} <= set(record["machine"]["versions"])
    (photos,) = record["outcomes"]
    assert (photos["case"], photos["model"]) == ("photos", "tiny:network")
    assert (photos["small_images"], photos["large_images"]) == (8, 24)
    assert photos["network"] is not None
    assert list(photos["roofline"]["core_seconds_per_image"]) == [
        *("read", "decode", "predict", "write", "everything_else")
    ]
    assert set(photos["contestants"]) == {OURS}
    ours = photos["contestants"][OURS]
    assert sum(ours["networks"]["large"].values()) == 24
    assert "raylet" in ours["core_seconds_per_image_by_role"]
    runs = ours["runs"]["small"] + ours["runs"]["large"]
    assert all(run["seconds"] > 0 and run["peak_memory_bytes"] > 0 for run in runs)
    assert [(each["case"], each["images"]) for each in record["fidelity"]] == [("photos", 8)]
    assert bars.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_a_benchmark_of_tars_with_a_peer(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    sizes = ("--form", "quick", "--small", 8, "--large", 24)
    done = run_benchmark("--cases", "tiles", "--model", NULL, "--peers", "dataloader", *sizes, "--json", figures)
    assert done.returncode == 0, done.stderr
    assert "CPU cost outside" in done.stdout
    record = json.loads(figures.read_text())
    assert record["fidelity"] == [], "tars hold no loose photos to compare"
    (tiles,) = record["outcomes"]
    assert tiles["network"] is None
    assert set(tiles["contestants"]) == {OURS, "dataloader"}
    assert tiles["roofline"]["core_seconds_per_image"]["read"] > 0


@pytest.mark.long
def test_a_failing_command_ends_the_benchmark_in_a_sentence(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", 4)
    done = run_benchmark("--images", folder, "--model", "resnet19", "--small", 2, "--large", 4)
    assert done.returncode == 1
    *_, output, sentence = done.stderr.splitlines()
    assert output.startswith("  nightshift: --model 'resnet19' is unknown")
    assert re.fullmatch(r"nightshift: python\S* \S+embed.py --input .* ended with 2", sentence)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_stopped_benchmark_leaves_no_process_and_no_archive(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mine", 4)
    settings = ("--images", folder, "--model", "tiny:network", "--small", 2, "--large", 4)
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:  # a short path: Ray puts sockets below it
        process = start_benchmark(*settings, TMPDIR=temporary)
        watched = psutil.Process(process.pid)
        wait_for(lambda: len(watched.children(recursive=True)) >= 3)  # the job has started Ray
        children = watched.children(recursive=True)
        process.terminate()
        process.communicate(timeout=100)
        assert process.returncode == 143
        assert not list(Path(temporary).glob("nightshift-*"))
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
