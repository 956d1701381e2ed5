"""One contract for every source, then what is special to each."""

import functools
import gc
import gzip
import io
import os
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from conftest import S3Server
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import sources, storage
from pipeline.coverage import END, Ranges
from pipeline.errors import InputRefused
from pipeline.plan import Shard
from pipeline.sources import ReadOptions, Record, ShardEnd, parquet
from pipeline.sources.records import UniqueIds, split_key

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
    """The records and the total, after the checks that hold for every read."""
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
    """Subclasses give `make`, a shard of these images under these names, and `kind`."""

    kind = ""

    def make(self, folder: Path, members: Members) -> Shard:
        raise NotImplementedError

    def test_every_image_is_a_row_once_and_in_order(self, tmp_path: Path) -> None:
        items, total = read_all(self.make(tmp_path, numbered(20)))
        assert [item.row for item in items] == list(range(20))
        assert [item.data for item in items] == [image(number) for number in range(20)]
        assert total == 20
        assert all(item.source and item.image_id.startswith(item.source) for item in items)
        assert all(0 <= item.read_seconds < 60 for item in items)

    def test_only_the_rows_to_do_are_read(self, tmp_path: Path) -> None:
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

    def test_suffixes_in_either_case(self, tmp_path: Path) -> None:
        items, total = read_all(self.make(tmp_path, [("A.PNG", image(1)), ("b.Jpeg", image(2))]))
        assert [item.data for item in items] == [image(1), image(2)]
        assert total == 2

    def test_a_read_can_be_left_early(self, tmp_path: Path) -> None:
        shard = self.make(tmp_path, numbered(20))
        gc.collect()
        before = os.listdir("/proc/self/fd")
        reading = sources.read(shard, ALL, ReadOptions())
        next(reading)
        reading.close()  # type: ignore[attr-defined]
        del reading
        assert os.listdir("/proc/self/fd") == before

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


class TestObjects(SourceContract):
    kind = "objects"

    def make(self, folder: Path, members: Members) -> Shard:
        paths = [folder / name for name, _ in members]
        for path, (_, data) in zip(paths, members, strict=True):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        etags = tuple(storage.head(str(path)).etag for path in paths)
        return Shard(0, self.kind, str(folder), len(paths), keys=tuple(name for name, _ in members), key_etags=etags)


class ArchiveContract(SourceContract):
    """Sources whose shard is one object. Subclasses give `write`, `kind` and `suffix`."""

    suffix = ""

    def write(self, path: Path, members: Members, texts: Sequence[str] = ()) -> None:
        """Write the images, with the texts kept as `txt` of each image."""
        raise NotImplementedError

    def make(self, folder: Path, members: Members, texts: Sequence[str] = ()) -> Shard:
        path = folder / f"shard{self.suffix}"
        self.write(path, members, texts)
        return Shard(0, self.kind, str(path), None, path.stat().st_size, storage.head(str(path)).etag)

    def test_a_shard_can_be_cut_by_the_plan(self, tmp_path: Path) -> None:
        shard = replace(self.make(tmp_path, numbered(20)), rows=6)
        items, total = read_all(shard)
        assert [item.data for item in items] == [image(number) for number in range(6)]
        assert total == 6
        assert [item.row for item in read_all(shard, ((4, 6),))[0]] == [4, 5]
        assert read_all(shard, ()) == ([], 6)

    def test_a_shard_planned_larger_than_it_is(self, tmp_path: Path) -> None:
        items, total = read_all(replace(self.make(tmp_path, numbered(3)), rows=6), ((1, 6),))
        assert error_types(items) == [None, None, "not_found", "not_found", "not_found"]
        assert "holds only 3 images" in items[-1].error.message  # type: ignore[union-attr]
        assert total == 6

    def test_rows_once_counted_do_not_vanish(self, tmp_path: Path) -> None:
        items, total = read_all(self.make(tmp_path, numbered(3)), ((1, 2), (4, 6)))
        assert error_types(items) == [None, "not_found", "not_found"]
        assert total == 6

    def test_a_missing_shard_loses_every_planned_row(self, tmp_path: Path) -> None:
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

    def test_what_is_no_such_file_at_all_is_one_error(self, tmp_path: Path) -> None:
        for number, data in enumerate([b"<html>no such bucket</html>" * 40, b"<html>", b"PK\3\4" + b"x" * 4000]):
            path = tmp_path / f"{number}{self.suffix}"
            path.write_bytes(data)
            items, total = read_all(Shard(0, self.kind, str(path)))
            assert error_types(items) == ["corrupt"]
            assert str(path) in items[0].error.message  # type: ignore[union-attr]
            assert total == 1

    def test_names_met_twice_get_ids_of_their_own(self, tmp_path: Path) -> None:
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

    def test_leaving_early_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        storage.write(uri, Path(local.uri).read_bytes())
        shard = replace(local, uri=uri, etag=storage.head(uri).etag)
        for todo in (ALL, ((3, 5), (17, 18))):
            here, there = read_all(local, todo, keep=keep), read_all(shard, todo, keep=keep)
            assert [(i.row, i.member, i.data, i.kept) for i in there[0]] == [
                (i.row, i.member, i.data, i.kept) for i in here[0]
            ]
            assert here[1] == there[1]

    def test_a_connection_lost_for_good_ends_the_shard(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    @staticmethod
    def lose_bytes(monkeypatch: pytest.MonkeyPatch, start: int, stop: int) -> None:
        """A store that cannot read this range of an object."""

        class Lossy(io.FileIO):
            def readinto(self, buffer: "bytearray") -> int | None:  # type: ignore[override]
                if self.tell() < stop and self.tell() + len(buffer) > start:
                    raise OSError("connection lost")
                return super().readinto(buffer)

        def open_read(uri: str, etag: str = "") -> BinaryIO:
            return io.BufferedReader(Lossy(uri), 4096)

        monkeypatch.setattr(storage, "open_read", open_read)

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
    """Archives of named files."""

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

    def test_sidecars_are_found_wherever_they_lie(self, tmp_path: Path) -> None:
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
            (image(1), {"json": '{"x": 2}'}),
            (image(2), {"cls": "7"}),
            (image(3), {"cls": "7"}),
            (image(4), {"cls": "�9"}),
        ]
        assert total == 4

    def test_a_member_too_large_is_one_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (sources.tar, sources.zip):  # type: ignore[attr-defined]
            monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 10_000)
        members = [("a.png", image(1)), ("bomb.png", bytes(10_001)), ("c.png", image(3))]
        items, _ = read_all(self.make(tmp_path, members))
        assert error_types(items) == [None, "too_large", None]
        assert items[2].data == image(3)


