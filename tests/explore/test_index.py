"""The approximate index: recall, filters, parts that it lacks, and what makes it stale."""

import json
from pathlib import Path

import numpy as np
import pytest
from outputs import SETTINGS, run_here, write_output
from servers import S3Server

from jobs import index as job
from pipeline import Embedder, RunConfig, open_output
from pipeline.errors import OutputRefused
from pipeline.explore import index as index_module
from pipeline.explore.index import build
from pipeline.explore.table import Output
from pipeline.storage import access

pytest.importorskip("faiss")

ROWS, DIM = 1500, 16


@pytest.fixture
def output(tmp_path: Path) -> Output:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(20, DIM))[rng.integers(20, size=ROWS)] + 0.5 * rng.normal(size=(ROWS, DIM))
    ids = [f"/p/{number:05d}.jpg" for number in range(ROWS)]
    kept = {"kind": ["ab"[number % 2] for number in range(ROWS)]}
    return open_output(
        str(write_output(tmp_path / "out", ids, vectors.astype(np.float32), kept=kept, rows_per_part=400))
    )


def test_the_index_finds_nearly_all_and_says_how_many(output: Output, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(OutputRefused, match="has no index: run nightshift index"):
        output.search(ids=["00000.jpg"], index=True)
    assert job.main([output.uri]) == 0
    shown = capsys.readouterr().out
    assert "1,500 vectors in" in shown
    recall = float(shown.partition("recall@10 is ")[2].split()[0])
    assert recall >= 0.95
    queries = [f"{number:05d}.jpg" for number in range(0, ROWS, 50)]
    exact = output.search(ids=queries, count=10).table
    fast = output.search(ids=queries, count=10, index=True).table
    of_exact, of_index = (
        {(row["query"], row["image_id"]): row["similarity"] for row in table.to_pylist()} for table in (exact, fast)
    )
    both = of_exact.keys() & of_index.keys()
    assert len(both) / len(of_exact) >= 0.9
    assert all(abs(of_exact[pair] - of_index[pair]) < 1e-3 for pair in both)


def test_the_index_respects_filters(output: Output) -> None:
    build(output)
    for where in ("kind = 'a'", "row < 12", "row < 0"):
        exact = output.search(ids=["00001.jpg"], count=10, where=where).table
        fast = output.search(ids=["00001.jpg"], count=10, where=where, index=True).table
        chosen = output.search(ids=["00001.jpg"], count=ROWS, where=where).table["image_id"].to_pylist()
        assert set(fast["image_id"].to_pylist()) <= set(chosen)
        assert len(fast) == len(exact)


def test_an_update_is_searched_and_then_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import images

    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(60):
        (photos / f"{number:02d}.jpg").write_bytes(images.encode(images.tile("forest", number, (48, 48))))
    config = {"input": str(photos), "output": str(tmp_path / "out")}
    run_here(RunConfig(**config), Embedder(model="tiny:network", weights="random"))
    first = build(open_output(config["output"]))
    for number in range(60, 70):
        (photos / f"{number:02d}.jpg").write_bytes(images.encode(images.tile("urban", number, (48, 48))))
    run_here(RunConfig(**config, update=True), Embedder(model="tiny:network", weights="random"))
    output = open_output(config["output"])
    assert output.rows == 70
    assert output.search(ids=["65.jpg"], count=1, index=True).to_list()[0]["image_id"] == str(photos / "65.jpg")
    second = build(output)
    assert sum(second.rows) == 70
    assert second.parts[: len(first.parts)] == first.parts
    assert second.trained_rows == 60
    assert len(list((tmp_path / "out/_index").iterdir())) == 2
    assert build(output) == second
    assert output.search(ids=["65.jpg"], count=1, index=True).to_list()[0]["image_id"] == str(photos / "65.jpg")


def test_a_stale_or_damaged_index_is_refused(output: Output) -> None:
    record = build(output)
    file = Path(output.uri, "_index", index_module.RECORD)
    content = json.loads(file.read_text())
    for change, message in [
        ({"space": "0" * 16}, "is of other rows than the output has now"),
        ({"parts": ["results/gone.parquet"], "rows": [5]}, "is of other rows than the output has now"),
        ({"format": 99}, "is of another version"),
        ({"file": "none.faiss"}, "is damaged: run nightshift index"),
    ]:
        file.write_text(json.dumps({**content, **change}))
        with pytest.raises(OutputRefused, match=message):
            output.search(ids=["00000.jpg"], index=True)
    file.write_text(json.dumps({**content, "space": "0" * 16}))
    assert build(output).space == record.space


def test_too_few_rows_make_one_cell(tmp_path: Path) -> None:
    folder = write_output(tmp_path / "out", ["/a", "/b"], np.eye(2, 8, dtype=np.float32), settings=SETTINGS)
    assert build(open_output(str(folder))).cells == 1


def test_an_index_in_a_bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built, searched, searched with rows that it lacks, and extended."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    vectors = np.random.default_rng(2).normal(size=(130, DIM)).astype(np.float32)
    ids = [f"/p/{number:05d}.jpg" for number in range(130)]
    uri = s3.uri("index-out")
    write_output(uri, ids[:100], vectors[:100], rows_per_part=40)  # type: ignore[arg-type]
    first = build(open_output(uri))
    assert open_output(uri).search(ids=["00007.jpg"], count=1, index=True).table["similarity"][0].as_py() > 0.999
    write_output(uri, ids[100:], vectors[100:], shard=1)  # type: ignore[arg-type]
    output = open_output(uri)
    for _ in range(2):
        best = output.search(ids=["00120.jpg"], count=1, index=True).table
        assert best["image_id"].to_pylist() == ["/p/00120.jpg"]
        second = build(output)
    assert sum(first.rows) == 100
    assert sum(second.rows) == 130
    names = {info.uri.rpartition("/")[2] for info in access.list_objects(f"{uri}/_index")}
    assert names == {second.file, "index.json"}
