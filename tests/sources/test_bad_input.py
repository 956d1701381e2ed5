"""The corpus of bad input: each case gives the expected rows, alone and in a whole job."""

import os
import subprocess
import sys
from pathlib import Path

import images
import pandas as pd
import pyarrow as pa
import pytest
from corpus import MAX_PIXELS, OK, Case, cases, write
from servers import ROOT
from whole import TINY, Jobs

from pipeline import schema
from pipeline.config import RunConfig
from pipeline.coverage import END, Ranges
from pipeline.errors import InputRefused
from pipeline.images.transform import Transform
from pipeline.output.verify import verify
from pipeline.planning.archive import Archive
from pipeline.sources.base import ReadOptions
from pipeline.sources.shard import Shard
from pipeline.stages.load import Loader

ALL: Ranges = ((0, END),)
UNREADABLE = "cannot be read as Parquet"
"""A Parquet file with this planning error is refused if it is the only input; among others it is an error row."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("corpus"))


def plan(path: Path, case: Case) -> tuple[list[Shard], dict[str, pa.DataType]]:
    """The shards of a file. A refused file is a shard as well, since a file may change after it was planned."""
    archive = Archive(RunConfig(input=str(path), output="/none", keep=case.keep))
    if not case.refused:
        return list(archive.shards()), archive.keep_types
    with pytest.raises(InputRefused) as caught:
        list(archive.shards())
    assert case.refused in str(caught.value)
    return [Shard(0, "parquet", str(path))] if case.rows else [], {}


def load(shard: Shard, todo: Ranges = ALL, keep_types: dict[str, pa.DataType] | None = None) -> pa.Table:
    keep = {name: (name, type_) for name, type_ in (keep_types or {}).items()}
    loader = Loader(
        Transform(resize=36, crop=32), ReadOptions(tuple(keep)), keep, MAX_PIXELS, True, False, False, 64, 2
    )
    return pa.concat_tables(loader.load(shard, todo))


def outcomes(table: pa.Table) -> tuple[str, ...]:
    """OK or "<stage> <error_type>" of each row, without the row that ends the shard."""
    rows = zip(table["stage"].to_pylist()[:-1], table["error_type"].to_pylist()[:-1], strict=True)
    return tuple(f"{stage} {error_type}" if stage else OK for stage, error_type in rows)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_case_gives_its_rows(case: Case, corpus: dict[str, Path]) -> None:
    shards, keep_types = plan(corpus[case.name], case)
    rows: tuple[str, ...] = ()
    for shard in shards:
        table = load(shard, ALL, keep_types)
        total = len(table) - 1
        assert table["row"].to_pylist() == [*range(total), total]
        assert table[schema.SHARD_ROWS].to_pylist() == [None] * total + [total]
        assert table[schema.PIXELS].is_valid().to_pylist()[:-1] == [outcome == OK for outcome in outcomes(table)]
        assert len(set(table["image_id"].to_pylist())) == total + 1
        assert all(len(message) > 5 for message in table["message"].drop_null().to_pylist())
        if case.size:
            assert (table["width"][0].as_py(), table["height"][0].as_py()) == case.size
        half = load(shard, ((total // 2, END),), keep_types)
        assert outcomes(half) == outcomes(table)[total // 2 :], "the same rows from any first row"
        assert half["image_id"].to_pylist() == table["image_id"].to_pylist()[total // 2 :]
        rows += outcomes(table)
    assert rows == case.rows


def test_pipes_and_files_that_are_too_large_are_errors(tmp_path: Path) -> None:
    """A pipe would block for ever, and 5 GiB would be read into memory."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(images.encode(images.tile(), "PNG"))
    (folder / "dangling.png").symlink_to("none.png")
    (folder / "huge.png").touch()
    os.truncate(folder / "huge.png", 5 << 30)
    os.mkfifo(folder / "pipe.png")
    (shard,) = Archive(RunConfig(input=str(folder), output="/none")).shards()
    assert shard.payload.keys == ("a.png", "huge.png", "pipe.png")
    assert outcomes(load(shard)) == (OK, "read too_large", "read unreadable")


_opened: list[str] = []


def _remember(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open":
        _opened.append(str(arguments[0]))
    elif event in (
        "os.mkdir",
        "os.rename",
        "os.remove",
        "os.symlink",
        "os.link",
        "os.chmod",
        "os.utime",
        "shutil.move",
    ):
        _opened.append(f"{event} {arguments}")


def test_archives_touch_no_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any names and links of members, only the archive is opened, and no file is created or changed."""
    paths = write(tmp_path / "corpus")
    (tmp_path / "work" / "inner").mkdir(parents=True)
    for name in ("outside.png", "up.png", "work/b.png", "work/inner/a.png", "work/soft.png"):
        (tmp_path / name).write_bytes(b"tripwire")
    monkeypatch.chdir(tmp_path / "work" / "inner")
    archives = [case for case in cases() if case.folder in ("archive/tars", "archive/zips") and not case.keep]
    shards = [plan(paths[case.name], case)[0][0] for case in archives]
    for shard in shards:  # imports the modules that Python imports late
        load(shard)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    sys.addaudithook(_remember)
    for shard in shards:
        _opened.clear()
        load(shard)
        assert set(_opened) == {shard.uri}
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_bombs_use_little_memory_and_time() -> None:
    """All bombs in one process use less than 48 MiB and a few seconds; one alone could use gigabytes or hours."""
    code = """
import resource, sys, tempfile
from corpus import MAX_PIXELS, cases
from pipeline.images.transform import Transform
from pipeline.images.decode import decode
from pipeline.errors import DecodeError
from pipeline.sources import ReadOptions, read
from pipeline.sources.shard import Shard
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
chosen = [case for case in cases() if "bomb" in case.name or "petabyte" in case.name or "terabyte" in case.name]
before = peak()
for case in chosen:
    if "images" in case.folder:
        try:
            decode(case.data, Transform(), max_pixels=MAX_PIXELS)
        except DecodeError:
            pass
        continue
    with tempfile.NamedTemporaryFile(suffix=case.name) as file:
        file.write(case.data)
        file.flush()
        kind = "tar" if ".tar" in case.name else "zip"
        for item in read(Shard(0, kind, file.name), ((0, 9),), ReadOptions()):
            pass
print(len(chosen), peak() - before)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    count, growth_mib = map(int, done.stdout.split())
    assert count >= 15
    assert growth_mib < 48


@pytest.mark.slow
def test_the_whole_corpus_in_one_job(jobs: Jobs, tmp_path: Path) -> None:
    paths = write(tmp_path / "in")
    for case in cases():
        if case.refused and UNREADABLE not in case.refused:
            paths.pop(case.name).unlink()
    lists = [path for name, path in paths.items() if path.parent.name == "lists"]
    out = tmp_path / "out"
    settings = ("--max-pixels", MAX_PIXELS, "--max-error-rate", 1)
    jobs.run("embed", "--input", tmp_path / "in" / "archive", *lists, "--output", out, *TINY, *settings)
    assert verify(str(out)).is_whole, list(verify(str(out)).lines())
    expected: dict[str, str] = {}
    for case in cases():
        if case.name in paths:
            ids = [i for shard in plan(paths[case.name], case)[0] for i in load(shard)["image_id"].to_pylist()[:-1]]
            expected |= zip(ids, case.rows, strict=True)
    errors = pd.read_parquet(out / "_errors")
    rows = dict(zip(errors["image_id"], errors["stage"] + " " + errors["error_type"], strict=True))
    rows |= dict.fromkeys(pd.read_parquet(out)["image_id"], OK)
    assert rows == expected
