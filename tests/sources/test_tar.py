"""tar archives, uncompressed and compressed."""

import gc
import gzip
import io
import struct
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from source_contract import ALL, MemberContract, Members, error_types, image, read_all

from pipeline import sources
from pipeline.coverage import END
from pipeline.sources import ReadOptions, tar
from pipeline.sources.shard import Shard
from pipeline.sources.suffixes import NO_END_MARK


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

    def test_a_truncated_shard_keeps_the_rows_before_the_cut(self, tmp_path: Path) -> None:
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

    def test_a_tar_without_an_end_mark_is_read_and_noted(self, tmp_path: Path) -> None:
        data = tar_bytes([("0.png", image(0)), ("1.png", image(1))], ["text"] * 2)
        end = len(data.rstrip(b"\0")) // 512 * 512 + 512
        for stop, expected in ((len(data), {}), (end + 512, {}), (end, {NO_END_MARK: 1})):
            shard = tar_shard(tmp_path, self.compress(data[:stop]), self.suffix)
            for keep in ((), ("txt",)):
                *records, last = tar.read(shard, ALL, ReadOptions(keep))
                assert [item.data for item in records] == [image(0), image(1)]
                assert {**last.left_out, ".txt": 2} == {**expected, ".txt": 2}
            *_, last = tar.read(replace(shard, rows=1), ALL, ReadOptions())
            assert not last.left_out, "--limit"


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
    def test_links_and_devices_are_error_rows(self, tmp_path: Path) -> None:
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

    def test_a_tar_without_end_blocks_is_complete(self, tmp_path: Path) -> None:
        data = tar_bytes([("a.png", image(1))])
        end = 512 + -(-len(image(1)) // 512) * 512
        assert not any(data[end:])
        for suffix, stored in [(".tar", data[:end]), (".tar.gz", gzip.compress(data[:end]) + bytes(20_000))]:
            items, total = read_all(tar_shard(tmp_path, stored, suffix))
            assert error_types(items) == [None]
            assert total == 1

    def test_a_truncated_header_is_an_error(self, tmp_path: Path) -> None:
        data = tar_bytes([("a.png", image(1)), ("b.png", image(2))])
        shard = tar_shard(tmp_path, data[: data.index(b"b.png") + 100])
        items, total = read_all(shard)
        assert error_types(items) == [None, "truncated"]
        assert items[1].error.message == f"{shard.uri} ends early: 1 images were read before"  # type: ignore[union-attr]
        assert total == 2

    @pytest.mark.parametrize("type", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.REGTYPE])
    @pytest.mark.parametrize("size", [-512, -1, 1 << 40, (1 << 62) + 1])
    def test_headers_with_impossible_sizes(self, tmp_path: Path, type: bytes, size: int) -> None:
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

    def test_the_error_names_the_truncated_member(self, tmp_path: Path) -> None:
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
    def test_garbage_is_an_error(self, tmp_path: Path, suffix: str) -> None:
        data = bytearray(tar_bytes([("a.png", image(1)), ("b.png", image(2)), ("c.png", image(3))]))
        header = data.index(image(2)) - 512
        data[header + 150] ^= 1  # the checksum
        stored = gzip.compress(data) if suffix == ".tar.gz" else bytes(data)
        for keep in ((), ("txt",)):
            items, total = read_all(tar_shard(tmp_path, stored, suffix), keep=keep)
            assert error_types(items) == [None, "corrupt"]
            assert total == 2

    @pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
    def test_images_after_the_end_mark_are_an_error(self, tmp_path: Path, suffix: str) -> None:
        data = tar_bytes([("a.png", image(1))]) + tar_bytes([("b.png", image(2))])
        items, total = read_all(tar_shard(tmp_path, gzip.compress(data) if suffix == ".tar.gz" else data, suffix))
        assert error_types(items) == [None, "corrupt"]
        assert "joined end to end" in items[1].error.message  # type: ignore[union-attr]
        assert total == 2

    def test_a_cut_after_the_end_mark_is_no_error(self, tmp_path: Path) -> None:
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
    def test_a_cut_in_the_compressed_bytes_keeps_the_rows_before_it(
        self, tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
    ) -> None:
        """All rows up to the last block, of 128 KiB for zstd."""
        members = [(f"{number}.png", np.random.default_rng(number).bytes(20_000)) for number in range(100)]
        data = compress(tar_bytes(members))
        for length, min_rows in ((len(data) - 2000, 92), (len(data) // 2, 42)):
            items, total = read_all(tar_shard(tmp_path, data[:length], suffix))
            assert min_rows < total <= min_rows + 9
            assert [(item.member, item.data) for item in items[:-1]] == members[: total - 1]
            assert error_types(items)[-1] == "truncated"

    def test_memory_does_not_grow_with_the_number_of_members(self, tmp_path: Path) -> None:
        shard = tar_shard(tmp_path, tar_bytes([(f"{number}.png", b"") for number in range(3000)]))
        reading = sources.read(shard, ALL, ReadOptions())
        for _ in range(2900):
            next(reading)
        gc.collect()
        assert sum(isinstance(each, tarfile.TarInfo) for each in gc.get_objects()) < 50
