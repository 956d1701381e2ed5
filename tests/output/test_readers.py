"""Every common reader opens `results/` and `_errors/` as one table, as a folder and without options."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from whole import write_folder

from pipeline import schema
from pipeline.config import RunConfig
from pipeline.errors import OutputRefused
from pipeline.output import directory, parts
from pipeline.output import ledger as ledgers
from pipeline.output.run_record import RunRecord
from pipeline.output.verify import verify
from pipeline.planning.archive import Archive
from pipeline.predictors.base import Predictor
from pipeline.stages.write import Sink

COLUMNS = pa.schema(
    [("embedding", pa.list_(pa.float32(), 4)), ("label", pa.string()), ("top_scores", pa.list_(pa.float32()))]
)
KEEP = {"cls": pa.int64(), "json": pa.string()}
IMAGES, BAD = 9, (2, 7)


class Vectors(Predictor):
    columns = COLUMNS


def written(folder: Path, bad: tuple[int, ...]) -> Path:
    """A finished output of three parts, without the network."""
    output = folder / "out"
    config = RunConfig(input=str(write_folder(folder / "images", IMAGES)), output=str(output))
    output.mkdir()
    record, archive = RunRecord.of(config, Vectors()), Archive(config)
    directory.prepare(config, record, archive)
    ledgers.begin(config.output)
    sink = Sink(config.output, 1, schema.result(COLUMNS, KEEP), record.footer)
    for start in range(0, IMAGES, 3):
        sink(table(folder, start, bad))
    directory.finish(config.output)
    return output


def table(folder: Path, start: int, bad: tuple[int, ...]) -> pa.Table:
    rows = []
    for row in range(start, start + 3):
        name = f"{folder}/images/{row:04d}.jpg"
        identity = {"image_id": name, "source": name, "shard": 0, "row": row}
        error = {"stage": "decode", "error_type": "truncated", "message": "cut"}
        result = {"embedding": [row] * 4, "label": "forest", "top_scores": [0.5], "width": 48, "height": 40}
        rows.append(identity | (error if row in bad else result))
    return pa.Table.from_pylist(rows, schema=schema.predicted(COLUMNS, KEEP))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("readers"), BAD)


@pytest.fixture(scope="module")
def without_errors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("without_errors"), ())


@pytest.fixture(scope="module")
def all_errors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("all_errors"), tuple(range(IMAGES)))


def with_pandas(folder: str) -> pd.DataFrame:
    return pd.read_parquet(folder, use_threads=False)


def with_pandas_nullable(folder: str) -> pd.DataFrame:
    return pd.read_parquet(folder, dtype_backend="numpy_nullable", use_threads=False)


def with_pandas_arrow(folder: str) -> pd.DataFrame:
    return pd.read_parquet(folder, dtype_backend="pyarrow", use_threads=False)


def with_arrow(folder: str) -> pd.DataFrame:
    return ds.dataset(folder).to_table(use_threads=False).to_pandas()


def with_polars(folder: str) -> pd.DataFrame:
    polars = pytest.importorskip("polars")
    return polars.read_parquet(folder).to_arrow().to_pandas()


def with_duckdb(folder: str) -> pd.DataFrame:
    duckdb = pytest.importorskip("duckdb")
    return duckdb.sql(f"FROM read_parquet('{folder}/*.parquet')").df()


def with_dask(folder: str) -> pd.DataFrame:
    dask = pytest.importorskip("dask.dataframe")
    return dask.read_parquet(folder).compute(scheduler="synchronous")


def with_daft(folder: str) -> pd.DataFrame:
    daft = pytest.importorskip("daft")
    return daft.read_parquet(folder).to_pandas()


def with_hugging_face(folder: str) -> pd.DataFrame:
    datasets = pytest.importorskip("datasets")
    cache = str(Path(folder).parents[1] / "hugging_face")
    return datasets.load_dataset(folder, split="train", cache_dir=cache).to_pandas()


def with_datafusion(folder: str) -> pd.DataFrame:
    datafusion = pytest.importorskip("datafusion")
    return datafusion.SessionContext().read_parquet(folder).to_pandas()


READERS = [
    with_pandas,
    with_pandas_nullable,
    with_pandas_arrow,
    with_arrow,
    with_polars,
    with_duckdb,
    with_dask,
    with_daft,
    with_hugging_face,
    with_datafusion,
]
Read = Callable[[str], pd.DataFrame]
by_name = pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)


@by_name
def test_results_open_as_one_table(read: Read, output: Path) -> None:
    rows = read(f"{output}/results").sort_values("row")
    assert rows["row"].tolist() == [row for row in range(IMAGES) if row not in BAD]
    assert list(rows.columns) == [*schema.IDENTITY.names, *COLUMNS.names, *KEEP]
    for row, vector in zip(rows["row"], rows["embedding"], strict=True):
        np.testing.assert_array_equal(np.asarray(vector, np.float32), [row] * 4)
    assert rows["cls"].isna().all()


@by_name
def test_errors_open_as_one_table(read: Read, output: Path) -> None:
    rows = read(f"{output}/_errors").sort_values("row")
    assert rows["row"].tolist() == list(BAD)
    assert set(rows["error_type"]) == {"truncated"}


@pytest.mark.parametrize("read", [read for read in READERS if read is not with_hugging_face])
def test_a_table_without_rows_opens_with_its_columns(read: Read, without_errors: Path, all_errors: Path) -> None:
    """Hugging Face datasets refuse every table without rows."""
    errors, results = read(f"{without_errors}/_errors"), read(f"{all_errors}/results")
    assert (len(errors), list(errors.columns)) == (0, schema.ERRORS.names)
    assert (len(results), list(results.columns)) == (0, [*schema.IDENTITY.names, *COLUMNS.names, *KEEP])


def test_pandas_opens_the_output_itself(output: Path, all_errors: Path) -> None:
    assert len(with_pandas(str(output))) == IMAGES - len(BAD)
    assert len(with_pandas(str(all_errors))) == 0


def test_verify_accepts_them(output: Path, without_errors: Path, all_errors: Path) -> None:
    for each in (output, without_errors, all_errors):
        assert verify(str(each)).is_whole, list(verify(str(each)).lines())


def test_the_folder_of_results_holds_parts_alone_while_one_is_written(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Daft opens hidden files too, and Hugging Face datasets and Polars any other name."""
    seen: list[str] = []

    def look(source: str, target: str) -> None:
        seen.extend(path.name for path in (tmp_path / "results").iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", look)
    with pytest.raises(KeyboardInterrupt):
        parts.write_part(str(tmp_path), "results/part-1.parquet", b"PAR1")
    assert seen == []
    assert list(tmp_path.rglob("*part*")) == []


def test_elements_of_vectors_are_not_null(output: Path) -> None:
    part = next(output.glob("results/*.parquet"))
    assert str(pq.read_schema(part).field("embedding").type) == "fixed_size_list<element: float not null>[4]"
    assert "required float field_id=-1 element" in str(pq.ParquetFile(part).schema)


def test_every_column_has_a_page_index(output: Path) -> None:
    group = pq.read_metadata(next(output.glob("results/*.parquet"))).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    assert all(column.has_offset_index for column in columns)
    without_statistics = {column.path_in_schema for column in columns if not column.has_column_index}
    assert without_statistics == {"embedding.list.element", "top_scores.list.element"}


def test_an_output_of_the_earlier_layout_is_read_and_refused(tmp_path: Path) -> None:
    output = written(tmp_path, BAD)
    as_earlier_layout(output)
    assert len(with_pandas(str(output))) == IMAGES - len(BAD)
    assert verify(str(output)).is_whole, list(verify(str(output)).lines())
    config = RunConfig(input=str(tmp_path / "images"), output=str(output))
    with pytest.raises(OutputRefused, match=r"written by another version .* its layout is 1, .* use another --output"):
        directory.check(config, Archive(config))
    overwrite = replace(config, overwrite=True)
    directory.check(overwrite, Archive(overwrite))
    directory.prepare(overwrite, RunRecord.of(overwrite, Vectors()), Archive(overwrite))
    assert list(output.rglob("part-*")) == []


def as_earlier_layout(output: Path) -> None:
    """The parts beside `_run.json`, names without folders in the commits, and no version."""
    for part in output.glob("results/*"):
        part.rename(output / part.name)
    (output / "results").rmdir()
    for path in output.glob("_commits/*"):
        commit = json.loads(path.read_text())
        names = {key: commit[key] and Path(commit[key]).name for key in ("part", "errors_part")}
        path.write_text(json.dumps({**commit, **names}))
    run = json.loads((output / "_run.json").read_text())
    del run["layout"]
    (output / "_run.json").write_text(json.dumps(run))


def test_row_groups_are_cut_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_ROW_GROUP_BYTES", 1 << 20)
    rows = 3000
    text = ["x" * (1000 if row < 2000 else 10) for row in range(rows)]
    table = pa.table({"row": range(rows), "text": text})
    file = pq.ParquetFile(pa.BufferReader(parts.encode(table, "{}")))
    groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    assert max(group.nbytes for group in groups) <= 1 << 20
    assert len(groups) < 6, "long rows make small groups, short rows do not"
    assert pa.concat_tables(groups)["row"].to_pylist() == list(range(rows))
