"""Exports of vectors: every chosen row once and in order, in files that other programs read, and never half a file."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outputs import write_output

from pipeline.errors import InputRefused, OutputRefused, SettingRefused
from pipeline.explore import vector_files
from pipeline.explore.export import export

ROOT = Path(__file__).resolve().parents[2]
ROWS, DIM = 60, 8
VECTORS = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
IDS = [f'/photos/{row:03d}, "a".jpg' for row in range(ROWS)]
KEPT = {"label": [["cat", "dog", None][row % 3] for row in range(ROWS)]}
SUFFIXES = [".npy", ".faiss", ".lance", ".webdataset", ".csv", ".parquet"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_output(tmp_path_factory.mktemp("vectors") / "out", IDS, VECTORS, kept=KEPT, errors=["/bad.jpg"]))


def need(suffix: str) -> None:
    if suffix == ".lance":
        pytest.importorskip("lance", reason="pip install pylance, which has 200 MB")


def read(path: Path) -> tuple[list[str], np.ndarray]:
    """image_ids and vectors of an export."""
    ids = path.with_name(f"{path.name}.ids.parquet")
    match path.suffix:
        case ".npy":
            return pq.read_table(ids)["image_id"].to_pylist(), np.load(path)
        case ".faiss":
            index = faiss.read_index(str(path))
            return pq.read_table(ids)["image_id"].to_pylist(), index.reconstruct_n(0, index.ntotal)
        case ".lance":
            import lance

            table = lance.dataset(str(path)).to_table()
        case ".parquet":
            table = pq.read_table(path)
        case ".csv":
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            return [row["image_id"] for row in rows], np.array(
                [json.loads(row["embedding"]) for row in rows], np.float32
            )
        case ".webdataset":
            return read_tars(path)
    return table["image_id"].to_pylist(), np.stack(table["embedding"].to_pylist()).astype(np.float32)


def read_tars(folder: Path) -> tuple[list[str], np.ndarray]:
    ids, vectors = [], []
    for path in sorted(folder.iterdir()):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file
                if member.name.endswith(".json"):
                    ids.append(json.load(file)["image_id"])
                else:
                    vectors.append(np.load(io.BytesIO(file.read())))
    return ids, np.stack(vectors)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_row_once_and_in_order(output: str, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(suffix)
    monkeypatch.setattr(vector_files, "TAR_ROWS", 25)
    to = tmp_path / f"v{suffix}"
    made = export(output, to, vectors=suffix in (".csv", ".parquet"))
    assert made.rows == ROWS
    ids, vectors = read(to)
    assert ids == IDS
    expected = VECTORS
    if suffix == ".faiss":
        expected = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, rtol=1e-6 if suffix == ".faiss" else 0)
    beside = {f"v{suffix}.ids.parquet"} if suffix in (".npy", ".faiss") else set()
    assert {path.name for path in tmp_path.iterdir()} == {f"v{suffix}", *beside}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_chosen_rows(output: str, tmp_path: Path, suffix: str) -> None:
    need(suffix)
    dropped = pa.table({"image_id": IDS[:10], "keep": [False] * 10})
    pq.write_table(dropped, tmp_path / "duplicates.parquet")
    to = tmp_path / f"v{suffix}"
    made = export(
        output, to, vectors=suffix in (".csv", ".parquet"), where="label = 'cat'",
        exclude=str(tmp_path / "duplicates.parquet"),
    )  # fmt: skip
    chosen = [row for row in range(10, ROWS) if row % 3 == 0]
    ids, vectors = read(to)
    assert (made.rows, ids) == (len(chosen), [IDS[row] for row in chosen])
    assert vectors.shape == (len(chosen), DIM)


def test_columns_of_each_format(output: str, tmp_path: Path) -> None:
    export(output, tmp_path / "a.npy", ["label"])
    assert pq.read_schema(tmp_path / "a.npy.ids.parquet").names == ["image_id", "label"]
    export(output, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        header = next(csv.reader(file))
    assert header == ["image_id", "source", "member", "shard", "row", "width", "height", "label"]
    export(output, tmp_path / "a.parquet", ["image_id"], vectors=True)
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert file.schema_arrow.names == ["image_id", "embedding"]
    assert str(file.schema_arrow.field("embedding").type) == "fixed_size_list<element: float not null>[8]"
    assert file.metadata.row_group(0).column(1).has_offset_index


def test_nulls_and_float16_in_text(tmp_path: Path) -> None:
    out = write_output(tmp_path / "out", IDS[:3], VECTORS[:3], kept={"label": ["x", None, ""]}, dtype=pa.float16())
    export(str(out), tmp_path / "v.csv", ["label"], vectors=True)
    with (tmp_path / "v.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = np.array([json.loads(row["embedding"]) for row in rows], np.float16)
    np.testing.assert_array_equal(found, VECTORS[:3].astype(np.float16))
    export(str(out), tmp_path / "v.npy")
    assert np.load(tmp_path / "v.npy").dtype == np.float16


@pytest.mark.slow
def test_webdataset_opens_it(output: str, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="pip install webdataset")
    export(output, tmp_path / "v.webdataset", ["image_id", "label"])
    rows = list(webdataset.WebDataset(str(tmp_path / "v.webdataset" / "000000.tar"), shardshuffle=False).decode())
    assert [row["json"]["image_id"] for row in rows] == IDS
    np.testing.assert_array_equal(np.stack([row["npy"] for row in rows]), VECTORS)


def test_principal_components(tmp_path: Path) -> None:
    """Vectors in a subspace of three dimensions lose nothing in three components."""
    rng = np.random.default_rng(1)
    vectors = (rng.standard_normal((ROWS, 3)) @ rng.standard_normal((3, DIM))).astype(np.float32)
    out = str(write_output(tmp_path / "out", IDS, vectors))
    made = export(out, tmp_path / "small.parquet", pca=3)
    assert (
        "3 of 8 components, which keep 100.0% of the squared lengths; beside it small.parquet.pca.npy"
        in made.describe()
    )
    table = pq.read_table(tmp_path / "small.parquet")
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float not null>[3]"
    small, basis = np.stack(table["embedding"].to_pylist()), np.load(tmp_path / "small.parquet.pca.npy")
    np.testing.assert_allclose(vectors @ basis, small, atol=1e-5)
    np.testing.assert_allclose(small @ small.T, vectors @ vectors.T, atol=1e-4)
    export(out, tmp_path / "small.npy", pca=3)
    assert np.load(tmp_path / "small.npy").shape == (ROWS, 3)


def test_refused(output: str, tmp_path: Path) -> None:
    with pytest.raises(SettingRefused, match="--pca is 8: it must be at least 1 and less than 8"):
        export(output, tmp_path / "v.npy", pca=8)
    with pytest.raises(InputRefused, match=r"--pca is 7: .* has 4 rows to compute components from"):
        export(output, tmp_path / "v.npy", pca=7, where="row < 4")
    with pytest.raises(SettingRefused, match=r"--vectors is for files of vectors: write to \.parquet"):
        export(output, tmp_path / "v.fgb", vectors=True)
    with pytest.raises(SettingRefused, match="--sort is for GeoParquet, and the output has no footprints"):
        export(output, tmp_path / "v.parquet", sort="hilbert")
    with pytest.raises(OutputRefused, match="has no row that --where, --bbox and --exclude choose"):
        export(output, tmp_path / "v.npy", where="row > 1000")
    with pytest.raises(OutputRefused, match="has no column colour"):
        export(output, tmp_path / "v.csv", ["colour"])
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.explore.vector_files.find_spec", lambda name: None)
    with pytest.raises(SettingRefused, match="needs lance: pip install pylance"):
        export(output, tmp_path / "v.lance")


def test_an_export_is_replaced_only_when_told_to(output: str, tmp_path: Path) -> None:
    to = tmp_path / "v.npy"
    export(output, to, pca=2)
    with pytest.raises(SettingRefused, match="exists; choose another name or add --overwrite"):
        export(output, to)
    export(output, to, overwrite=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"v.npy", "v.npy.ids.parquet"}, "the components were those of the earlier export"
    to.unlink()
    with pytest.raises(SettingRefused, match=r"v\.npy\.ids\.parquet exists, which belongs to it"):
        export(output, to)
    folder = tmp_path / "v.webdataset"
    export(output, folder)
    with pytest.raises(SettingRefused, match="is a folder"):
        export(output, folder)
    export(output, folder, where="row < 2", overwrite=True)
    assert len(read(folder)[0]) == 2
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(SettingRefused, match="is a folder"):
        export(output, folder, overwrite=True)


@pytest.mark.parametrize("suffix", [".npy", ".faiss", ".webdataset"])
def test_a_broken_part_ends_the_export(output: str, tmp_path: Path, suffix: str) -> None:
    out = write_output(tmp_path / "out", IDS, VECTORS)
    last = sorted((out / "results").iterdir())[-1]
    last.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(OutputRefused, match="cannot be read"):
        export(str(out), tmp_path / f"v{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


WIDE, MANY = 512, 60_000
MEMORY = """
import re, sys
from pathlib import Path
from pipeline.explore import table
from pipeline.explore.export import export
import faiss

