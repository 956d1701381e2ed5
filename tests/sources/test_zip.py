"""zip archives."""

import struct
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from source_contract import MemberContract, Members, error_types, image, numbered, read_all

from pipeline.sources.shard import Shard


class TestZip(MemberContract):
    kind, suffix = "zip", ".zip"

    def write(self, path: Path, members: Members, texts: Sequence[str] = ()) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members:
                archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
            for (name, _), text in zip(members, texts, strict=False):
                archive.writestr(name.partition(".")[0] + ".txt", text)

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_repeated_names_have_different_ids(self, tmp_path: Path) -> None:
        super().test_repeated_names_have_different_ids(tmp_path)

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_each_bad_member_is_one_error(self, tmp_path: Path, method: int) -> None:
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(5):
                archive.writestr(zipfile.ZipInfo(f"{number}.png"), image(number), method)
            offsets = [info.header_offset for info in archive.infolist()]
        data = bytearray(path.read_bytes())
        data[offsets[2] - 60] ^= 0xFF  # inside the bytes of 1.png
        central = [i for i in range(offsets[-1], len(data)) if data[i : i + 4] == b"PK\1\2"]
        data[central[2] + 8] |= 1  # encrypted
        data[central[3] + 10] = 99  # an unknown compression method
        path.write_bytes(data)
        items, total = read_all(Shard(0, "zip", str(path)))
        assert error_types(items) == [None, "corrupt", "unsupported", "unsupported", None]
        assert [items[0].data, items[4].data] == [image(0), image(4)]
        assert all(item.member in item.error.message for item in items[1:4])  # type: ignore[union-attr, operator]
        assert total == 5

    def test_a_link_is_an_error_row(self, tmp_path: Path) -> None:
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w") as archive:
            link = zipfile.ZipInfo("link.png")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
        assert error_types(read_all(Shard(0, "zip", str(path)))[0]) == ["unsupported"]

    def test_zips_joined_end_to_end_are_an_error(self, tmp_path: Path) -> None:
        """Only the directory of the last one would be read."""
        parts = []
        for number in range(2):
            self.write(tmp_path / f"{number}.zip", [(f"{number}.png", image(number))])
            parts.append((tmp_path / f"{number}.zip").read_bytes())
        path = tmp_path / "joined.zip"
        path.write_bytes(b"".join(parts))
        (item,), total = read_all(Shard(0, "zip", str(path)))
        assert (item.error and item.error.error_type, total) == ("corrupt", 1)
        assert f"several zips joined end to end: another one ends at byte {len(parts[0])}" in str(item.error)
        for program in (b"MZ" + bytes(1000), b"#!/bin/sh\nexit\n"):
            path.write_bytes(program + parts[1])
            (item,), _ = read_all(Shard(0, "zip", str(path)))
            assert item.data == image(1)
        with zipfile.ZipFile(path := tmp_path / "deleted.zip", "w") as archive:
            archive.writestr("gone.png", image(0))
            archive.writestr("1.png", image(1))
            del archive.filelist[0]  # a deleted entry, whose bytes are still there
        (item,), _ = read_all(Shard(0, "zip", str(path)))
        assert item.data == image(1)

    def test_a_member_without_a_name_is_left_out(self, tmp_path: Path) -> None:
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("1.png", image(1))
            archive.writestr("x.txt", "text")
        path.write_bytes(path.read_bytes().replace(b"x.txt", b"\0.txt"))  # a name ends at the first NUL
        items, total = read_all(Shard(0, "zip", str(path)))
        assert (error_types(items), total) == ([None], 1)

    def test_a_bomb_with_a_false_size_is_stopped(self, tmp_path: Path) -> None:
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("bomb.png", bytes(50_000_000))
        data = path.read_bytes()
        path.write_bytes(data.replace(struct.pack("<I", 50_000_000), struct.pack("<I", 1000)))
        assert error_types(read_all(Shard(0, "zip", str(path)))[0]) == ["corrupt"]

    def test_a_truncated_zip_is_one_error(self, tmp_path: Path) -> None:
        shard = replace(self.make(tmp_path, numbered(5)), etag="")
        Path(shard.uri).write_bytes(Path(shard.uri).read_bytes()[:-40])
        assert error_types(read_all(shard)[0]) == ["corrupt"]
