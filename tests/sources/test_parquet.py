"""Parquet files of images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_contract import ArchiveContract, Members, error_types, image, numbered, read_all

from pipeline.errors import InputRefused
from pipeline.sources import ReadOptions, parquet
from pipeline.sources.shard import Shard


class ParquetContract(ArchiveContract):
    """Subclasses define the image column."""

    kind, suffix = "parquet", ".parquet"

    def column(self, members: Members) -> pa.Array:
        raise NotImplementedError

    def write(self, path: Path, members: Members, texts: Sequence[str] = ()) -> None:
        columns = {"image": self.column(members), **({"txt": texts} if texts else {})}
        pq.write_table(pa.table(columns), path, row_group_size=7, compression="zstd")


class TestParquetBytes(ParquetContract):
    def column(self, members: Members) -> pa.Array:
        return pa.array([data for _, data in members], pa.binary())

    def test_repeated_names_have_different_ids(self, tmp_path: Path) -> None:
        shard = self.make(tmp_path, numbered(3))
        assert [(i.member, i.image_id) for i in read_all(shard, ((1, 3),))[0]] == [
            ("1", f"{shard.uri}#1"),
            ("2", f"{shard.uri}#2"),
        ]


class TestParquetLargeBytes(TestParquetBytes):
    def column(self, members: Members) -> pa.Array:
        return pa.array([data for _, data in members], pa.large_binary())


class TestParquetHuggingFace(ParquetContract):
    type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

    def column(self, members: Members) -> pa.Array:
        return pa.array([{"bytes": data, "path": name} for name, data in members], self.type)

    def test_ids_depend_on_the_paths_of_skipped_row_groups(self, tmp_path: Path) -> None:
        shard = self.make(tmp_path, [("a.png", image(number)) for number in range(20)])
        items, _ = read_all(shard, ((14, 15),))
        assert [item.image_id for item in items] == [f"{shard.uri}#a.png#row=14"]

    def test_nulls_and_paths(self, tmp_path: Path) -> None:
        values = [
            {"bytes": image(0), "path": "a.png"},
            {"bytes": None, "path": "b.png"},
            None,
            {"bytes": image(3), "path": None},
            {"bytes": image(4), "path": "3"},
        ]
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"image": pa.array(values, self.type)}), path)
        items, _ = read_all(Shard(0, "parquet", str(path), 5))
        assert error_types(items) == [None, "null", "null", None, None]
        assert [item.member for item in items] == ["a.png", "b.png", "2", "3", "3"]
        assert items[4].image_id == f"{path}#3#row=4"
        assert "b.png" in items[1].error.message  # type: ignore[union-attr]


class TestParquetFiles:
    def write(self, folder: Path, columns: dict[str, pa.Array], **options: object) -> Shard:
        path = folder / "a.parquet"
        pq.write_table(pa.table(columns), path, **options)
        return Shard(0, "parquet", str(path), len(next(iter(columns.values()))))

    def test_null_bytes(self, tmp_path: Path) -> None:
        items, _ = read_all(self.write(tmp_path, {"image": pa.array([image(1), None, b""])}))
        assert error_types(items) == [None, "null", None]

    def test_kept_values_keep_their_types(self, tmp_path: Path) -> None:
        columns = {"image": pa.array([image(0)] * 2), "label": pa.array([3, None]), "tags": pa.array([["a"], []])}
        items, _ = read_all(self.write(tmp_path, columns), keep=("label", "tags"))
        assert [item.kept for item in items] == [{"label": 3, "tags": ["a"]}, {"label": None, "tags": []}]

    def test_only_the_row_groups_in_todo_are_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = [np.random.default_rng(number).bytes(5000) for number in range(30)]
        shard = self.write(tmp_path, {"image": pa.array(data)}, row_group_size=10)
        ArchiveContract.lose_bytes(monkeypatch, 1000, 40_000)
        assert [item.data for item in read_all(shard, ((12, 14), (29, 30)))[0]] == [data[i] for i in (12, 13, 29)]
        assert error_types(read_all(shard, ((9, 11),))[0]) == ["unreadable"] * 2

    @staticmethod
    def break_group(shard: Shard, group: int) -> None:
        chunk = pq.ParquetFile(shard.uri).metadata.row_group(group).column(0)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        data = bytearray(Path(shard.uri).read_bytes())
        data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
        Path(shard.uri).write_bytes(data)

    def test_a_broken_row_group_loses_only_its_rows(self, tmp_path: Path) -> None:
        shard = self.write(tmp_path, {"image": pa.array([image(i) for i in range(30)])}, row_group_size=10)
        self.break_group(shard, 1)
        items, total = read_all(shard)
        assert error_types(items) == [None] * 10 + ["corrupt"] * 10 + [None] * 10
        assert "row group 1" in items[10].error.message  # type: ignore[union-attr]
        assert items[29].data == image(29)
        assert total == 30

    @pytest.mark.parametrize("column", [pa.array([1, 2], pa.int16()), pa.array(["a", "b"])])
    def test_another_schema_than_planned_is_an_error_per_row(self, tmp_path: Path, column: pa.Array) -> None:
        for options in ({}, {"image_column": "image"}, {"image_column": "photo"}):
            items, total = read_all(self.write(tmp_path, {"image": column}), **options)
            assert error_types(items) == ["unreadable"] * 2
            assert "image" in items[0].error.message  # type: ignore[union-attr]
            assert total == 2

    def test_rows_and_schema_come_from_the_footer(self, tmp_path: Path) -> None:
        shard = self.write(tmp_path, {"image": pa.array([b""] * 3), "label": pa.array([1, 2, 3])})
        rows, schema = parquet.shard_rows(shard.uri)
        assert rows == 3
        assert schema.names == ["image", "label"]

    def test_a_broken_footer_raises(self, tmp_path: Path) -> None:
        (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
        with pytest.raises((OSError, pa.ArrowException)):
            parquet.shard_rows(str(tmp_path / "bad.parquet"))


class TestFindImageColumn:
    def find(self, columns: dict[str, pa.DataType], name: str | None = None) -> str:
        return parquet.find_image_column(pa.schema(list(columns.items())), name, "a.parquet")

    def test_finds(self) -> None:
        bytes_, text = pa.binary(), pa.string()
        hugging_face = pa.struct([("bytes", bytes_), ("path", text)])
        assert self.find({"id": text, "photo": bytes_}) == "photo"
        assert self.find({"mask": bytes_, "Image": hugging_face}) == "Image"
        assert self.find({"png": bytes_, "jpg": pa.large_binary()}) == "jpg"
        assert self.find({"image": bytes_, "mask": bytes_}, "mask") == "mask"
        assert self.find({"image": text, "raw": bytes_}) == "raw"

    def test_refuses(self) -> None:
        with pytest.raises(InputRefused, match="left, right with --image-column"):
            self.find({"left": pa.binary(), "right": pa.binary()})
        with pytest.raises(InputRefused, match=r"id \(string\)"):
            self.find({"id": pa.string()})
        with pytest.raises(InputRefused, match=r"photo: a\.parquet has only the columns image"):
            self.find({"image": pa.binary()}, "photo")
        with pytest.raises(InputRefused, match=r"image: it is int16 in a\.parquet"):
            self.find({"image": pa.int16()}, "image")


@pytest.mark.parametrize("kind", ["dictionary", "struct", "struct of dictionary"])
def test_other_types_of_bytes_are_read(tmp_path: Path, kind: str) -> None:
    data = [image(0), image(1), image(0), None]
    values = pa.array(data, pa.binary())
    if kind != "struct":
        values = values.dictionary_encode()
    if kind != "dictionary":
        values = pa.StructArray.from_arrays([values], ["bytes"])
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"picture": values}), path)
    items, total = read_all(Shard(0, "parquet", str(path)))
    assert [item.data for item in items] == data
    assert error_types(items) == [None, None, None, "null"]
    assert total == 4
    assert parquet.inspect(str(path), ReadOptions()).rows == 4


@pytest.mark.parametrize("options", [ReadOptions(), ReadOptions(image_column="frames")])
def test_a_list_of_images_is_refused_by_name(tmp_path: Path, options: ReadOptions) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"n": [1], "frames": [[image(0), image(1)]]}), path)
    with pytest.raises(InputRefused, match="column 'frames' holds a list of images per row; write one row per image"):
        parquet.inspect(str(path), options)