table.THREADS = 1  # row groups are read ahead: 200 MB in all, however many there are

def peak_kilobytes():  # ru_maxrss begins with that of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

start = peak_kilobytes()
export(sys.argv[1], Path(sys.argv[2]), vectors=sys.argv[2].endswith(".csv"))
print((peak_kilobytes() - start) >> 10)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 MB of vectors in parts of 6 MB."""
    from jobs.bench.harness import vector_output

    folder = tmp_path_factory.mktemp("large") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vector_output, "ROWS_PER_PART", 3000)
        vector_output.write(folder, MANY, WIDE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".npy", ".faiss", pytest.param(".webdataset", marks=pytest.mark.long)])
def test_memory_does_not_grow_with_the_output(large: Path, tmp_path: Path, suffix: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(large), str(tmp_path / f"v{suffix}")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 160, f"{done.stdout} MB; one part needs 80, and all vectors have 120"


@pytest.mark.slow
def test_a_killed_export_leaves_no_file_of_its_name(large: Path, tmp_path: Path) -> None:
    to = tmp_path / "v.webdataset"
    process = subprocess.Popen([sys.executable, "jobs/export.py", str(large), "--to", str(to)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".v.webdataset-*/v.webdataset/000001.tar")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not to.exists()
    assert export(str(large), to, ["image_id"], where="row < 5").rows == 5
