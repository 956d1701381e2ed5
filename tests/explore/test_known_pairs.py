"""After an `--update` only new images are compared; what a killed process has computed is not computed again."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from outputs import SETTINGS, write_output
from servers import S3Server

from pipeline import open_output
from pipeline.explore import duplicates as duplicate_module
from pipeline.explore import pairs as pair_module
from pipeline.explore import partitions as partition_module
from pipeline.explore.duplicates import duplicates
from pipeline.storage import access

TRAINED = {**SETTINGS, "weights": "sha256:0123456789abcdef"}
DIM, OLD, NEW = 24, 500, 120


def vectors_with_copies() -> np.ndarray:
    """OLD and NEW vectors. Copies: within the old ones, within the new ones, and of old ones among the new ones."""
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(OLD + NEW, DIM))
    for copy, original in ((100, 1), (101, 2), (OLD + 50, OLD + 1), (OLD + 60, 3), (OLD + 61, 1)):
        vectors[copy] = vectors[original] + 0.02 * rng.normal(size=DIM)
    return vectors.astype(np.float32)


def write(folder: Path | str, vectors: np.ndarray, first: int = 0, shard: int = 0) -> str:
    ids = [f"/photos/{first + number:05d}.jpg" for number in range(len(vectors))]
    return str(write_output(folder, ids, vectors, settings=TRAINED, rows_per_part=97, shard=shard))  # type: ignore[arg-type]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of each product of vectors."""
    calls: list[tuple[int, int]] = []
    plain = pair_module._similar

    def counted(a, b, *more):
        calls.append((len(a), len(b)))
        return plain(a, b, *more)

    monkeypatch.setattr(pair_module, "_similar", counted)
    return calls


@pytest.mark.parametrize("max_all_pairs", [100_000, 50])
def test_after_an_update_only_new_images_are_compared(
    tmp_path: Path, compared: list, monkeypatch: pytest.MonkeyPatch, max_all_pairs: int
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(partition_module, "CELL_ROWS", 60)
    monkeypatch.setattr(partition_module, "MAX_OTHER_CELLS", 20)
    vectors = vectors_with_copies()
    out = write(tmp_path / "out", vectors[:OLD])
    first = duplicates(open_output(out), max_all_pairs=max_all_pairs)
    assert first.groups == 2
    write(tmp_path / "out", vectors[OLD:], OLD, shard=1)
    compared.clear()
    second = duplicates(open_output(out), max_all_pairs=max_all_pairs)
    products = sum(a * b for a, b in compared)
    if max_all_pairs > OLD:
        assert products == NEW * NEW + NEW * OLD
    assert second.limit.value == first.limit.value
    assert f"{NEW} images are new since an earlier call" in second.how
    everything = duplicates(open_output(out), threshold=second.limit.value, anew=True, max_all_pairs=max_all_pairs)
    assert second.groups == 4
    assert second.table.to_pylist() == everything.table.to_pylist()
    compared.clear()
    third = duplicates(open_output(out), max_all_pairs=max_all_pairs)
    assert not compared
    assert third.table.to_pylist() == second.table.to_pylist()


def test_a_lower_threshold_compares_all_again(tmp_path: Path, compared: list) -> None:
    out = open_output(write(tmp_path / "out", vectors_with_copies()))
    low = duplicates(out, threshold=0.9)
    compared.clear()
    assert duplicates(out, threshold=0.9999).groups < low.groups
    assert duplicates(out, threshold=0.9).table.to_pylist() == low.table.to_pylist()
    assert not compared
    assert duplicates(out, threshold=0.5).groups > low.groups
    assert compared


def test_rows_that_are_gone_take_their_pairs_with_them(tmp_path: Path) -> None:
    """A part is replaced: its rows are new ones, and the pairs of others stay."""
    vectors = vectors_with_copies()
    out = write(tmp_path / "out", vectors[:OLD])
    write(tmp_path / "out", vectors[OLD:], OLD, shard=1)
    duplicates(open_output(out), threshold=0.95)
    commits = sorted(Path(out, "_commits").glob("*.json"))
    of_first = next(file for file in commits if json.loads(file.read_text())["ranges"].get("0", [[9]])[0][0] == 0)
    Path(out, json.loads(of_first.read_text())["part"]).unlink()
    of_first.unlink()
    output = open_output(out)
    kept = duplicates(output, threshold=0.95)
    assert "0 images are new since an earlier call" in kept.how
    assert kept.table.to_pylist() == duplicates(output, threshold=0.95, anew=True).table.to_pylist()
    assert kept.groups == 2


def test_damaged_records_are_not_used(tmp_path: Path, compared: list) -> None:
    out = open_output(write(tmp_path / "out", vectors_with_copies()))
    expected = duplicates(out, threshold=0.95).table.to_pylist()
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:50]), Path.unlink):
        (file,) = Path(out.uri, "_duplicates").glob("known-*.npz")
        damage(file)
        compared.clear()
        assert duplicates(out, threshold=0.95).table.to_pylist() == expected
        assert compared


