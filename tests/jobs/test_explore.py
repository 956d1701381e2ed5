"""The jobs that read outputs: `map` and `export`, over a scene that a real job has labelled."""

import subprocess
import sys
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import scene_outputs
import scenes
from whole import ROOT, TINY, Jobs

from jobs import export as export_job
from jobs import map as map_job
from pipeline.output import ledger as ledgers

HIDE = "import sys; sys.modules[{module!r}] = None; from jobs import {job}; sys.exit({job}.main(sys.argv[1:]))"


@pytest.mark.slow
def test_a_scene_is_labelled_mapped_and_exported(jobs: Jobs, tmp_path: Path) -> None:
    array = scenes.numbers(3, 320, 230)
    array[:, :32, :96] = 0  # three windows are empty
    path = scenes.write(tmp_path / "in" / "a.tif", array, nodata=0)
    out = tmp_path / "out"
    jobs.run("classify", "--input", path.parent, "--output", out, *TINY, "--tile-size", 32)
    done = jobs.run("map", out, "--to", tmp_path / "map.tif", "--png", tmp_path / "map.png")
    assert "class of" in done.stdout
    assert "8 × 10 pixels, 96.2% with data" in done.stdout
    assert f"wrote {tmp_path / 'map.png'}" in done.stdout
    done = jobs.run("export", out, "--to", tmp_path / "w.parquet")
    assert "w.parquet: 77 rows" in done.stdout
    rows = geopandas.read_parquet(tmp_path / "w.parquet")
    parts = [info.uri for info in ledgers.parts(str(out))]
    assert sum(len(geopandas.read_parquet(uri)) for uri in parts) == len(rows) == 77
    with rasterio.open(tmp_path / "map.tif") as file:
        labels = file.read(1)
        for row in rows.to_crs(file.crs).itertuples():
            assert labels[file.index(row.geometry.centroid.x, row.geometry.centroid.y)] == row.label_id
            assert file.tags(1)[f"CLASS_{row.label_id}"] == row.label
        assert (labels == file.nodata).sum() == 3
        assert np.array_equal(np.argwhere(labels == file.nodata), [[0, 0], [0, 1], [0, 2]])


def test_refusals_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for job, flags in ((map_job, ["--to", "m.tif"]), (export_job, ["--to", "w.fgb"])):
        assert job.main([str(tmp_path), *flags]) == 2
        assert "is not an output of Nightshift" in capsys.readouterr().err
    assert map_job.main([str(tmp_path)]) == 2
    assert "give --to MAP.tif, --png PICTURE.png, or both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "module", "flags"),
    [
        ("map", "rasterio", ["--to", "m.tif"]),
        ("map", "sklearn", ["--to", "m.tif", "--show", "embedding"]),
        ("map", "matplotlib", ["--png", "m.png"]),
        ("export", "pyogrio", ["--to", "w.fgb"]),
        ("export", "geopandas", ["--to", "w.parquet"]),
    ],
)
def test_a_missing_extra_is_named(tmp_path: Path, job: str, module: str, flags: list[str]) -> None:
    scene = scenes.write(tmp_path / "a.tif", scenes.numbers(3, 32, 32))
    out = scene_outputs.write_output(tmp_path / "out", [scene], scenes.tiling(32), lambda _: scene_outputs.label(0))
    code = HIDE.format(module=module, job=job)
    done = subprocess.run(
        [sys.executable, "-c", code, str(out), *flags], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert f"nightshift {job} needs {module}: pip install 'nightshift[geo]'" in done.stderr
