"""MBTiles and PMTiles: every form of both, what is shared, and what is refused or lost."""

import gzip
import itertools
import os
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from pmtiles.tile import Compression, Entry, TileType, deserialize_directory, serialize_directory
from range_server import serve
from servers import S3Server
from source_contract import ALL, ArchiveContract, Members
from tile_archives import Layout, Tile, square, tile_image, write_mbtiles, write_pmtiles

from pipeline import sources
from pipeline.config import RunConfig
from pipeline.coverage import END, Ranges
from pipeline.errors import InputRefused, NightshiftError
from pipeline.geo.tiles import Selection, bounds, tile_ids
from pipeline.planning.archive import Archive
from pipeline.sources import ReadOptions, Record, mbtiles, pmtiles
from pipeline.sources import tiles as shared
from pipeline.sources.shard import Shard
from pipeline.sources.tiles import TileRun, hash_of
from pipeline.storage import access

SATELLITE = Path(__file__).resolve().parents[3] / "shared/data/satellite"
OCEAN = tile_image(10**6)


def planned(path: Path | str, **settings: Any) -> list[Shard]:
    return list(Archive(RunConfig(input=str(path), output="/none", **settings)).shards())


def rows_of(shards: list[Shard], todo: Ranges = ALL) -> Iterator[tuple[Record, int, str, Mapping[str, Any]]]:
    """Each row of some shards: its record, row, image_id and columns."""
    for shard in shards:
        for item in sources.read(shard, todo, ReadOptions()):
            if isinstance(item, Record):
                yield item, item.row, item.image_id, item.kept
                for number, place in enumerate(item.repeats, 1):
                    yield item, item.row + number, place.image_id, place.kept


def tiles_of(shards: list[Shard]) -> dict[Tile, bytes]:
    """The tiles of some shards; checks that no row and no image_id occurs twice, and what belongs to each row."""
    found: dict[Tile, bytes] = {}
    for record, _, image_id, kept in rows_of(shards):
        assert record.error is None
        assert isinstance(record.data, bytes)
        tile = kept["tile_z"], kept["tile_x"], kept["tile_y"]
        assert image_id == f"{record.source}#{tile[0]}/{tile[1]}/{tile[2]}"
        assert kept["tile_hash"] == hash_of(record.data)
        assert tuple(kept["bbox"].values()) == bounds(*tile)
        assert tile not in found
        found[tile] = record.data
    for shard in shards:
        assert [row for _, row, _, _ in rows_of([shard])] == list(range(shard.rows or 0))
    return found


class TileContract(ArchiveContract):
    """The members of the contract become tiles of one zoom, in the order of the archive."""

    def rows(self, members: Members) -> dict[Tile, bytes]:
        raise NotImplementedError

    test_repeated_names_have_different_ids = None  # type: ignore[assignment]  # a tile has one place, and no name
    test_kept_values = None  # type: ignore[assignment]  # a tile has no sidecars


class TestMBTiles(TileContract):
    kind, suffix = "mbtiles", ".mbtiles"

    def write(self, path: Path, members: Members, texts: Any = ()) -> None:
        write_mbtiles(path, {(10, number, 0): data for number, (_, data) in enumerate(members)})

    test_a_lost_connection_ends_the_shard = None  # type: ignore[assignment]  # SQLite reads the local file itself
    test_a_shard_that_cannot_be_read_for_the_moment_is_unreadable = None  # type: ignore[assignment]


class TestPMTiles(TileContract):
    kind, suffix = "pmtiles", ".pmtiles"

    def write(self, path: Path, members: Members, texts: Any = ()) -> None:
        first = 349525  # the first tile id of zoom 10
        z, x, y = (column.tolist() for column in pmtiles._tiles(np.arange(first, first + len(members))))
        write_pmtiles(path, {(a, b, c): data for a, b, c, (_, data) in zip(z, x, y, members, strict=True)})


# Every form of both


@pytest.mark.parametrize("layout", ["table", "no index", "map", "shallow", "without rowid", "view"])
def test_every_layout_of_mbtiles(tmp_path: Path, layout: Layout) -> None:
    tiles = {**square(4, 40), **square(2, 3, 100), (3, 0, 0): OCEAN}
    assert tiles_of(planned(write_mbtiles(tmp_path / "a.mbtiles", tiles, layout))) == tiles


