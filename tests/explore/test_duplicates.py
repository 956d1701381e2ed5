"""Near-duplicates: groups, what is kept, the computed threshold, and partitions against all pairs."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outputs import SETTINGS, write_output

from jobs import duplicates as job
from pipeline import open_output
from pipeline.errors import InputRefused, OutputRefused, SettingRefused
from pipeline.explore import pairs as pair_module
from pipeline.explore import partitions as partition_module
from pipeline.explore.duplicates import duplicates
from pipeline.explore.groups import Duplicates
from pipeline.explore.pairs import Pairs, pairs_within, read_all
from pipeline.explore.partitions import pairs_by_partitions
from pipeline.explore.table import Output

TRAINED = {**SETTINGS, "weights": "sha256:0123456789abcdef"}
DIM = 24


def with_copies(rows: int, copies: int, dim: int = DIM, noise: float = 0.03, seed: int = 0) -> tuple[np.ndarray, set]:
    """Clustered vectors, of which the first `copies` have a noisy copy at the end. The pairs of positions."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, dim))
    base = centres[rng.integers(12, size=rows)] + 0.7 * rng.normal(size=(rows, dim))
    scale = np.linalg.norm(base[:copies], axis=1, keepdims=True) / np.sqrt(dim)
    again = base[:copies] + noise * scale * rng.normal(size=(copies, dim))
    return np.concatenate([base, again]).astype(np.float32), {(i, rows + i) for i in range(copies)}


def write(folder: Path, vectors: np.ndarray, **more: object) -> Output:
    ids = [f"/photos/{number:05d}.jpg" for number in range(len(vectors))]
    return open_output(str(write_output(folder, ids, vectors, settings=TRAINED, rows_per_part=97, **more)))  # type: ignore[arg-type]


def found_pairs(result: Duplicates) -> set[tuple[int, int]]:
    groups: dict[int, list[int]] = {}
    for row in result.table.to_pylist():
        groups.setdefault(row["group"], []).append(int(row["image_id"][-9:-4]))
    return {tuple(sorted(members)) for members in groups.values()}  # type: ignore[misc]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Output, set]:
    vectors, pairs = with_copies(600, 60)
    return write(tmp_path_factory.mktemp("planted") / "out", vectors), pairs


def test_planted_copies_are_found_without_a_threshold(planted: tuple[Output, set]) -> None:
    output, expected = planted
    result = duplicates(output)
    found = found_pairs(result)
    right = len(found & expected)
    assert 2 * right / (len(found) + len(expected)) >= 0.97
    assert 0.9 < result.limit.value < 1
    *_, least = result.describe().splitlines()
    assert "images per image are that similar by chance" in result.describe()
    assert least.startswith("the least similar: ")
    assert least.count(" and ") == 3
    assert f"({min(result.table['similarity'].to_pylist()):.3f}), " in least
    record = json.loads(result.table.schema.metadata[b"nightshift"])
    assert record["threshold"] == result.limit.value


def test_a_smaller_rate_gives_a_larger_threshold(planted: tuple[Output, set]) -> None:
    output, _ = planted
    values = [duplicates(output, false_rate=rate).limit.value for rate in (0.1, 0.01, 0.001)]
    assert values == sorted(values)
    assert len(set(values)) == 3


