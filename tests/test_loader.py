"""read → decode as tables."""

from pathlib import Path

import images
import numpy as np
import pyarrow as pa
from whole import write_tar

from pipeline import schema
from pipeline.config import Transform
from pipeline.coverage import END
from pipeline.decode import decode
from pipeline.loader import Loader
from pipeline.plan import Shard
from pipeline.sources import ReadOptions

TRANSFORM = Transform(resize=20, crop=16)


def tar_shard(path: Path, members: dict[str, bytes]) -> Shard:
    return Shard(7, "tar", str(write_tar(path, members)))


def loader(**settings: object) -> Loader:
    keep = {"cls": ("truth", pa.string())}
    values = {
        "max_pixels": 10**6,
        "exif_rotate": True,
        "exact": True,
        "keep_tiles": False,
        "rows_per_table": 4,
        "threads": 3,
        **settings,
    }
    return Loader(TRANSFORM, ReadOptions(keep=("cls",)), keep, **values)  # type: ignore[arg-type]


def test_tables_hold_every_row_and_the_end_of_the_shard(tmp_path: Path) -> None:
    data = {f"{i}.png": images.encode(images.tile("urban", i), "PNG") for i in range(9)}
    data["3.png"] = b""
    members = {**data, **{f"{i}.cls": str(i).encode() for i in range(9)}}
    tables = list(loader().load(tar_shard(tmp_path / "a.tar", members), ((0, END),)))
    assert [len(table) for table in tables] == [4, 4, 2]
    assert all(table.schema == schema.loaded({"truth": pa.string()}) for table in tables)
    rows = pa.concat_tables(tables).to_pylist()
    assert [row["row"] for row in rows] == list(range(10))
    assert [row[schema.SHARD_ROWS] for row in rows] == [None] * 9 + [9]
    assert [row["truth"] for row in rows[:9]] == [str(i) for i in range(9)]
    assert {row["shard"] for row in rows} == {7}
    for row, (name, encoded) in zip(rows, data.items(), strict=False):
        assert row["image_id"] == f"{tmp_path}/a.tar#{name}"
        if encoded:
            pixels = np.frombuffer(row[schema.PIXELS], np.uint8).reshape(16, 16, 3)
            np.testing.assert_array_equal(pixels, decode(encoded, TRANSFORM).pixels)
            assert (row["width"], row["height"], row["size_bytes"]) == (64, 64, len(encoded))
        else:
            assert (row[schema.PIXELS], row["stage"], row["error_type"]) == (None, "decode", "empty")


def test_settings_reach_the_decoder(tmp_path: Path) -> None:
    shard = tar_shard(tmp_path / "a.tar", {"a.jpg": images.oriented(6, size=(80, 60))})
    upright, as_stored = (
        pa.concat_tables(loader(exif_rotate=rotate).load(shard, ((0, END),)))[schema.PIXELS][0].as_py()
        for rotate in (True, False)
    )
    assert upright != as_stored
    small = pa.concat_tables(loader(max_pixels=100).load(shard, ((0, END),)))
    assert small["error_type"][0].as_py() == "too_large"


def test_an_empty_shard_is_its_end_alone(tmp_path: Path) -> None:
    (table,) = loader().load(tar_shard(tmp_path / "a.tar", {"note.txt": b"x"}), ((0, END),))
    assert table[schema.SHARD_ROWS].to_pylist() == [0]
    assert table["image_id"].to_pylist() == [None]


def test_tiles_keep_their_size_where_the_network_enlarges_them(tmp_path: Path) -> None:
    sizes = [(8, 8), (30, 20), (8, 8), (4, 4), (9, 9)]
    members = {f"{i}.png": images.encode(images.tile(size=size), "PNG") for i, size in enumerate(sizes)}
    members["5.png"] = b"not an image"
    (table,) = loader(exact=False, keep_tiles=True, rows_per_table=9).load(
        tar_shard(tmp_path / "a.tar", members), ((0, END),)
    )
    lengths = [pixels and len(pixels) for pixels in table[schema.PIXELS].to_pylist()]
    assert lengths == [8 * 8 * 3, 16 * 16 * 3, 8 * 8 * 3, 4 * 4 * 3, 16 * 16 * 3, None, None]
    tile = np.asarray(images.tile(size=(8, 8)).convert("RGB"))
    assert table[schema.PIXELS][2].as_py() == tile.tobytes()