@pytest.mark.parametrize("compression", [Compression.NONE, Compression.GZIP, Compression.ZSTD, Compression.BROTLI])
@pytest.mark.parametrize(("leaf_size", "levels"), [(0, 1), (7, 1), (3, 3)])
def test_every_directory_of_pmtiles(tmp_path: Path, compression: Compression, leaf_size: int, levels: int) -> None:
    tiles = {**square(4, 60), **square(2, 3, 100), (3, 0, 0): OCEAN, (3, 5, 5): OCEAN}
    path = write_pmtiles(tmp_path / "a.pmtiles", tiles, leaf_size=leaf_size, levels=levels, compression=compression)
    assert tiles_of(planned(path)) == tiles


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.ZSTD, Compression.BROTLI])
def test_compressed_images_of_pmtiles(tmp_path: Path, compression: Compression) -> None:
    tiles = square(3, 5)
    assert tiles_of(planned(write_pmtiles(tmp_path / "a.pmtiles", tiles, tile_compression=compression))) == tiles


def test_gzip_images_of_mbtiles(tmp_path: Path) -> None:
    tiles = square(3, 5)
    stored = {tile: gzip.compress(data) for tile, data in tiles.items()}
    for format in ("png", None):
        assert tiles_of(planned(write_mbtiles(tmp_path / "a.mbtiles", stored, format=format))) == tiles


def test_a_directory_is_decoded_as_the_package_decodes_it() -> None:
    generator = np.random.default_rng(0)
    ids = np.cumsum(generator.integers(1, 1 << 20, 500))
    entries = [
        Entry(int(tile_id), int(generator.integers(0, 1 << 40)), int(generator.integers(1, 1 << 20)), number % 2)
        for number, tile_id in enumerate(ids)
    ]
    for number in range(1, 400, 3):  # these continue the entry before them
        entries[number].offset = entries[number - 1].offset + entries[number - 1].length
    data = serialize_directory(entries)
    decoded = pmtiles._decode(gzip.decompress(data))
    expected = [(each.tile_id, each.run_length, each.length, each.offset) for each in deserialize_directory(data)]
    assert list(zip(*(column.tolist() for column in decoded), strict=True)) == expected


# What an archive stores once


@pytest.mark.parametrize("kind", ["map", "shallow", "pmtiles"])
def test_a_shared_tile_is_one_record(tmp_path: Path, kind: str) -> None:
    tiles = {tile: OCEAN if tile[1] % 2 else data for tile, data in square(5, 300).items()}
    path = tmp_path / ("a.pmtiles" if kind == "pmtiles" else "a.mbtiles")
    if kind == "pmtiles":
        write_pmtiles(path, tiles, leaf_size=16)
    else:
        write_mbtiles(path, tiles, cast(Layout, kind))
    (shard,) = planned(path)
    assert tiles_of([shard]) == tiles
    records = [item for item in sources.read(shard, ALL, ReadOptions()) if isinstance(item, Record)]
    shared_count = sum(data == OCEAN for data in tiles.values())
    assert sorted(len(record.repeats) for record in records)[-2:] == [0, shared_count - 1]
    assert len(records) == len(tiles) - shared_count + 1


def test_todo_cuts_through_the_places_of_a_tile(tmp_path: Path) -> None:
    (shard,) = planned(write_pmtiles(tmp_path / "a.pmtiles", {(3, x, 1): OCEAN for x in range(8)} | square(4, 2)))
    whole = {row: (image_id, kept, record.data) for record, row, image_id, kept in rows_of([shard])}
    for todo in [((0, 3),), ((2, 5), (6, 7), (8, 9)), ((7, END),), ((1, 2), (9, 30))]:
        records = [item for item in sources.read(shard, todo, ReadOptions()) if isinstance(item, Record)]
        found = {row: (image_id, kept, record.data) for record, row, image_id, kept in rows_of([shard], todo)}
        assert found == {row: whole[row] for row in whole if any(start <= row < stop for start, stop in todo)}
        assert len(records) <= len(todo) + 2


# Shards


@pytest.mark.parametrize("suffix", [".mbtiles", ".pmtiles"])
def test_an_archive_is_cut_into_shards(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mbtiles, pmtiles):
        monkeypatch.setattr(module, "TILES_PER_SHARD", 16)
    tiles = {tile: OCEAN if tile[1] == 1 else data for tile, data in square(5, 100).items()}
    path = tmp_path / f"a{suffix}"
    write_mbtiles(path, tiles, "map") if suffix == ".mbtiles" else write_pmtiles(path, tiles, leaf_size=5)
    shards = planned(path)
    assert [shard.rows for shard in shards] == [16] * 6 + [4]
    assert tiles_of(shards) == tiles
    assert [shard.rows for shard in planned(path, limit=20)] == [16, 4]
    assert len(tiles_of(planned(path, limit=20))) == 20
    ranges = [(min(shard.payload.keys), max(shard.payload.keys)) for shard in shards]  # type: ignore[union-attr]
    assert all(first[1] < second[0] for first, second in itertools.pairwise(ranges))


