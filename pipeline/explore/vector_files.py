"""Files for programs that cannot read vectors in Parquet: NumPy, FAISS, Lance, WebDataset, CSV; and one Parquet file.

Each writer streams the rows, so that memory does not grow with the output, and returns their number.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import schema
from pipeline.errors import NightshiftError, SettingRefused
from pipeline.explore.choices import need_search
from pipeline.explore.vectors import COLUMN, scaled
from pipeline.explore.view import View
from pipeline.output.parts import column_options

IDS = ".ids.parquet"
BASIS = ".pca.npy"
GROUP_BYTES = 64 << 20
"""Of a row group of Parquet, in memory."""
TAR_ROWS = 10_000
"""Rows of one tar of a WebDataset."""

Rows = int
Writer = Callable[[View, Sequence[str], Path], Rows]


def ids_of(to: Path) -> Path:
    """The Parquet file beside a file of vectors that says what its rows are."""
    return to.with_name(to.name + IDS)


def basis_of(to: Path) -> Path:
    """The file beside it with the principal components that its vectors were reduced to."""
    return to.with_name(to.name + BASIS)


def is_of_export(folder: Path) -> bool:
    """Whether a folder looks like a Lance dataset or a WebDataset of an export, so that it may be replaced."""
    if folder.suffix.lower() == ".lance":
        return (folder / "_versions").is_dir()
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return bool(names) and all(re.fullmatch(r"\d{6}\.tar", name) for name in names)


def check_packages(suffix: str) -> None:
    """Raise SettingRefused if a package that a format needs is not installed."""
    if suffix == ".faiss":
        need_search("nightshift export --to NAME.faiss", "faiss")
    if suffix == ".lance" and find_spec("lance") is None:
        raise SettingRefused("nightshift export --to NAME.lance needs lance: pip install pylance")


def write_npy(view: View, names: Sequence[str], path: Path) -> Rows:
    """[rows, dim] of float32 or float16, as stored, for `numpy.load`. Row i of the ids is row i of the array."""
    vector = view.schema.field(COLUMN).type
    dtype = np.dtype(vector.value_type.to_pandas_dtype())
    with path.open("wb") as file:
        _write_npy_header(file, dtype, 0, vector.list_size)
        start = file.tell()
        rows = _write_with_ids(view, names, path, lambda vectors: file.write(vectors.astype(dtype, copy=False).data))
        file.seek(0)
        _write_npy_header(file, dtype, rows, vector.list_size)
        if file.tell() != start:
            raise NightshiftError(f"the header of {path.name} has another length with {rows:,} rows")
    return rows


def _write_npy_header(file: IO[bytes], dtype: np.dtype[Any], rows: int, dim: int) -> None:
    """NumPy pads the header so that a number of rows of any length fits into it."""
    np.lib.format.write_array_header_1_0(
        file, {"shape": (rows, dim), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
    )


def write_faiss(view: View, names: Sequence[str], path: Path) -> Rows:
    """An exact index (IndexFlatIP) of the vectors, scaled to length 1: inner products are cosines.

    FAISS can only write an index that is in memory. The header is that of FAISS for one row, with other numbers of
    rows, and FAISS opens the file at the end, without reading it into memory.
    """
    import faiss

    dim = int(view.schema.field(COLUMN).type.list_size)
    header = _faiss_header(dim)
    with path.open("wb") as file:
        file.write(header)
        rows = _write_with_ids(view, names, path, lambda vectors: file.write(scaled(vectors.astype(np.float32)).data))
        file.seek(8)
        file.write(np.int64(rows).tobytes())
        file.seek(len(header) - 8)
        file.write(np.uint64(rows * dim).tobytes())
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    if (index.ntotal, index.d) != (rows, dim) or path.stat().st_size != len(header) + 4 * rows * dim:
        raise NightshiftError(f"FAISS reads {index.ntotal:,} rows of {index.d} from {path.name}, not {rows:,} of {dim}")
    return rows


def _faiss_header(dim: int) -> bytes:
    """Of an IndexFlatIP with one row: its number of rows is in bytes 8 to 16, that of all numbers in the last 8."""
    import faiss

    index = faiss.IndexFlatIP(dim)
    index.add(np.ones((1, dim), np.float32))
    header = faiss.serialize_index(index).tobytes()[: -4 * dim]
    if header[8:16] != np.int64(1).tobytes() or header[-8:] != np.uint64(dim).tobytes():
        raise NightshiftError(
            f"FAISS {faiss.__version__} stores a flat index in another way: export to .npy, and add it"
        )
    return header


def _write_with_ids(view: View, names: Sequence[str], path: Path, write: Callable[[NDArray[Any]], Any]) -> Rows:
    """Hand all vectors to `write`, as [n, dim], and store the other columns in NAME.ids.parquet, in the same order."""
    rows = 0
    ids = pa.schema([view.schema.field(name) for name in names])
    with _Parquet(ids_of(path), ids, view) as file:
        for batch in view.batches([COLUMN, *names]):
            write(_numbers(batch[COLUMN]))
            file.write(batch.select(names))
            rows += batch.num_rows
    return rows


def _numbers(column: pa.Array) -> NDArray[Any]:
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat.reshape(-1, column.type.list_size))


def write_lance(view: View, names: Sequence[str], path: Path) -> Rows:
    """A Lance dataset, which LanceDB opens as a table of its folder."""
    import lance

    rows = 0
    fields = pa.schema([view.schema.field(name) for name in names])

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal rows
        for batch in view.batches(names):
            rows += batch.num_rows
            yield batch

    lance.write_dataset(pa.RecordBatchReader.from_batches(fields, batches()), str(path))
    return rows


def write_parquet(view: View, names: Sequence[str], path: Path) -> Rows:
    """One Parquet file, its row groups cut by bytes."""
    rows = 0
    with _Parquet(path, pa.schema([view.schema.field(name) for name in names]), view) as file:
        for batch in view.batches(names):
            file.write(batch)
            rows += batch.num_rows
    return rows


class _Parquet:
    """A Parquet file with row groups of GROUP_BYTES, a page index and the footer of the run."""

    def __init__(self, path: Path, columns: pa.Schema, view: View) -> None:
        footer = {"fingerprint": view.record.get("fingerprint"), **(view.record.get("provenance") or {})}
        if view.components:
            footer["pca"] = view.components.describe()
        options = {"compression": "zstd", "write_page_index": True, "write_page_checksum": True}
        described = columns.with_metadata({"nightshift": json.dumps(footer)})
        self.writer = pq.ParquetWriter(path, described, **options, **column_options(columns))
        self.schema, self.size = described, 0
        self.waiting: list[pa.RecordBatch] = []

    def __enter__(self) -> "_Parquet":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._flush()
        self.writer.close()

    def write(self, batch: pa.RecordBatch) -> None:
        self.waiting.append(batch)
        self.size += batch.nbytes
        if self.size >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            table = pa.Table.from_batches(self.waiting).replace_schema_metadata(self.schema.metadata)
            self.writer.write_table(table, row_group_size=len(table))
        self.waiting, self.size = [], 0


def write_webdataset(view: View, names: Sequence[str], path: Path) -> Rows:
    """A folder of tars of TAR_ROWS rows. A row is two members: NUMBER.json with its columns, NUMBER.npy, its vector."""
    path.mkdir()
    rows = 0
    samples = enumerate(_samples(view, [name for name in names if name != COLUMN]))
    for shard, members in groupby(samples, lambda sample: sample[0] // TAR_ROWS):
        with tarfile.open(path / f"{shard:06d}.tar", "w") as tar:
            for number, (row, vector) in members:
                _add(tar, f"{number:012d}.json", json.dumps(row, default=str).encode())
                _add(tar, f"{number:012d}.npy", _npy(vector))
                rows = number + 1
    return rows


def _samples(view: View, names: Sequence[str]) -> Iterator[tuple[dict[str, Any], NDArray[Any]]]:
    for batch in view.batches([COLUMN, *names]):
        yield from zip(batch.select(names).to_pylist(), _numbers(batch[COLUMN]), strict=True)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _npy(vector: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vector, allow_pickle=False)
    return buffer.getvalue()


def write_csv(view: View, names: Sequence[str], path: Path) -> Rows:
    """Text in UTF-8 with a header. Vectors, lists and boxes are JSON."""
    rows = 0
    columns = pa.schema([(name, _csv_type(view.schema.field(name).type)) for name in names])
    with pyarrow.csv.CSVWriter(path, columns) as file:
        for batch in view.batches(names):
            file.write_batch(pa.RecordBatch.from_arrays([_csv_text(batch[name]) for name in names], schema=columns))
            rows += batch.num_rows
    return rows


def _csv_type(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_nested(type_):
        return pa.string()
    return pa.float32() if pa.types.is_float16(type_) else type_


def _csv_text(column: pa.Array) -> pa.Array:
    if schema.is_vector(column.type) and not column.null_count:
        return _json_vectors(column)
    if pa.types.is_nested(column.type):
        texts = [None if value is None else json.dumps(value, default=str) for value in column.to_pylist()]
        return pa.array(texts, pa.string())
    return column.cast(_csv_type(column.type))


def _json_vectors(column: pa.FixedSizeListArray) -> pa.Array:
    """Each vector as a JSON list. A number has the fewest digits that give it again in its own number format."""
    flat = column.flatten()
    texts = (flat.cast(pa.float32()) if pa.types.is_float16(flat.type) else flat).cast(pa.string())
    offsets = np.arange(len(column) + 1, dtype=np.int32) * column.type.list_size
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), texts), ", ")
    return pc.binary_join_element_wise("[", joined, "]", "")


WRITERS: Mapping[str, Writer] = {
    ".npy": write_npy,
    ".faiss": write_faiss,
    ".lance": write_lance,
    ".webdataset": write_webdataset,
    ".csv": write_csv,
    ".parquet": write_parquet,
}
WITH_IDS = (".npy", ".faiss")
FOLDERS = (".lance", ".webdataset")
ALWAYS_VECTORS = (*WITH_IDS, *FOLDERS)