def test_an_output_that_cannot_be_written_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(uri: str, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", uri)

    out = open_output(write(tmp_path / "out", vectors_with_copies()))
    expected = duplicates(out, threshold=0.95).table.to_pylist()
    monkeypatch.setattr(duplicate_module.known_pairs.access, "write", refuses)
    assert duplicates(out, threshold=0.95, anew=True).table.to_pylist() == expected


def test_a_killed_call_continues(tmp_path: Path) -> None:
    """The process is killed between two partitions. The next one has the same threshold, and computes only the rest."""
    pytest.importorskip("faiss")
    out = write(tmp_path / "out", vectors_with_copies())
    code = textwrap.dedent(
        f"""
        import os, sys
        from pipeline import open_output
        from pipeline.explore import partitions
        from pipeline.explore.duplicates import duplicates

        partitions.CELL_ROWS, partitions.MAX_OTHER_CELLS = 60, 20

        def show(what, done, total):
            print(what, done, total, flush=True)
            if what == "comparing partitions" and done == int(sys.argv[1]):
                sys.stdin.read(1)

        result = duplicates(open_output({out!r}), max_all_pairs=50, on_step=show)
        print(result.limit.value, result.groups)
        """
    )
    command = [sys.executable, "-c", code]
    stopped = subprocess.Popen([*command, "4"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert stopped.stdout
    while stopped.stdout.readline() != "comparing partitions 4 11\n":
        assert stopped.poll() is None
    os.kill(stopped.pid, signal.SIGKILL)
    stopped.communicate()
    assert len(list(Path(out, "_duplicates/work").glob("pairs-*"))) == 4
    again = subprocess.run([*command, "-1"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert again[0] == "comparing partitions 5 11"
    assert not list(Path(out, "_duplicates/work").glob("*"))
    fresh = duplicates(open_output(out), anew=True)
    value, groups = again[-1].split()
    assert float(value) == pytest.approx(fresh.limit.value, abs=1e-6)
    assert int(groups) == fresh.groups == 4


def test_the_books_of_an_output_in_a_bucket(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(partition_module, "CELL_ROWS", 150)
    vectors = vectors_with_copies()
    uri = "s3://archive/duplicates-out"
    write(uri, vectors[:OLD])
    local = duplicates(open_output(write(tmp_path / "out", vectors[:OLD])), threshold=0.95)
    first = duplicates(open_output(uri), threshold=0.95, max_all_pairs=50)
    assert first.table.to_pylist() == local.table.to_pylist()
    write(uri, vectors[OLD:], OLD, shard=1)
    second = duplicates(open_output(uri), threshold=0.95)
    assert f"{NEW} images are new since an earlier call" in second.how
    assert second.groups == 4
    names = [info.uri.rpartition("/")[2] for info in access.list_objects(f"{uri}/_duplicates")]
    assert sorted(name.partition("-")[0] for name in names) == ["known", "known.json"]