def test_a_long_run_is_cut_into_shards(tmp_path: Path) -> None:
    """One entry that stands for the 4 million tiles of a zoom; only the directory is read."""
    tiles = square(0, 1)
    path = write_pmtiles(tmp_path / "a.pmtiles", tiles)
    header, data = bytearray(path.read_bytes()[:127]), tile_image(0)
    root = gzip.compress(gzip.decompress(serialize_directory([Entry(1398101, 0, len(data), 1 << 22)])))
    for place, value in ((16, len(root)), (24, 127 + len(root)), (32, 0), (40, 0), (48, 0), (56, 127 + len(root))):
        header[place : place + 8] = value.to_bytes(8, "little")
    header[72:80] = (1 << 22).to_bytes(8, "little")
    header[100] = header[101] = 11
    path.write_bytes(bytes(header) + root + data)
    shards = planned(path)
    assert len(shards) == (1 << 22) // shared.TILES_PER_SHARD
    (record,) = [item for item in sources.read(shards[-1], ALL, ReadOptions()) if isinstance(item, Record)]
    assert (record.data, len(record.repeats)) == (data, shared.TILES_PER_SHARD - 1)


def test_the_payload_survives_the_plan_and_is_cut() -> None:
    run = TileRun((9, 11, 10, 4), (1, 2, 1), (100, 7, 300), (5, 6, 7), "gzip")
    assert TileRun.from_json(run.to_json()) == run
    assert run.first(2) == TileRun((9, 11), (1, 1), (100, 7), (5, 6), "gzip")
    assert run.select(((1, 2), (3, 4))) == TileRun((11, 4), (1, 1), (7, 300), (6, 7), "gzip")
    assert run.select(()) == TileRun(compression="gzip")
    assert run.first_keys.tolist() == [9, 11, 4]
    lost = TileRun(lost="gone", lost_type="corrupt")
    assert TileRun.from_json(lost.to_json()) == lost == lost.first(1)


# Selections


@pytest.mark.parametrize("suffix", [".mbtiles", ".pmtiles"])
@pytest.mark.parametrize(
    "settings",
    [
        {"zoom": "4"},
        {"zoom": "2:3"},
        {"bbox": "-100,-10,20,60"},
        {"bbox": "100,-70,-100,70", "zoom": "3:4"},
        {"bbox": "0.1,0.1,0.2,0.2"},
    ],
)
def test_zoom_and_box(tmp_path: Path, suffix: str, settings: dict[str, str]) -> None:
    tiles = {**square(4, 256), **square(3, 64, 300), **square(2, 16, 400), **square(0, 1, 500)}
    path = tmp_path / f"a{suffix}"
    write_mbtiles(path, tiles) if suffix == ".mbtiles" else write_pmtiles(path, tiles, leaf_size=20)
    selection = RunConfig(input="a", output="b", **settings).tile_selection()  # type: ignore[arg-type]
    expected = {tile: data for tile, data in tiles.items() if selection.contains(*tile)}
    assert 0 < len(expected) < len(tiles)
    assert tiles_of(planned(path, **settings)) == expected


def test_leaf_directories_outside_of_the_selection_are_not_read(tmp_path: Path) -> None:
    tiles = square(6, 4096)
    path = write_pmtiles(tmp_path / "a.pmtiles", tiles, leaf_size=16)
    selection = Selection(6, 6, bounds(6, 40, 20))
    with access.open_read(str(path)) as file:
        data = file.read()
    read: list[tuple[int, int]] = []

    def read_range(start: int, stop: int) -> bytes:
        read.append((start, stop))
        return data[start:stop]

    header = pmtiles._header("a", data[:127])
    header["leaf_directory_length"] = 0  # without reading ahead
    entries = list(pmtiles._Directories("a", header, read_range, len(data), selection).entries())
    assert [each.ids.tolist() for each in entries if isinstance(each, pmtiles._Entries)] == [[tile_ids(6, 40, 20)]]
    assert len(read) == 2, "the root and one leaf"


def test_a_selection_without_tiles_is_refused(tmp_path: Path) -> None:
    path = write_pmtiles(tmp_path / "a.pmtiles", square(3, 5))
    other = write_mbtiles(tmp_path / "b.mbtiles", square(7, 5))
    with pytest.raises(InputRefused, match="contains no tiles of --zoom 7"):
        planned(path, zoom="7")
    assert sum(shard.rows or 0 for shard in planned(tmp_path, zoom="7")) == 5
    assert other.exists()


def test_a_selection_of_other_images_is_refused(tmp_path: Path) -> None:
    write_pmtiles(tmp_path / "a.pmtiles", square(3, 5))
    (tmp_path / "photo.png").write_bytes(tile_image(0))
    with pytest.raises(InputRefused, match=r"--zoom selects tiles, and .*photo\.png is none"):
        planned(tmp_path, zoom="3")


