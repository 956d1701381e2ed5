"""The demo: its output on the screen, its picture, a second run, an archive without errors, and Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_run import SmallRun, small_run

from jobs import demo, demo_archive, demo_picture, demo_scene

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import signal, sys, time

def leave(*_):
    time.sleep(1)  # the time that a report takes
    print("reported", flush=True)
    sys.exit(130)

signal.signal(signal.SIGINT, leave)
print("working", flush=True)
time.sleep(60)
"""
DEMO = """
import sys
from pathlib import Path
from jobs import demo

demo.JOBS = Path(sys.argv.pop())
sys.exit(demo.main())
"""


def test_an_output_without_errors_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for output in ("embeddings", "labels"):
        (tmp_path / output).mkdir()
    ids = pd.DataFrame({"image_id": ["a/1.jpg", "a/2.jpg"]})
    vectors = ids.assign(embedding=[[0.0, 1.0, 2.0, 3.0]] * 2)
    vectors.to_parquet(tmp_path / "embeddings" / "part.parquet")
    labels = ids.assign(width=4, height=3, cls=None, label="cat", score=0.5)
    labels.to_parquet(tmp_path / "labels" / "part.parquet")
    (tmp_path / "embeddings" / "_errors").mkdir()
    errors = pd.DataFrame({"error_type": pd.Series([], dtype=str)})
    errors.to_parquet(tmp_path / "embeddings" / "_errors" / "empty.parquet")
    demo.show(tmp_path)
    assert "one row each in _errors/:\nnone\n" in capsys.readouterr().out


@pytest.mark.parametrize("images", [1, 2, 25])
def test_a_picture_is_drawn_of_an_archive_of_any_size(tmp_path: Path, images: int) -> None:
    demo_archive.make_archive(tmp_path, images)
    tar = f"{tmp_path}/tars/tiles-0000.tar"
    rows = [(f"{tar}#{name}", tar, name) for name in members(tmp_path)]
    rows += [(str(path), str(path), None) for path in (tmp_path / "loose").rglob("*.*")]
    assert len(rows) == images
    vectors = np.random.default_rng(0).random((images, 8), np.float32)
    embeddings = pd.DataFrame(rows, columns=["image_id", "source", "member"]).assign(embedding=list(vectors))
    demo_picture.draw(embeddings, tmp_path / "embeddings.png")
    assert Image.open(tmp_path / "embeddings.png").size == (900, 420)


def members(folder: Path) -> list[str]:
    """The images of the archive's first tar, if it has one."""
    path = folder / "tars" / "tiles-0000.tar"
    if not path.exists():
        return []
    with tarfile.open(path) as tar:
        return [name for name in tar.getnames() if name.endswith(".jpg")]


def test_principal_components_are_the_directions_of_the_largest_spread() -> None:
    rng = np.random.default_rng(0)
    vectors = np.zeros((200, 5))
    vectors[:, 0] = 10
    vectors[:, 3] = rng.normal(0, 1.0, 200)
    vectors[:, 1] = rng.normal(0, 0.1, 200)
    points = demo_picture.principal_components(vectors)
    assert abs(np.corrcoef(points[:, 0], vectors[:, 3])[0, 1]) > 0.99
    assert abs(np.corrcoef(points[:, 1], vectors[:, 1])[0, 1]) > 0.9


def test_ctrl_c_waits_for_the_job_and_ends_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "demo_archive.py").write_text(JOB)
    command = [sys.executable, "-c", DEMO, str(tmp_path / "out"), str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    while process.stdout.readline() != "working\n":
        assert process.poll() is None, process.stderr and process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it, to the demo and to its job
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "reported\n")
    assert err.endswith("ended with 130\n")
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return small_run(tmp_path_factory)


@pytest.mark.slow
def test_it_shows_rows_errors_and_four_commands(run: SmallRun) -> None:
    for printed in (run.first, run.again):
        assert printed.count("whole: every planned image is exactly one row") == 4
        assert "truncated" in printed
        assert printed.count("hold-out accuracy of the head: ") == 2
        assert len(printed.partition("\nnext:\n")[2].splitlines()) == 4
    assert "demo_archive.py" in run.first
    assert "demo_archive.py" not in run.again


@pytest.mark.slow
def test_it_draws_the_embeddings(run: SmallRun) -> None:
    picture = run.folder / "embeddings.png"
    assert f"picture of the embeddings: {picture}" in run.first
    assert Image.open(picture).size == Image.open(ROOT / "notebooks" / "demo.png").size


@pytest.mark.slow
def test_it_has_nothing_to_do_the_second_time(run: SmallRun) -> None:
    for output in ("embeddings", "labels", "scene/windows", "scene/land-cover"):
        attempts = [path.name for path in (run.folder / output / "_attempts").iterdir()]
        assert attempts == ["1.json"], "the second run started no attempt"


@pytest.mark.slow
def test_it_maps_the_scene(run: SmallRun) -> None:
    found = re.search(r"Of the pixels outside of these\n([\d.]+)% have the class that was drawn", run.again)
    assert found
    assert float(found[1]) > 85
    assert f"picture of the map: {run.folder}/scene/map.png" in run.again
    assert Image.open(run.folder / "scene" / "map.png").size[0] > 1000
    labels = pd.read_csv(run.folder / "scene" / "labels.csv")
    assert set(labels["label"].value_counts()) == {10}


def test_a_scene_has_areas_of_every_kind_and_a_place(tmp_path: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    demo_scene.write_scene(tmp_path / "scene.tif", tmp_path / "truth.tif")
    with rasterio.open(tmp_path / "scene.tif") as file, rasterio.open(tmp_path / "truth.tif") as truth:
        pixels, areas = file.read().transpose(1, 2, 0), truth.read(1)
        assert (file.width, file.height) == (truth.width, truth.height) == demo_scene.SIZE
        assert str(file.crs) == str(truth.crs) == demo_scene.CRS
        assert file.transform == truth.transform
    mean = {kind: pixels[areas == number].mean(axis=0) for number, kind in enumerate(demo_archive.KINDS)}
    assert mean["water"].argmax() == 2, "blue"
    assert mean["forest"].argmax() == 1, "green"
    shares = np.bincount(areas.ravel(), minlength=len(demo_archive.KINDS)) / areas.size
    assert (shares > 0.05).all()