def test_partitions_find_what_all_pairs_find(planted: tuple[Output, set], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(partition_module, "CELL_ROWS", 40)
    monkeypatch.setattr(partition_module, "MAX_OTHER_CELLS", 20)
    output, _ = planted
    for threshold in (0.99, 0.9):
        everywhere = duplicates(output, threshold=threshold, anew=True)
        by_cell = duplicates(output, threshold=threshold, max_all_pairs=100, anew=True)
        assert "17 overlapping partitions" in by_cell.how
        assert by_cell.table.equals(everywhere.table)
    assert not list(Path(output.uri).glob("_duplicates/work/*"))


def test_a_stopped_search_continues(
    planted: tuple[Output, set], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(partition_module, "CELL_ROWS", 100)
    output, _ = planted
    work = str(tmp_path / "work")

    def stops(function, numbers):
        for number in list(numbers)[:3]:
            yield function(number)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pairs_by_partitions(output, 0.95, frozenset(), work, "key", run_all=stops)
    computed: list[int] = []

    def counts(function, numbers):
        for number in numbers:
            computed.append(number)
            yield function(number)

    pairs, _ = pairs_by_partitions(output, 0.95, frozenset(), work, "key", run_all=counts)
    assert computed == list(range(3, 7))
    everywhere = Pairs.joined(pairs_within(*read_all(output), 0.95))
    assert pairs.first.tolist() == everywhere.first.tolist()
    again, _ = pairs_by_partitions(output, 0.9997, frozenset(), work, "another key")
    assert len(again) < len(pairs)


def test_what_is_kept(tmp_path: Path) -> None:
    base = np.eye(4, DIM, dtype=np.float32)
    vectors = np.concatenate([base, base[:2], base[:1]])
    kept = {"date": ["2020", "2024", None, "x", "2021", "2020", "2022"]}
    output = write(tmp_path / "out", vectors, kept=kept)
    first = duplicates(output, threshold=0.99).table.to_pylist()
    assert [(row["group"], int(row["image_id"][-9:-4]), row["keep"]) for row in first] == [
        (0, 0, True), (0, 4, False), (0, 6, False), (1, 1, True), (1, 5, False),
    ]  # fmt: skip
    assert all(row["similarity"] == 1.0 for row in first)
    newest = duplicates(output, threshold=0.99, keep="column:date").table.to_pylist()
    assert [int(row["image_id"][-9:-4]) for row in newest if row["keep"]] == [1, 6]
    assert duplicates(output, threshold=0.99, keep="largest").groups == 2


def test_the_highest_value_of_a_column_of_texts(tmp_path: Path) -> None:
    """The columns of a CSV are text. Numbers in them are compared as numbers."""
    vectors = np.concatenate([np.eye(1, DIM, dtype=np.float32)] * 3)
    for name, values, best in [
        ("n", ["9", "10", ""], 1),
        ("f", ["9.5", "10", "1e2"], 2),
        ("word", ["9", "10", "x"], 2),
    ]:
        output = write(tmp_path / name, vectors, kept={name: values})
        rows = duplicates(output, threshold=0.99, keep=f"column:{name}").table.to_pylist()
        assert [int(row["image_id"][-9:-4]) for row in rows if row["keep"]] == [best]


def test_no_chain_joins_images_that_differ(tmp_path: Path) -> None:
    """A row of vectors, each similar to the next: the ends are not, so they are in different groups."""
    angles = np.arange(6) * 0.2
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    table = duplicates(write(tmp_path / "out", vectors), threshold=float(np.cos(0.21))).table
    assert table["similarity"].to_numpy().min() >= np.float32(np.cos(0.21))
    assert len(set(table["group"].to_pylist())) == 3


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    vectors = np.eye(5, DIM, dtype=np.float32)
    output = write(tmp_path / "out", vectors)
    with pytest.raises(InputRefused, match="has 5 rows: a threshold can be computed from 128 or more"):
        duplicates(output)
    for threshold in (0.0, 1.5):
        with pytest.raises(SettingRefused, match="it must be a cosine"):
            duplicates(output, threshold=threshold)
    with pytest.raises(SettingRefused, match="--keep is 'best': it must be first, largest or column:NAME"):
        duplicates(output, threshold=0.9, keep="best")
    with pytest.raises(OutputRefused, match="has no column date"):
        duplicates(output, threshold=0.9, keep="column:date")
    random = write_output(tmp_path / "random", ["/a", "/b"], vectors[:2])
    with pytest.raises(InputRefused, match="has vectors of random weights"):
        duplicates(open_output(str(random)), threshold=0.9)


def test_too_many_pairs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_module, "MAX_PAIRS", 10)
    output = write(tmp_path / "out", np.ones((30, DIM), np.float32))
    with pytest.raises(SettingRefused, match="more than 10 pairs are that similar"):
        duplicates(output, threshold=0.9)


def test_no_duplicates_is_an_empty_table(tmp_path: Path) -> None:
    result = duplicates(write(tmp_path / "out", np.eye(5, DIM, dtype=np.float32)), threshold=0.9)
    assert len(result.table) == 0
    assert result.groups == 0


def test_the_command(planted: tuple[Output, set], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output, expected = planted
    to = tmp_path / "duplicates.parquet"
    assert job.main([output.uri, "--to", str(to), "--keep", "largest"]) == 0
    shown = capsys.readouterr().out
    assert f"wrote {to}" in shown
    assert "groups with" in shown
    assert pq.read_table(to).num_rows >= 2 * len(expected) * 0.97
    assert job.main([output.uri, "--to", str(to)]) == 2
    assert "exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert job.main([output.uri, "--to", str(to), "--overwrite", "--threshold", "2"]) == 2
    assert "--threshold is 2: it must be a cosine" in capsys.readouterr().err
    assert job.main([output.uri, "--to", str(to), "--overwrite", "--false-rate", "0"]) == 2


def test_a_search_leaves_duplicates_out(planted: tuple[Output, set], tmp_path: Path) -> None:
    output, _ = planted
    file = tmp_path / "duplicates.parquet"
    table = duplicates(output, threshold=0.99).table
    pq.write_table(table, file)
    dropped = {row["image_id"] for row in table.to_pylist() if not row["keep"]}
    assert dropped
    hits = output.search(ids=["00000.jpg"], count=output.rows, exclude=str(file)).table["image_id"].to_pylist()
    assert len(hits) == output.rows - len(dropped)
    assert not dropped & set(hits)
    with pytest.raises(InputRefused, match=r"--exclude .* does not exist"):
        output.search(ids=["00000.jpg"], exclude=str(tmp_path / "none.parquet"))
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputRefused, match="is no file of `nightshift duplicates`"):
        output.search(ids=["00000.jpg"], exclude=str(tmp_path / "other.parquet"))