# What is refused


@pytest.mark.parametrize("tile_type", [TileType.MVT, TileType.MLT, TileType.UNKNOWN])
def test_pmtiles_without_images_are_refused_by_name(tmp_path: Path, tile_type: TileType) -> None:
    path = write_pmtiles(tmp_path / "a.pmtiles", square(2, 2), tile_type=tile_type)
    what = "tiles of an unknown kind" if tile_type is TileType.UNKNOWN else "vector tiles"
    with pytest.raises(InputRefused, match=rf"a\.pmtiles holds {what} \({tile_type.name.lower()}\)"):
        planned(path)
    write_pmtiles(tmp_path / "b.pmtiles", square(2, 2))
    archive = Archive(RunConfig(input=str(tmp_path), output="/none"))
    assert [shard.uri.rpartition("/")[2] for shard in archive.shards()] == ["b.pmtiles"]
    assert archive.left_out.counts == {".pmtiles without images": 1}


@pytest.mark.parametrize(
    ("tiles", "format", "message"),
    [
        ({(0, 0, 0): gzip.compress(b"\x1a\x10vector")}, "pbf", r"holds vector tiles \(pbf\)"),
        ({(0, 0, 0): gzip.compress(b"\x1a\x10vector")}, None, "holds tiles that do not begin as images"),
        ({(0, 0, 0): b"\0\0"}, "terrain", "holds tiles of the format terrain"),
        ({}, "png", "has no tiles"),
    ],
)
def test_mbtiles_without_images_are_refused_by_name(
    tmp_path: Path, tiles: dict[Tile, bytes], format: str | None, message: str
) -> None:
    with pytest.raises(InputRefused, match=rf"a\.mbtiles {message}"):
        planned(write_mbtiles(tmp_path / "a.mbtiles", tiles, format=format))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for name, data, message in [
        ("a.pmtiles", b"PM\2\0" + bytes(600), "PMTiles of version 1 or 2"),
        ("b.pmtiles", b"PMTiles\4" + bytes(600), "PMTiles of version 4"),
        ("c.pmtiles", b"<html>" * 100, "is not PMTiles"),
        ("d.pmtiles", b"", "has no bytes"),
        ("e.mbtiles", b"<html>" * 100, "file is not a database"),
        ("f.mbtiles", b"", "has no bytes"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputRefused, match=rf"{name} cannot be read as (PM|MB)Tiles: .*{message}"):
            planned(tmp_path / name)
    sqlite3.connect(tmp_path / "g.mbtiles").executescript("CREATE TABLE a (b); INSERT INTO a VALUES (1);")
    with pytest.raises(InputRefused, match="an SQLite database without `tiles`"):
        planned(tmp_path / "g.mbtiles")


def test_the_extra_is_named_if_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pmtiles(tmp_path / "a.pmtiles", square(2, 2), compression=Compression.BROTLI)
    for module in ("brotli", "pmtiles.tile"):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            with pytest.raises(InputRefused, match=r"pip install 'nightshift\[geo\]'"):
                planned(path)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "pmtiles.tile", None)
        assert planned(write_mbtiles(tmp_path / "a.mbtiles", square(2, 2)))


# What is broken


def test_pmtiles_that_were_cut_short(tmp_path: Path) -> None:
    path = write_pmtiles(tmp_path / "a.pmtiles", square(4, 40))
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 2])
    (shard,) = planned(path)
    records = [record for record, *_ in rows_of([shard])]
    assert shard.rows == len(records) == 40
    good = [record for record in records if record.error is None]
    assert 10 < len(good) < 30
    assert {record.error.error_type for record in records if record.error} == {"corrupt"}
    assert len({image_id for _, _, image_id, _ in rows_of([shard])}) == 40


def test_a_broken_leaf_directory_costs_its_tiles(tmp_path: Path) -> None:
    path = write_pmtiles(tmp_path / "a.pmtiles", square(4, 60), leaf_size=10)
    header = pmtiles._header("a", path.read_bytes()[:127])
    data = bytearray(path.read_bytes())
    middle = header["leaf_directory_offset"] + header["leaf_directory_length"] // 2
    data[middle : middle + 20] = bytes(20)
    path.write_bytes(data)
    shards = planned(path)
    rows = list(rows_of(shards))
    errors = [record for record, *_ in rows if record.error]
    assert len(rows) == sum(shard.rows or 0 for shard in shards)
    assert 1 <= len(errors) <= 2
    assert 40 <= len(rows) - len(errors) <= 50
    assert all("the directory at" in record.error.message for record in errors if record.error)
    assert len({image_id for _, _, image_id, _ in rows}) == len(rows)


