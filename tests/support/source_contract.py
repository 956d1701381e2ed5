"""The contract that every source fulfils, as test classes to inherit from."""

import functools
import gc
import io
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from servers import S3Server

from pipeline import sources
from pipeline.coverage import END, Ranges
from pipeline.sources import ReadOptions, Record, ShardEnd, tar, zip
from pipeline.sources.shard import Shard
from pipeline.storage import access

ALL: Ranges = ((0, END),)
Members = Sequence[tuple[str, bytes]]


@functools.cache
def image(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (12, 10, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def numbered(count: int) -> list[tuple[str, bytes]]:
    return [(f"d/{number:03d}.png", image(number)) for number in range(count)]


def read_all(shard: Shard, todo: Ranges = ALL, **options: tuple[str, ...] | str) -> tuple[list[Record], int]:
    """Read, check what holds for every read, and return the records and the number of rows."""
    *items, end = sources.read(shard, todo, ReadOptions(**options))  # type: ignore[arg-type]
    assert isinstance(end, ShardEnd)
    assert all(isinstance(item, Record) for item in items)
    rows = [item.row for item in items]
    assert rows == sorted(set(rows))
    assert all(any(start <= row < stop for start, stop in todo) and row < end.rows for row in rows)
    assert len({item.image_id for item in items}) == len(items)
    assert all((item.data is None) == (item.error is not None) for item in items)
    return items, end.rows


def error_types(items: list[Record]) -> list[str | None]:
    return [item.error and item.error.error_type for item in items]


class SourceContract:
    """Subclasses define `kind` and `make`, which writes a shard of named images."""

    kind = ""

    def make(self, folder: Path, members: Members) -> Shard:
        raise NotImplementedError

    def test_each_image_is_one_row_in_order(self, tmp_path: Path) -> None:
        items, total = read_all(self.make(tmp_path, numbered(20)))
        assert [item.row for item in items] == list(range(20))
        assert [item.data for item in items] == [image(number) for number in range(20)]
        assert total == 20
        assert all(item.source and item.image_id.startswith(item.source) for item in items)
        assert all(0 <= item.read_seconds < 60 for item in items)

    def test_only_the_rows_in_todo_are_read(self, tmp_path: Path) -> None:
        shard = self.make(tmp_path, numbered(20))
        whole, _ = read_all(shard)
        for todo in [((3, 5), (7, 9)), ((0, 1),), ((19, 20),), ((4, 6), (17, END)), ((20, END),), ()]:
            items, total = read_all(shard, todo)
            wanted = [row for row in range(20) if any(start <= row < stop for start, stop in todo)]
            assert [(i.row, i.image_id, i.data) for i in items] == [
                (row, whole[row].image_id, whole[row].data) for row in wanted
            ]
            assert total == 20

    def test_a_shard_without_images(self, tmp_path: Path) -> None:
        assert read_all(self.make(tmp_path, [])) == ([], 0)

    def test_suffixes_in_upper_and_lower_case(self, tmp_path: Path) -> None:
        items, total = read_all(self.make(tmp_path, [("A.PNG", image(1)), ("b.Jpeg", image(2))]))
        assert [item.data for item in items] == [image(1), image(2)]
        assert total == 2

    def test_a_read_that_is_closed_early_closes_its_files(self, tmp_path: Path) -> None:
        shard = self.make(tmp_path, numbered(20))
        gc.collect()
        before = set(os.listdir("/proc/self/fd"))
        reading = sources.read(shard, ALL, ReadOptions())
        next(reading)
        reading.close()  # type: ignore[attr-defined]
        del reading
        assert set(os.listdir("/proc/self/fd")) <= before, "others may be closed meanwhile"

    def test_a_missing_object_is_an_error(self, tmp_path: Path) -> None:
        shard = self.make(tmp_path, numbered(1))
        for file in tmp_path.rglob("*.*"):
            file.unlink()
        items, total = read_all(shard)
        assert error_types(items) == ["not_found"]
        assert total == 1

    def test_a_changed_object_is_an_error(self, tmp_path: Path) -> None:
        shard = self.make(tmp_path, numbered(1))
        assert error_types(read_all(shard)[0]) == [None]
        for file in tmp_path.rglob("*.*"):
            file.write_bytes(file.read_bytes() + b"\0")
        items, total = read_all(shard)
        assert error_types(items) == ["changed"]
        assert total == 1


class ArchiveContract(SourceContract):
    """Sources whose shard is one object. Subclasses define `kind`, `suffix` and `write`."""

    suffix = ""

    def write(self, path: Path, members: Members, texts: Sequence[str] = ()) -> None:
        """Write the images, and the texts as the `txt` value of each image."""
        raise NotImplementedError

    def make(self, folder: Path, members: Members, texts: Sequence[str] = ()) -> Shard:
        path = folder / f"shard{self.suffix}"
        self.write(path, members, texts)
        return Shard(0, self.kind, str(path), None, path.stat().st_size, access.head(str(path)).etag)

    def test_the_plan_can_limit_the_rows(self, tmp_path: Path) -> None:
        shard = replace(self.make(tmp_path, numbered(20)), rows=6)
        items, total = read_all(shard)
        assert [item.data for item in items] == [image(number) for number in range(6)]
        assert total == 6
        assert [item.row for item in read_all(shard, ((4, 6),))[0]] == [4, 5]
        assert read_all(shard, ()) == ([], 6)

    def test_a_shard_with_fewer_rows_than_planned(self, tmp_path: Path) -> None:
        items, total = read_all(replace(self.make(tmp_path, numbered(3)), rows=6), ((1, 6),))
        assert error_types(items) == [None, None, "not_found", "not_found", "not_found"]
        assert "holds only 3 images" in items[-1].error.message  # type: ignore[union-attr]
        assert total == 6

    def test_counted_rows_that_are_missing_are_errors(self, tmp_path: Path) -> None:
        items, total = read_all(self.make(tmp_path, numbered(3)), ((1, 2), (4, 6)))
        assert error_types(items) == [None, "not_found", "not_found"]
        assert total == 6

    def test_a_missing_shard_is_one_error_per_planned_row(self, tmp_path: Path) -> None:
        shard = Shard(0, self.kind, str(tmp_path / f"none{self.suffix}"), rows=5)
        items, total = read_all(shard, ((1, 3), (4, 5)))
        assert error_types(items) == ["not_found"] * 3
        assert total == 5

    def test_a_missing_shard_of_unknown_length_is_one_error(self, tmp_path: Path) -> None:
        shard = Shard(0, self.kind, str(tmp_path / f"none{self.suffix}"))
        items, total = read_all(shard, ((7, END),))
        assert [item.row for item in items] == [7]
        assert total == 8
        items, total = read_all(shard, ((2, 3), (5, 7)))
        assert [item.row for item in items] == [2, 5, 6]
        assert total == 7

    def test_a_file_of_another_format_is_one_error(self, tmp_path: Path) -> None:
        for number, data in enumerate([b"<html>no such bucket</html>" * 40, b"<html>", b"PK\3\4" + b"x" * 4000]):
            path = tmp_path / f"{number}{self.suffix}"
            path.write_bytes(data)
            items, total = read_all(Shard(0, self.kind, str(path)))
            assert error_types(items) == ["corrupt"]
            assert str(path) in items[0].error.message  # type: ignore[union-attr]
            assert total == 1

    def test_repeated_names_have_different_ids(self, tmp_path: Path) -> None:
        members = [("a.png", image(1)), ("b.png", image(2)), ("a.png", image(3)), ("a.png", image(4))]
        shard = self.make(tmp_path, members)
        items, _ = read_all(shard)
        assert [item.data for item in items] == [data for _, data in members]
        assert [item.member for item in items] == ["a.png", "b.png", "a.png", "a.png"]
        assert [item.image_id for item in items] == [
            f"{shard.uri}#{name}" for name in ("a.png", "b.png", "a.png#row=2", "a.png#row=3")
        ]
        assert [item.image_id for item in read_all(shard, ((2, 3),))[0]] == [items[2].image_id]

    def test_kept_values(self, tmp_path: Path) -> None:
        texts = ["cat", "", "chat ☃"]
        shard = self.make(tmp_path, numbered(3), texts)
        items, total = read_all(shard, keep=("txt", "none"))
        assert [dict(item.kept) for item in items] == [{"txt": text} for text in texts]
        assert [item.data for item in items] == [image(number) for number in range(3)]
        assert total == 3
        assert [dict(i.kept) for i in read_all(shard, ((2, END),), keep=("txt",))[0]] == [{"txt": "chat ☃"}]

    def test_a_read_that_is_closed_early_leaves_no_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shard = self.make(tmp_path, numbered(20), [""] * 20)
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        before = os.listdir("/proc/self/fd")
        reading = sources.read(shard, ALL, ReadOptions(keep=("txt",)))
        next(reading)
        reading.close()  # type: ignore[attr-defined]
        del reading
        assert os.listdir("/proc/self/fd") == before
        assert not list(temporary.iterdir())

    @pytest.mark.parametrize("keep", [(), ("txt",)])
    def test_a_shard_in_an_object_store(self, tmp_path: Path, s3: S3Server, keep: tuple[str, ...]) -> None:
        local = self.make(tmp_path, numbered(20), ["cat"] * 20)
        uri = s3.uri(f"sources/{self.kind}-{len(keep)}/shard{self.suffix}")
        access.write(uri, Path(local.uri).read_bytes())
        shard = replace(local, uri=uri, etag=access.head(uri).etag)
        for todo in (ALL, ((3, 5), (17, 18))):
            here, there = read_all(local, todo, keep=keep), read_all(shard, todo, keep=keep)
            assert [(i.row, i.member, i.data, i.kept) for i in there[0]] == [
                (i.row, i.member, i.data, i.kept) for i in here[0]
            ]
            assert here[1] == there[1]

    def test_a_lost_connection_ends_the_shard(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shard = self.make(tmp_path, numbered(400))
        lost_at = shard.size_bytes // 2
        self.lose_bytes(monkeypatch, lost_at, lost_at + 20_000)
        items, total = read_all(shard)
        good = [item for item in items if item.error is None]
        assert 50 < len(good) < 350
        assert [item.data for item in good] == [image(number) for number in range(len(good))]
        assert set(error_types(items[len(good) :])) == {"unreadable"}
        assert total == len(items)
        assert "connection lost" in items[-1].error.message  # type: ignore[union-attr]

    @pytest.mark.parametrize("lost", ["all", "end"])
    def test_a_shard_that_cannot_be_read_for_the_moment_is_unreadable(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
    ) -> None:
        """The directory of a zip and of a Parquet file is at its end."""
        shard = self.make(tmp_path, numbered(20), ["cat"] * 20)
        self.lose_bytes(monkeypatch, 0 if lost == "all" else shard.size_bytes - 1, shard.size_bytes)
        for keep in ((), ("txt",)):
            items, _ = read_all(shard, keep=keep)
            assert set(error_types(items)) - {None} <= {"unreadable"}
            assert lost == "end" or error_types(items) == ["unreadable"]

    @staticmethod
    def lose_bytes(monkeypatch: pytest.MonkeyPatch, start: int, stop: int) -> None:
        """Let reads of this range of every object fail."""

        class Lossy(io.FileIO):
            def readinto(self, buffer: "bytearray") -> int | None:  # type: ignore[override]
                if self.tell() < stop and self.tell() + len(buffer) > start:
                    raise OSError("connection lost")
                return super().readinto(buffer)

        def open_read(uri: str, etag: str = "") -> BinaryIO:
            return io.BufferedReader(Lossy(uri), 4096)

        monkeypatch.setattr(access, "open_read", open_read)

    def test_broken_bytes_never_raise(self, tmp_path: Path) -> None:
        shard = replace(self.make(tmp_path, numbered(6), ["x"] * 6), etag="")
        whole = Path(shard.uri).read_bytes()
        flips = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))

        @settings(max_examples=40, deadline=None, database=None)
        @given(st.lists(flips, min_size=1, max_size=3))
        def check(flipped: list[tuple[int, int]]) -> None:
            broken = bytearray(whole)
            for place, value in flipped:
                broken[place] = value
            Path(shard.uri).write_bytes(broken)
            items, total = read_all(shard)
            assert [item.row for item in items] == list(range(total))
            for start in (2, 5):
                again, same_total = read_all(shard, ((start, END),))
                assert [item.row for item in again] == list(range(start, same_total))
                assert same_total == max(total, start)

        check()


class MemberContract(ArchiveContract):
    """Sources whose shard is an archive of named files."""

    def test_only_images_are_rows(self, tmp_path: Path) -> None:
        members = [
            ("readme.txt", b"hello"),
            ("a.png", image(1)),
            ("a.json", b"{}"),
            ("._a.png", b"resource fork"),
            ("__MACOSX/d/._b.png", b"resource fork"),
            ("__MACOSX/d/c.png", b"resource fork"),
            ("d/b.png", image(2)),
            ("/etc/../../b.png", image(3)),
            ("no.png/file", b""),
            ("empty.png", b""),
        ]
        items, total = read_all(self.make(tmp_path, members))
        assert [(item.member, item.data) for item in items] == [
            ("a.png", image(1)),
            ("d/b.png", image(2)),
            ("/etc/../../b.png", image(3)),
            ("empty.png", b""),
        ]
        assert total == 4
        assert sorted(tmp_path.rglob("*")) == [tmp_path / f"shard{self.suffix}"]

    def test_members_that_are_not_read_are_counted_by_suffix(self, tmp_path: Path) -> None:
        images = [(f"{number}.png", image(number)) for number in range(3)]
        others = ["0.json", "1.json", "2.seg.txt", "notes.NPY", "LICENSE", ".hidden", "._0.json", "__MACOSX/d/x.json"]
        members = [images[0], *((name, b"{}") for name in others), *images[1:]]
        shard = self.make(tmp_path, members)
        json, text, rest = {".json": 2}, {".txt": 1}, {".npy": 1, "without a suffix": 1}
        for todo in (ALL, ((2, END),), ((0, 1), (2, 3))):
            for keep, expected in (
                ((), {**json, **text, **rest}),
                (("json",), {**text, **rest}),
                (("JSON", "seg.txt"), rest),
            ):
                *_, end = sources.read(shard, todo, ReadOptions(keep=keep))
                assert isinstance(end, ShardEnd)
                assert (end.rows, end.left_out) == (3, expected)
        *_, end = sources.read(replace(shard, rows=1), ALL, ReadOptions())
        assert isinstance(end, ShardEnd)
        assert (end.rows, end.left_out) == (1, {}), "--limit ends the read earlier"

    def test_members_of_any_name_are_found_by_their_first_bytes(self, tmp_path: Path) -> None:
        members = [
            ("0.img", image(0)),
            ("0.txt", b"a"),
            ("1", image(1)),
            ("1.txt", b"b"),
            ("2.png", image(2)),
            ("3.img", image(3)),
        ]
        shard = self.make(tmp_path, [*members, ("._3.img", image(4)), ("4.img", b"")])
        assert [item.member for item in read_all(shard)[0]] == ["2.png"]
        for keep in ((), ("txt",)):
            items, total = read_all(shard, any_suffix=True, keep=keep)  # type: ignore[arg-type]
            assert [item.data for item in items] == [image(number) for number in range(4)]
            assert total == 4
            assert [item.kept for item in items[:2]] == ([{"txt": "a"}, {"txt": "b"}] if keep else [{}, {}])
        for todo in [((1, 2),), ((3, END),), ()]:
            items, total = read_all(shard, todo, any_suffix=True)  # type: ignore[arg-type]
            assert [item.data for item in items] == [image(item.row) for item in items]
            assert total == 4

    def test_sidecars_are_found_anywhere_in_the_archive(self, tmp_path: Path) -> None:
        members = [
            ("a.json", b'{"x": 1}'),
            ("d/a.cls", b"7"),
            ("a.png", image(1)),
            ("d/a.left.png", image(2)),
            ("d/a.right.png", image(3)),
            ("c.png", image(4)),
            ("A.JSON", b"other key"),
            ("a.JSON", b'{"x": 2}'),
            ("c.cls", b"\xff9"),
        ]
        items, total = read_all(self.make(tmp_path, members), keep=("json", "cls"))
        assert [(item.data, dict(item.kept)) for item in items] == [
            (image(1), {"json": '{"x": 1}'}),
            (image(2), {"cls": "7"}),
            (image(3), {"cls": "7"}),
            (image(4), {"cls": "�9"}),
        ]
        assert total == 4

    def test_names_with_dots_have_sidecars(self, tmp_path: Path) -> None:
        members = [
            *(("22.00.jpg", image(0)), ("22.00.json", b"zero"), ("22.01.jpg", image(1)), ("22.01.json", b"one")),
            *(("22.json", b"all"), ("22.02.jpg", image(2)), ("d.1/3.a.jpg", image(3)), ("d.1/3.seg.json", b"other")),
        ]
        shard = self.make(tmp_path, members)
        kept = [dict(item.kept) for item in read_all(shard, keep=("json",))[0]]
        assert kept == [{"json": "zero"}, {"json": "one"}, {"json": "all"}, {}]
        kept = [dict(item.kept) for item in read_all(shard, keep=("seg.json",))[0]]
        assert kept == [{}, {}, {}, {"seg.json": "other"}]

    @pytest.mark.parametrize("first", ["jpg", "txt"])
    def test_images_with_one_key_have_the_nearest_sidecar(self, tmp_path: Path, first: str) -> None:
        pairs = [[("k.jpg", image(i)), ("k.txt", str(i).encode())] for i in range(4)]
        members = [member for pair in pairs for member in (pair if first == "jpg" else pair[::-1])]
        items, _ = read_all(self.make(tmp_path, members), keep=("txt",))
        assert [(item.data, item.kept["txt"]) for item in items] == [(image(i), str(i)) for i in range(4)]

    def test_a_member_that_is_too_large_is_one_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (tar, zip):
            monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 10_000)
        members = [("a.png", image(1)), ("bomb.png", bytes(10_001)), ("c.png", image(3))]
        items, _ = read_all(self.make(tmp_path, members))
        assert error_types(items) == [None, "too_large", None]
        assert items[2].data == image(3)