def tar_bytes(members: Members, texts: Sequence[str] = (), format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members:
            add(archive, name, data)
        for (name, _), text in zip(members, texts, strict=False):
            add(archive, name.partition(".")[0] + ".txt", text.encode())
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", type: bytes = tarfile.REGTYPE, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), type, link
    archive.addfile(member, io.BytesIO(data))


def tar_shard(folder: Path, data: bytes, suffix: str = ".tar") -> Shard:
    path = folder / f"one{suffix}"
    path.write_bytes(data)
    return Shard(0, "tar", str(path))


class TestTar(MemberContract):
    kind, suffix = "tar", ".tar"

    @staticmethod
    def compress(data: bytes) -> bytes:
        return data

    def write(self, path: Path, members: Members, texts: Sequence[str] = ()) -> None:
        path.write_bytes(self.compress(tar_bytes(members, texts)))

    def test_a_shard_cut_anywhere_keeps_the_rows_before(self, tmp_path: Path) -> None:
        members = [(f"{number}.png", image(number)) for number in range(6)]
        data = self.compress(tar_bytes(members, ["text"] * 6))

        @settings(max_examples=60, deadline=None, database=None)
        @given(st.integers(0, len(data)))
        def check(length: int) -> None:
            shard = tar_shard(tmp_path, data[:length], self.suffix)
            items, total = read_all(shard)
            good = [item for item in items if item.error is None]
            assert [item.data for item in good] == [image(number) for number in range(len(good))]
            assert error_types(items[len(good) :]) in ([], ["truncated"], ["corrupt"], ["empty"])
            assert total == len(items)
            for todo, keep in [((), ()), (((2, 4),), ()), (ALL, ("txt",)), (((3, END),), ("txt",))]:
                again, same = read_all(shard, todo, keep=keep)
                assert same == max([total, *(start for start, _ in todo), *(s for _, s in todo if s != END)])
                kept = [(i.row, i.data, i.image_id) for i in again if i.row < total]
                assert kept == [(items[row].row, items[row].data, items[row].image_id) for row, _, _ in kept]
            assert [i.data for i in read_all(shard, ALL, keep=("txt",))[0]] == [i.data for i in items]

        check()


class TestTarGz(TestTar):
    suffix = ".tar.gz"

    @staticmethod
    def compress(data: bytes) -> bytes:
        half = len(data) // 2
        return gzip.compress(data[:half]) + gzip.compress(data[half:]) + bytes(512)


class TestTgz(TestTar):
    suffix = ".TGZ"

    @staticmethod
    def compress(data: bytes) -> bytes:
        return gzip.compress(data)


class TestTarZst(TestTar):
    suffix = ".tar.zst"

    @staticmethod
    def compress(data: bytes) -> bytes:
        half = len(data) // 2
        skippable = struct.pack("<II", 0x184D2A50, 3) + b"abc"
        return zstandard.compress(data[:half]) + skippable + zstandard.compress(data[half:])


class TestTarMembers:
    def test_links_and_devices_are_rows_without_bytes(self, tmp_path: Path) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            add(archive, "real.png", image(1))
            add(archive, "soft.png", type=tarfile.SYMTYPE, link="/etc/passwd")
            add(archive, "hard.png", type=tarfile.LNKTYPE, link="real.png")
            add(archive, "dir.png/", type=tarfile.DIRTYPE)
            add(archive, "pipe.png", type=tarfile.FIFOTYPE)
            add(archive, "last.png", image(2))
        items, total = read_all(tar_shard(tmp_path, buffer.getvalue()))
        assert error_types(items) == [None, "unsupported", "unsupported", "unsupported", None]
        assert items[-1].data == image(2)
        assert total == 5

    @pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    @pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
    def test_long_names(self, tmp_path: Path, format: int, suffix: str) -> None:
        members = [("ü/" * 200 + "日本.png", image(1)), ("short.png", image(2))]
        data = tar_bytes(members, format=format)
        items, _ = read_all(tar_shard(tmp_path, gzip.compress(data) if suffix == ".tar.gz" else data, suffix))
        assert [(item.member, item.data) for item in items] == members

    def test_names_that_are_not_utf8_become_text(self, tmp_path: Path) -> None:
        data = tar_bytes([("na\xefve.png", image(1))], format=tarfile.GNU_FORMAT).replace(b"\xc3\xaf", b"\xef\xee")
        header = bytearray(data)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header[:512])
        items, _ = read_all(tar_shard(tmp_path, bytes(header)))
        assert items[0].data == image(1)
        assert items[0].image_id.encode().endswith(b"ve.png")

    def test_without_its_end_blocks_a_tar_is_whole(self, tmp_path: Path) -> None:
        data = tar_bytes([("a.png", image(1))])
        end = 512 + -(-len(image(1)) // 512) * 512
        assert not any(data[end:])
        for suffix, stored in [(".tar", data[:end]), (".tar.gz", gzip.compress(data[:end]) + bytes(20_000))]:
            items, total = read_all(tar_shard(tmp_path, stored, suffix))
            assert error_types(items) == [None]
            assert total == 1

    def test_a_cut_header_is_not_the_end(self, tmp_path: Path) -> None:
        data = tar_bytes([("a.png", image(1)), ("b.png", image(2))])
        shard = tar_shard(tmp_path, data[: data.index(b"b.png") + 100])
        items, total = read_all(shard)
        assert error_types(items) == [None, "truncated"]
        assert items[1].error.message == f"{shard.uri} ends early: 1 images were read before"  # type: ignore[union-attr]
        assert total == 2

    @pytest.mark.parametrize("type", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.REGTYPE])
    @pytest.mark.parametrize("size", [-512, -1, 1 << 40, (1 << 62) + 1])
    def test_headers_with_absurd_sizes(self, tmp_path: Path, type: bytes, size: int) -> None:
        liar = tarfile.TarInfo("b.png")
        liar.size, liar.type = size, type
        header = liar.tobuf(tarfile.GNU_FORMAT)
        data = tar_bytes([("a.png", image(1))])
        end = 512 + -(-len(image(1)) // 512) * 512
        for suffix, stored in [(".tar", data[:end] + header), (".tar.gz", gzip.compress(data[:end] + header))]:
            items, total = read_all(tar_shard(tmp_path, stored, suffix))
            assert error_types(items)[0] is None
            assert error_types(items)[1] in ("corrupt", "truncated", "too_large")
            assert total <= 3

    def test_a_cut_member_says_where(self, tmp_path: Path) -> None:
        data = tar_bytes([("a.png", image(1)), ("b.png", image(2)), ("c.png", image(3))])
        middle = data.index(image(3)) + 100
        shard = tar_shard(tmp_path, data[:middle])
        items, total = read_all(shard)
        assert error_types(items) == [None, None, "truncated"]
        assert items[2].member == "c.png"
        assert items[2].error.message == (  # type: ignore[union-attr]
            f"{shard.uri} ends early, in the middle of member c.png: 2 images were read before"
        )
        assert total == 3
        planned = replace(shard, rows=5)
        assert error_types(read_all(planned)[0]) == [None, None, "truncated", "truncated", "truncated"]
        assert error_types(read_all(replace(shard, rows=2))[0]) == [None, None]

    @pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
    def test_garbage_is_not_the_end(self, tmp_path: Path, suffix: str) -> None:
        data = bytearray(tar_bytes([("a.png", image(1)), ("b.png", image(2)), ("c.png", image(3))]))
        header = data.index(image(2)) - 512
        data[header + 150] ^= 1  # the checksum
        stored = gzip.compress(data) if suffix == ".tar.gz" else bytes(data)
        for keep in ((), ("txt",)):
            items, total = read_all(tar_shard(tmp_path, stored, suffix), keep=keep)
            assert error_types(items) == [None, "corrupt"]
            assert total == 2

    @pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
    def test_images_behind_the_end_mark_are_not_dropped_in_silence(self, tmp_path: Path, suffix: str) -> None:
        data = tar_bytes([("a.png", image(1))]) + tar_bytes([("b.png", image(2))])
        items, total = read_all(tar_shard(tmp_path, gzip.compress(data) if suffix == ".tar.gz" else data, suffix))
        assert error_types(items) == [None, "corrupt"]
        assert "joined end to end" in items[1].error.message  # type: ignore[union-attr]
        assert total == 2

    def test_a_cut_behind_the_end_mark_costs_nothing(self, tmp_path: Path) -> None:
        data = gzip.compress(tar_bytes([("a.png", image(1))]))[:-6]
        for keep in ((), ("txt",)):
            assert error_types(read_all(tar_shard(tmp_path, data, ".tar.gz"), keep=keep)[0]) == [None]

    @pytest.mark.timeout(20)
    @pytest.mark.parametrize("size", [-1, -513, -5000])
    def test_a_negative_size_in_a_pax_header(self, tmp_path: Path, size: int) -> None:
        liar = tarfile.TarInfo("b.png")
        liar.pax_headers = {"size": str(size)}
        header = liar.tobuf(tarfile.PAX_FORMAT)
        items, _ = read_all(tar_shard(tmp_path, header + tar_bytes([("a.png", image(1))])))
        assert error_types(items) == ["corrupt"]

    def test_an_empty_file_is_one_error(self, tmp_path: Path) -> None:
        items, total = read_all(tar_shard(tmp_path, b""))
        assert error_types(items) == ["empty"]
        assert total == 1

    @pytest.mark.parametrize(("suffix", "compress"), [(".tar.gz", gzip.compress), (".tar.zst", zstandard.compress)])
    def test_a_cut_in_the_compressed_bytes_keeps_the_rows_before(
        self, tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
    ) -> None:
        """All rows up to the last block: zstd packs 128 KiB in one."""
        members = [(f"{number}.png", np.random.default_rng(number).bytes(20_000)) for number in range(100)]
        data = compress(tar_bytes(members))
        for length, least in ((len(data) - 2000, 92), (len(data) // 2, 42)):
            items, total = read_all(tar_shard(tmp_path, data[:length], suffix))
            assert least < total <= least + 9
            assert [(item.member, item.data) for item in items[:-1]] == members[: total - 1]
            assert error_types(items)[-1] == "truncated"

    def test_memory_does_not_grow_with_the_members(self, tmp_path: Path) -> None:
        shard = tar_shard(tmp_path, tar_bytes([(f"{number}.png", b"") for number in range(3000)]))
        reading = sources.read(shard, ALL, ReadOptions())
        for _ in range(2900):
            next(reading)
        gc.collect()
        assert sum(isinstance(thing, tarfile.TarInfo) for thing in gc.get_objects()) < 50


class TestZip(MemberContract):
    kind, suffix = "zip", ".zip"

    def write(self, path: Path, members: Members, texts: Sequence[str] = ()) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members:
                archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
            for (name, _), text in zip(members, texts, strict=False):
                archive.writestr(name.partition(".")[0] + ".txt", text)

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_names_met_twice_get_ids_of_their_own(self, tmp_path: Path) -> None:
        super().test_names_met_twice_get_ids_of_their_own(tmp_path)

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_bad_members_cost_one_row_each(self, tmp_path: Path, method: int) -> None:
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(5):
                archive.writestr(zipfile.ZipInfo(f"{number}.png"), image(number), method)
            offsets = [info.header_offset for info in archive.infolist()]
        data = bytearray(path.read_bytes())
        data[offsets[2] - 60] ^= 0xFF  # inside the bytes of 1.png
        central = [i for i in range(offsets[-1], len(data)) if data[i : i + 4] == b"PK\1\2"]
        data[central[2] + 8] |= 1  # encrypted
        data[central[3] + 10] = 99  # a compression that nobody knows
        path.write_bytes(data)
        items, total = read_all(Shard(0, "zip", str(path)))
        assert error_types(items) == [None, "corrupt", "unsupported", "unsupported", None]
        assert [items[0].data, items[4].data] == [image(0), image(4)]
        assert all(item.member in item.error.message for item in items[1:4])  # type: ignore[union-attr, operator]
        assert total == 5

    def test_a_link_is_a_row_without_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w") as archive:
            link = zipfile.ZipInfo("link.png")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
        assert error_types(read_all(Shard(0, "zip", str(path)))[0]) == ["unsupported"]

    def test_a_bomb_that_lies_about_its_size_is_stopped(self, tmp_path: Path) -> None:
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb.png", bytes(50_000_000))
        data = path.read_bytes()
        path.write_bytes(data.replace(struct.pack("<I", 50_000_000), struct.pack("<I", 1000)))
        assert error_types(read_all(Shard(0, "zip", str(path)))[0]) == ["corrupt"]

    def test_a_zip_cut_short_is_one_error(self, tmp_path: Path) -> None:
        shard = replace(self.make(tmp_path, numbered(5)), etag="")
        Path(shard.uri).write_bytes(Path(shard.uri).read_bytes()[:-40])
        assert error_types(read_all(shard)[0]) == ["corrupt"]


class ParquetContract(ArchiveContract):
    """Subclasses give the image column."""

    kind, suffix = "parquet", ".parquet"

    def column(self, members: Members) -> pa.Array:
        raise NotImplementedError

    def write(self, path: Path, members: Members, texts: Sequence[str] = ()) -> None:
        columns = {"image": self.column(members), **({"txt": texts} if texts else {})}
        pq.write_table(pa.table(columns), path, row_group_size=7, compression="zstd")


class TestParquetBytes(ParquetContract):
    def column(self, members: Members) -> pa.Array:
        return pa.array([data for _, data in members], pa.binary())

    def test_names_met_twice_get_ids_of_their_own(self, tmp_path: Path) -> None:
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

    def test_only_the_row_groups_to_do_are_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_a_broken_row_group_costs_its_own_rows(self, tmp_path: Path) -> None:
        shard = self.write(tmp_path, {"image": pa.array([image(i) for i in range(30)])}, row_group_size=10)
        self.break_group(shard, 1)
        items, total = read_all(shard)
        assert error_types(items) == [None] * 10 + ["corrupt"] * 10 + [None] * 10
        assert "row group 1" in items[10].error.message  # type: ignore[union-attr]
        assert items[29].data == image(29)
        assert total == 30

    @pytest.mark.parametrize("column", [pa.array([1, 2], pa.int16()), pa.array(["a", "b"])])
    def test_another_schema_than_planned_loses_every_row(self, tmp_path: Path, column: pa.Array) -> None:
        for options in ({}, {"image_column": "image"}, {"image_column": "photo"}):
            items, total = read_all(self.write(tmp_path, {"image": column}), **options)
            assert error_types(items) == ["unreadable"] * 2
            assert "image" in items[0].error.message  # type: ignore[union-attr]
            assert total == 2

    def test_the_footer_tells_rows_and_schema(self, tmp_path: Path) -> None:
        shard = self.write(tmp_path, {"image": pa.array([b""] * 3), "label": pa.array([1, 2, 3])})
        rows, schema = parquet.shard_rows(shard.uri)
        assert rows == 3
        assert schema.names == ["image", "label"]

    def test_the_planners_errors(self, tmp_path: Path) -> None:
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
        with pytest.raises(InputRefused, match=r"photo: a\.parquet has the columns image"):
            self.find({"image": pa.binary()}, "photo")
        with pytest.raises(InputRefused, match=r"image: a\.parquet has int16 there"):
            self.find({"image": pa.int16()}, "image")


def test_ids_stay_unique_whatever_the_members_are_called() -> None:
    ids = UniqueIds("u")
    names = ["a", "a#row=2", "a", "a#row=2", "a"]
    found = [ids.new(name, row) for row, name in enumerate(names)]
    assert len(set(found)) == 5
    assert found[:2] == ["u#a", "u#a#row=2"]


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("dir/a.b.JPG", "dir/a", "b.jpg"),
        ("a.jpg", "a", "jpg"),
        ("v1.0/a.jpg", "v1.0/a", "jpg"),
        ("a", "a", ""),
        ("d/.jpg", "d/", "jpg"),
    ],
)
def test_keys_as_webdataset_cuts_them(name: str, key: str, extension: str) -> None:
    assert split_key(name) == (key, extension)