@pytest.mark.parametrize(("count", "rows"), [(0, 20), (20, 20), (25, 21), (7, 20)])
def test_the_number_of_tiles_in_the_header_is_checked(tmp_path: Path, count: int, rows: int) -> None:
    path = write_pmtiles(tmp_path / "a.pmtiles", square(4, 20))
    data = bytearray(path.read_bytes())
    data[72:80] = count.to_bytes(8, "little")
    path.write_bytes(data)
    archive = Archive(RunConfig(input=str(path), output="/none"))
    found = list(rows_of(list(archive.shards())))
    messages = [record.error.message for record, *_ in found if record.error]
    assert len(found) == rows
    assert len(messages) == (count == 25)
    assert all(f"{count} " in message and "header" in message for message in messages)
    assert list(archive.notices.lines()) == ([f"{path}: {pmtiles.MORE_TILES}"] if count == 7 else [])


@pytest.mark.parametrize("zooms", [(0, 0), (9, 29), (255, 0)])
def test_wrong_zooms_in_the_header_lose_no_tiles(tmp_path: Path, zooms: tuple[int, int]) -> None:
    tiles = {**square(4, 60), **square(2, 3, 100)}
    path = write_pmtiles(tmp_path / "a.pmtiles", tiles, leaf_size=16)
    data = bytearray(path.read_bytes())
    data[100:102] = bytes(zooms)
    path.write_bytes(data)
    assert tiles_of(planned(path, bbox="-180,-85,180,85")) == tiles
    assert tiles_of(planned(path, bbox="-180,-85,-100,85", zoom="2:4")) == {
        tile: data for tile, data in tiles.items() if tile[0] == 2 or tile[1] < 4
    }


def with_root(path: Path, entries: list[Entry], **header: int) -> Path:
    """Write an archive of one directory, which nothing checks. header: offset of 8 bytes as `at_72` → number."""
    write_pmtiles(path, square(0, 1))
    data, image = bytearray(path.read_bytes()[:127]), tile_image(0)
    root = serialize_directory(entries)
    places = {16: len(root), 24: 127 + len(root), 32: 0, 40: 127 + len(root), 48: len(image), 56: 127 + len(root)}
    for place, value in {**places, **{int(name[3:]): value for name, value in header.items()}}.items():
        data[place : place + 8] = value.to_bytes(8, "little")
    path.write_bytes(bytes(data) + root + image)
    return path


def test_runs_that_are_too_long_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(tile_image(0))
    entries = [Entry(1, 0, size, 1), Entry(1398101, 0, size, 10**9), Entry(2 * 10**9, 0, size, 1)]
    rows = list(rows_of(planned(with_root(tmp_path / "a.pmtiles", entries, at_72=3))))
    messages = [record.error.message for record, *_ in rows if record.error]
    assert (len(rows), len(messages)) == (3, 1)
    assert "the entry of tile 11/0/0 stands for 1000000000 tiles, more than the 3 of its header" in messages[0]
    path = with_root(tmp_path / "b.pmtiles", [Entry(1, 0, size, 10**15)], at_72=0)
    with pytest.raises(InputRefused, match="is broken: the size, length or offset of an entry is larger"):
        planned(path)
    monkeypatch.setattr(pmtiles, "MAX_TILES", 40_000)
    path = with_root(tmp_path / "c.pmtiles", [Entry(1398101, 0, size, 10**9)], at_72=0)
    shards = planned(path)
    (lost,) = rows_of(shards[2:])
    assert [shard.rows for shard in shards] == [16_384, 16_384, 1]
    assert lost[0].error
    assert "more than 40000 tiles, of which 32768 are read; select" in lost[0].error.message


@pytest.mark.parametrize("place", [8, 16, 40, 48, 56])
def test_offsets_of_64_bits_are_refused(tmp_path: Path, place: int) -> None:
    entries = [Entry(0, 0, len(tile_image(0)), 1)]
    path = with_root(tmp_path / "a.pmtiles", entries, **{f"at_{place}": (1 << 64) - 1})
    with pytest.raises(InputRefused, match="in its header is 18446744073709551615, which no file reaches"):
        planned(path)


def test_a_bomb_of_directories_is_refused(tmp_path: Path) -> None:
    path = with_root(tmp_path / "a.pmtiles", [Entry(0, 0, 1, 1)])
    bomb = gzip.compress(bytes(pmtiles.MAX_DIRECTORY_BYTES + 1))
    data = bytearray(path.read_bytes()[:127])
    data[16:24] = len(bomb).to_bytes(8, "little")
    path.write_bytes(bytes(data) + bomb)
    with pytest.raises(InputRefused, match="the directory at 127: it has more than 8388608 bytes"):
        planned(path)
    entries = [Entry(number, 0, 30, 0) for number in range(1, 2000)]
    rows = list(rows_of(planned(with_root(tmp_path / "b.pmtiles", entries))))
    messages = [record.error.message for record, *_ in rows if record.error]
    assert len(rows) == len(messages) == 2
    assert "1998 of its directories are another one again" in messages[0]


