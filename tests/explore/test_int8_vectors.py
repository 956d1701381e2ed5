"""An output with `--embedding-dtype int8`: every reader sees the vectors as float32, as if they were stored so."""

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outputs import SETTINGS, run_here, write_output
from pages import text_of
from PIL import Image

from pipeline import Embedder, RunConfig, open_output, verify
from pipeline.explore.duplicates import duplicates
from pipeline.explore.export import export
from pipeline.explore.index import build
from pipeline.explore.table import Output
from pipeline.output import parts
from pipeline.schema import vector
from pipeline.training.job import FitConfig, fit

ROWS, DIM = 300, 16
IDS = [f"/photos/{'ab'[row % 2]}/{row:04d}.jpg" for row in range(ROWS)]
TRAINED = {**SETTINGS, "weights": "sha256:0123456789abcdef"}


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Of two classes, and of very different lengths. The last ten are noisy copies."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(ROWS, DIM)) + np.where(np.arange(ROWS) % 2, 0.4, -0.4)[:, None]
    drawn[-10:] = drawn[:10] + 0.01 * rng.normal(size=(10, DIM))
    return (drawn * rng.uniform(0.001, 1000, (ROWS, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def both(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> tuple[Output, Output]:
    folder, more = tmp_path_factory.mktemp("int8"), {"settings": TRAINED, "rows_per_part": 70}
    exact = write_output(folder / "float32", IDS, vectors, **more)
    small = write_output(folder / "int8", IDS, vectors, dtype=pa.int8(), **more)
    return open_output(str(exact)), open_output(str(small))


def test_the_rows_are_float32(both: tuple[Output, Output], vectors: np.ndarray) -> None:
    exact, small = both
    assert small.schema == exact.schema
    for read in (small.batches(["embedding", "row"]), (block.table for block in small.blocks(["embedding"]))):
        found = np.concatenate([np.stack(each["embedding"].to_pylist()) for each in read])
        assert (np.abs(found - vectors) <= np.abs(vectors).max(axis=1, keepdims=True) / 127 * 0.501).all()
    assert small.take(np.array([7, 3]), ["embedding", "image_id"])["image_id"].to_pylist() == [IDS[7], IDS[3]]
    assert next(small.batches(["image_id"])).schema.names == ["image_id"]


def test_any_reader_can_undo_the_scale(both: tuple[Output, Output], vectors: np.ndarray) -> None:
    vector = "[x * embedding_scale FOR x IN embedding]"
    assert f"`{vector}`" in text_of("jobs/README.md")
    query = f"SELECT {vector} FROM '{both[1].uri}/results/*.parquet' ORDER BY row"
    found = np.array([row for (row,) in duckdb.sql(query).fetchall()])
    np.testing.assert_allclose(found, vectors, atol=np.abs(vectors).max() / 127)
    footer = pq.read_schema(next(Path(both[1].uri).glob("results/*")))
    assert str(footer.field("embedding").type) == "fixed_size_list<element: int8 not null>[16]"


def test_a_number_takes_a_byte() -> None:
    numbers = pa.array(np.random.default_rng(0).integers(-127, 128, 100_000).astype(np.int8))
    table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(numbers, type=vector(pa.int8(), 100))})
    data = parts.encode(table, "{}", **parts.column_options(table.schema))
    assert len(data) < 105_000
    assert pq.read_table(pa.BufferReader(data))["embedding"].combine_chunks().flatten().equals(numbers)


def test_search_index_and_duplicates(both: tuple[Output, Output]) -> None:
    exact, small = (output.search(ids=IDS[:20], count=5).table for output in both)
    np.testing.assert_allclose(small["similarity"].to_numpy(), exact["similarity"].to_numpy(), atol=0.01)
    assert np.mean(np.array(small["image_id"]) == np.array(exact["image_id"])) > 0.9
    assert build(both[1]).recall > 0.9
    groups = [duplicates(output, threshold=0.99).table["image_id"].to_pylist() for output in both]
    assert set(groups[0]) == set(groups[1]) == {*IDS[:10], *IDS[-10:]}


def test_fit_and_export(both: tuple[Output, Output], tmp_path: Path, vectors: np.ndarray) -> None:
    lines = "\n".join(f"{image_id},{image_id.split('/')[2]}" for image_id in IDS[:80])
    (tmp_path / "labels.csv").write_text(f"image,label\n{lines}\n")
    accuracies = []
    for output in both:
        config = FitConfig(labels=str(tmp_path / "labels.csv"), to=str(tmp_path / "ab.safetensors"), pictures=False)
        accuracies.append(fit(output.uri, config).evaluation.accuracy)
    assert abs(accuracies[0] - accuracies[1]) <= 0.03
    export(both[1].uri, tmp_path / "v.npy")
    assert np.load(tmp_path / "v.npy").dtype == np.float32
    export(both[1].uri, tmp_path / "v.parquet", vectors=True)
    assert "embedding_scale" not in pq.read_schema(tmp_path / "v.parquet").names


def test_row_groups_count_what_readers_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_ROW_GROUP_BYTES", 1 << 20)
    numbers = pa.array(np.zeros(4096 * 512, np.int8))
    table = pa.table(
        {
            "embedding": pa.FixedSizeListArray.from_arrays(numbers, 512),
            "embedding_scale": pa.array(np.ones(4096, np.float32)),
        }
    )
    groups = pq.ParquetFile(pa.BufferReader(parts.encode(table, "{}"))).num_row_groups
    assert groups == 16, "8 MiB as float32, and the scales"


def test_a_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    config = RunConfig(input=str(tmp_path / "photos"), output=str(tmp_path / "out"))
    out = run_here(config, Embedder(model="tiny:network", weights="random", embedding_dtype="int8"))
    assert verify(out).is_whole
    assert open_output(out).schema.field("embedding").type.value_type == pa.float32()
    assert "embedding_scale" in pq.read_schema(next(Path(out).glob("results/*.parquet"))).names