def test_mbtiles_that_were_cut_short(tmp_path: Path) -> None:
    """Without its index an archive cannot be read; otherwise a lost page costs its tiles."""
    tiles = {tile: tile_image(n, side=64) for n, tile in enumerate(square(5, 90))}
    path = write_mbtiles(tmp_path / "a.mbtiles", tiles)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputRefused, match=r"cannot be read as MBTiles: .*malformed"):
        planned(path)
    write_mbtiles(tmp_path / "whole.mbtiles", tiles)
    rows = list(rows_of(planned(tmp_path)))
    assert [record.error.error_type for record, *_ in rows if record.error] == ["corrupt"]
    assert len(rows) == 91
    write_mbtiles(path, tiles, "map")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 8192 * 4096])
    rows = list(rows_of(planned(path)))
    kinds = [record.error and record.error.error_type for record, *_ in rows]
    assert set(kinds) == {None, "corrupt"}
    assert 5 < kinds.count(None) < 70


def test_a_broken_page_of_mbtiles_costs_its_tiles(tmp_path: Path) -> None:
    path = write_mbtiles(tmp_path / "a.mbtiles", {tile: tile_image(n, side=64) for n, tile in enumerate(square(5, 90))})
    whole = bytearray(path.read_bytes())
    with sqlite3.connect(path) as database:
        (page,) = database.execute("SELECT pageno FROM dbstat WHERE name = 'tiles' AND pagetype = 'leaf'").fetchone()
    whole[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
    path.write_bytes(whole)
    (shard,) = planned(path)
    kinds = [record.error and record.error.error_type for record, *_ in rows_of([shard])]
    assert set(kinds) == {None, "corrupt"}
    assert len(kinds) == 90


def test_rows_that_are_no_tiles_are_errors(tmp_path: Path) -> None:
    path = write_mbtiles(tmp_path / "a.mbtiles", square(3, 5), "no index")
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO tiles VALUES (3, 8, 0, x'00'), (3, -1, 0, x'00'), ('x', 1, 1, x'00')")
        database.execute("INSERT INTO tiles SELECT * FROM tiles WHERE tile_column = 0 LIMIT 1")
    shards = planned(path)
    assert sum(shard.rows or 0 for shard in shards) == 9
    rows = list(rows_of([replace(shard, index=index) for index, shard in enumerate(shards)]))
    messages = [record.error.message for record, *_ in rows if record.error]
    assert len(messages) == 4
    assert any("2 of its tiles do not exist at their zoom, one has zoom 3, column" in message for message in messages)
    assert any("1 of its tiles occur more than once" in message for message in messages)
    assert any("1 of its tiles are not numbers" in message for message in messages)
    assert len({image_id for _, _, image_id, _ in rows}) == 9


@pytest.mark.parametrize("settings", [{"zoom": "3"}, {"bbox": "-180,-85,180,85"}])
@pytest.mark.parametrize("type_", ["", "text"])
def test_rows_that_are_no_tiles_are_errors_in_a_selection(tmp_path: Path, settings: dict[str, str], type_: str) -> None:
    path = write_mbtiles(tmp_path / "a.mbtiles", {**square(3, 5), **square(2, 5, 10)}, "no index")
    with sqlite3.connect(path) as database:
        database.execute(f"CREATE TABLE other (zoom_level {type_}, tile_column, tile_row, tile_data)")
        database.execute("INSERT INTO other SELECT * FROM tiles")
        database.execute("INSERT INTO other VALUES ('3', 7, 7, x'00'), (NULL, 1, 1, x'00'), (2.5, 1, 1, x'00')")
        database.execute("DROP TABLE tiles")
        database.execute("ALTER TABLE other RENAME TO tiles")
    shards = planned(path, **settings)
    messages = [record.error.message for record, *_ in rows_of(shards) if record.error]
    count = 13 if type_ else 3
    assert len(messages) == count
    assert all(f"{count} of its tiles are not numbers" in message for message in messages)
    good = 0 if type_ else 5 if "zoom" in settings else 10
    assert sum(shard.rows or 0 for shard in shards) == good + count


@pytest.mark.parametrize("names", [["rowid"], ["ROWID", "_rowid_"], ["rowid", "_rowid_", "oid"]])
@pytest.mark.parametrize("layout", ["no index", "map", "shallow"])
def test_columns_that_are_called_rowid(tmp_path: Path, layout: Layout, names: list[str]) -> None:
    tiles = {**square(3, 20), (3, 7, 7): tile_image(3)}
    path = write_mbtiles(tmp_path / "a.mbtiles", tiles, layout)
    table = {"no index": "tiles", "map": "images", "shallow": "tiles_data"}[layout]
    with sqlite3.connect(path) as database:
        for name in names:
            database.execute(f"ALTER TABLE {table} ADD COLUMN {name} DEFAULT 1")
    assert tiles_of(planned(path)) == tiles


JOIN = "FROM map JOIN images ON map.tile_id = images.tile_id"
COLUMNS = "map.zoom_level AS zoom_level, map.tile_column, map.tile_row, images.tile_data"


@pytest.mark.parametrize(
    ("view", "is_join"),
    [
        (f"SELECT {COLUMNS} {JOIN}", True),
        (f"select  zoom_level, tile_column,\n tile_row, tile_data, images.tile_id {JOIN};", True),
        (f'SELECT "map"."zoom_level", [map].tile_column, `tile_row`, tile_data {JOIN}', True),
        ("SELECT zoom_level, tile_column, tile_row, tile_data FROM map LEFT JOIN images USING (tile_id)", True),
        (f"SELECT {COLUMNS} FROM map INNER JOIN images ON (images.tile_id == map.tile_id)", True),
        (f"SELECT {COLUMNS} {JOIN} WHERE zoom_level = 3", False),
        (f"SELECT zoom_level, tile_column, 7 - tile_row AS tile_row, tile_data {JOIN}", False),
        (f"SELECT zoom_level, tile_row AS tile_column, tile_column AS tile_row, tile_data {JOIN}", False),
        (f"SELECT zoom_level, tile_column, tile_row, images.other AS tile_data {JOIN}", False),
        (f"SELECT {COLUMNS} {JOIN} LIMIT 3", False),
        (f"SELECT {COLUMNS} {JOIN} AND tile_row < 4", False),
        (f"SELECT {COLUMNS} FROM map JOIN images ON images.tile_id = map.tile_id || ''", False),
    ],
)
def test_a_view_of_the_author_is_read_as_it_is(tmp_path: Path, view: str, is_join: bool) -> None:
    path = write_mbtiles(tmp_path / "a.mbtiles", {**square(3, 20), **square(2, 3, 30)}, "map")
    with sqlite3.connect(path) as database:
        database.execute("ALTER TABLE images ADD COLUMN other")
        database.execute("UPDATE images SET other = tile_data")
        database.execute("DROP VIEW tiles")
        database.execute(f"CREATE VIEW tiles AS {view}")
        expected = {(z, x, y): data for z, x, y, data in database.execute("SELECT * FROM tiles".replace("*", FIELDS))}
        assert mbtiles._layout(database, "a").has_rowids == is_join
    rows = [row for row in rows_of(planned(path)) if not row[0].error]
    assert {(k["tile_z"], k["tile_x"], (1 << k["tile_z"]) - 1 - k["tile_y"]): r.data for r, _, _, k in rows} == {
        place: data for place, data in expected.items() if 0 <= place[2] < 1 << place[0]
    }


FIELDS = "zoom_level, tile_column, tile_row, tile_data"


def test_a_place_without_data_is_an_error(tmp_path: Path) -> None:
    tiles: dict[Tile, bytes | None] = {**square(3, 3), (3, 7, 7): None, (3, 7, 6): None}
    (shard,) = planned(write_mbtiles(tmp_path / "a.mbtiles", tiles, "map"))
    kinds = {image_id[-5:]: record.error and record.error.error_type for record, _, image_id, _ in rows_of([shard])}
    assert [kinds["3/7/7"], kinds["3/7/6"], kinds["3/0/0"]] == ["not_found", "not_found", None]


def test_a_decompression_bomb_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MAX_MEMBER_BYTES", 1 << 20)
    for name, compress in (("gzip", Compression.GZIP), ("zstd", Compression.ZSTD), ("brotli", Compression.BROTLI)):
        from tile_archives import COMPRESS

        assert shared.decompress(COMPRESS[compress](bytes(1 << 20)), name) == bytes(1 << 20)
        with pytest.raises(shared.Oversized):
            shared.decompress(COMPRESS[compress](bytes(1 << 26)), name)
        with pytest.raises(ValueError, match="is broken"):
            shared.decompress(COMPRESS[compress](tile_image(0))[:-30], name)


# Stores


def test_pmtiles_over_http_are_read_by_ranges(tmp_path: Path) -> None:
    tiles = {(8, x, y): tile_image(x * 40 + y, side=48) for x in range(40) for y in range(40)}
    path = write_pmtiles(tmp_path / "a.pmtiles", tiles, leaf_size=100)
    assert path.stat().st_size > 8 << 20
    with serve(path.read_bytes()) as (address, server):
        west, south, east, north = bounds(8, 30, 30)
        shards = planned(f"{address}/a.pmtiles", bbox=f"{west},{south},{east},{north}", zoom="8")
        assert tiles_of(shards) == {(8, 30, 30): tiles[8, 30, 30]}
        assert server.whole == 0
        assert len(tiles_of(planned(f"{address}/a.pmtiles"))) == 1600
        assert server.whole == 0


@pytest.mark.parametrize("suffix", [".mbtiles", ".pmtiles"])
def test_archives_in_an_object_store(
    tmp_path: Path, s3: S3Server, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_CACHE", str(tmp_path / "cache"))
    tiles = {tile: OCEAN if tile[1] % 3 else data for tile, data in square(5, 200).items()}
    path = tmp_path / f"a{suffix}"
    write_mbtiles(path, tiles, "map") if suffix == ".mbtiles" else write_pmtiles(path, tiles, leaf_size=10)
    uri = s3.uri(f"tiles/a{suffix}")
    access.write(uri, path.read_bytes())
    shards = planned(uri)
    assert tiles_of(shards) == tiles
    assert len(list((tmp_path / "cache").rglob("*.mbtiles"))) == (suffix == ".mbtiles"), "copied once"
    access.write(uri, path.read_bytes() + bytes(4096))
    records = [record for record, *_ in rows_of(shards)]
    assert {record.error and record.error.error_type for record in records} == {"changed"}
    assert len(records) == 200


# Real archives


@pytest.mark.skipif(not SATELLITE.exists(), reason="the real archives are not in this checkout")
def test_real_archives() -> None:
    (world,) = planned(SATELLITE / "one_tile.mbtiles")
    with sqlite3.connect(f"file:{SATELLITE}/one_tile.mbtiles?immutable=1", uri=True) as database:
        (count,) = database.execute("SELECT count(*) FROM map").fetchone()
    assert world.rows == len(tiles_of([world])) == count
    (whitney,) = planned(SATELLITE / "usgs_mt_whitney_z8-15_webp.pmtiles")
    tiles = tiles_of([whitney])
    assert len(tiles) == 50
    for z, x, y in tiles:
        west, south, east, north = bounds(z, x, y)
        assert west < -118.2606
        assert east > -118.3199
        assert south < 36.5931
        assert north > 36.5610


def test_an_archive_that_planning_could_not_inspect_is_read_as_one_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pmtiles, "TILES_PER_SHARD", 16)
    tiles = {tile: OCEAN if tile[1] else data for tile, data in square(5, 60).items()}
    path = write_pmtiles(tmp_path / "a.pmtiles", tiles, leaf_size=4)
    header = pmtiles._header("a", path.read_bytes()[:127])
    data = bytearray(path.read_bytes())
    for offset in (header["leaf_directory_offset"] + 30, header["tile_data_offset"] - 30):
        data[offset : offset + 10] = bytes(10)
    path.write_bytes(data)
    shard = Shard(0, "pmtiles", str(path), etag=access.head(str(path)).etag)
    rows = list(rows_of([shard]))
    parts = planned(path)
    assert [row for _, row, _, _ in rows] == list(range(sum(part.rows or 0 for part in parts)))
    assert len({image_id for _, _, image_id, _ in rows}) == len(rows)
    assert sum(record.error is not None for record, *_ in rows) in (2, 3, 4), "each of the broken directories is one"
    assert [image_id for _, _, image_id, _ in rows_of([shard], ((20, 30),))] == [each[2] for each in rows[20:30]]


def test_copies_of_mbtiles_are_kept_for_a_day(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_CACHE", str(tmp_path))
    path = write_mbtiles(tmp_path / "local.mbtiles", square(3, 5))
    folder = tmp_path / "mbtiles"
    for name in ("a", "b"):
        access.write(s3.uri(f"copies/{name}.mbtiles"), path.read_bytes())
    planned(s3.uri("copies/a.mbtiles"))
    (first,) = folder.glob("*.mbtiles")
    os.utime(first, (0, 0))
    assert len(tiles_of(planned(s3.uri("copies/a.mbtiles")))) == 5
    assert first.stat().st_mtime > 0, "it was used again"
    os.utime(first, (0, 0))
    planned(s3.uri("copies/b.mbtiles"))
    (second,) = folder.glob("*.mbtiles")
    assert second != first
    monkeypatch.setattr("pipeline.sources.mbtiles.FREE_BYTES", 1 << 60)
    with pytest.raises(
        NightshiftError, match=r"a\.mbtiles has \d+ bytes and must be copied to .*: set NIGHTSHIFT_CACHE"
    ):
        planned(s3.uri("copies/a.mbtiles"))
