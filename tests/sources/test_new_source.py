"""A new kind of shard needs one module and one line of registration."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline import sources
from pipeline.config import RunConfig
from pipeline.coverage import END, Coverage, Ranges, contains
from pipeline.errors import InputRefused, ReadError
from pipeline.planning import plan as plans
from pipeline.planning.archive import Archive
from pipeline.planning.update import Change
from pipeline.sources import ReadOptions, Record, ShardEnd
from pipeline.sources.base import Contents, Source
from pipeline.sources.shard import Shard
from pipeline.storage import access
from pipeline.storage.base import ObjectInfo

# The module of the new source: a film is a file of frames, and its payload is the index of the frames.


@dataclass(frozen=True)
class FrameIndex:
    """Offset and size of each frame."""

    frames: tuple[tuple[int, int], ...]

    def to_json(self) -> str:
        return json.dumps(self.frames)

    @classmethod
    def from_json(cls, text: str) -> "FrameIndex":
        return cls(tuple((offset, size) for offset, size in json.loads(text)))

    def first(self, rows: int) -> "FrameIndex":
        return FrameIndex(self.frames[:rows])


def write_film(path: Path, frames: list[bytes]) -> None:
    header = json.dumps([len(frame) for frame in frames]).encode() + b"\n"
    path.write_bytes(header + b"".join(frames))


def inspect(uri: str, options: ReadOptions) -> Contents:
    with access.open_read(uri) as file:
        sizes = json.loads(file.readline())
        offsets = [file.tell() + sum(sizes[:number]) for number in range(len(sizes))]
    return Contents(len(sizes), {}, FrameIndex(tuple(zip(offsets, sizes, strict=True))))


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    assert isinstance(shard.payload, FrameIndex)
    with access.open_read(shard.uri, shard.etag) as file:
        for row, (offset, size) in enumerate(shard.payload.frames):
            if contains(todo, row):
                file.seek(offset)
                yield Record(row, f"{shard.uri}#{row}", shard.uri, str(row), file.read(size))
    yield ShardEnd(len(shard.payload.frames))


SOURCE = Source("film", (".film",), read, inspect, reads_header=True, payload=FrameIndex)

# The tests


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two films of four frames, and a loose image."""
    monkeypatch.setitem(sources.SOURCES, "film", SOURCE)  # the line of registration
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        write_film(folder / f"{name}.film", [f"{name}{number}".encode() for number in range(4)])
    (folder / "loose.jpg").write_bytes(b"loose")
    return folder


def images(output: Path) -> dict[str, object]:
    """Read all images of the saved plan."""
    plan = plans.load(str(output))
    assert plan is not None
    todo = plan.remaining(Coverage())
    items = (item for shard, rows in todo for item in sources.read(plan.load(shard), rows, ReadOptions()))
    return {item.image_id.rpartition("/")[2]: item.data for item in items if isinstance(item, Record)}


def test_it_is_planned_saved_loaded_and_read(archive: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    plans.save(plans.make(str(output), Archive(RunConfig(input=str(archive), output=str(output))).shards(), {}))
    plan = plans.load(str(output))
    assert plan is not None
    shards = list(plans.read_shards(plan))
    assert [(shard.kind, shard.rows) for shard in shards] == [("objects", 1), ("film", 4), ("film", 4)]
    assert isinstance(shards[1].payload, FrameIndex)
    assert plan.load(2) == shards[2]
    films = {f"{name}.film#{number}": f"{name}{number}".encode() for name in "ab" for number in range(4)}
    assert images(output) == {"loose.jpg": b"loose", **films}
    assert [item.data for item in sources.read(shards[1], ((1, 3),), ReadOptions()) if isinstance(item, Record)] == [
        b"a1",
        b"a2",
    ]


def test_limit_cuts_its_payload(archive: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = RunConfig(input=str(archive), output=str(output), limit=7)
    plan = plans.make(str(output), Archive(config).shards(), {})
    plans.save(plan)
    last = plan.load(2)
    assert isinstance(last.payload, FrameIndex)
    assert (last.rows, len(last.payload.frames)) == (2, 2)
    assert list(images(output))[-2:] == ["b.film#0", "b.film#1"]
    assert len(images(output)) == 7


def test_an_update_finds_the_replaced_shard(archive: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    planning = Archive(RunConfig(input=str(archive), output=str(output)))
    plan = plans.make(str(output), planning.shards(), {})
    write_film(archive / "b.film", [b"b0", b"other"])
    change = Change(plan)
    plans.save(plans.extend(plan, planning.new_shards(change), {}, change.dropped))
    assert (change.unchanged, change.dropped) == (2, {2: ((0, END),)})
    assert images(output)["b.film#1"] == b"other"


def test_its_suffix_is_named_if_nothing_matches(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match=r"empty matches no images: no file name ends in one of \.jpg.*\.film"):
        list(Archive(RunConfig(input=str(tmp_path / "empty"), output="/none")).shards())


def test_a_source_needs_no_inspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sources.SOURCES, "film", Source("film", (".film",), read))
    (tmp_path / "a.film").write_bytes(b"[]\n")
    (shard,) = Archive(RunConfig(input=str(tmp_path), output="out")).shards()
    assert (shard.kind, shard.rows, shard.payload) == ("film", None, None)


# A film that is cut into several shards

FRAMES_PER_SHARD = 3


def cut(info: ObjectInfo, options: ReadOptions) -> Iterator[Contents]:
    whole = inspect(info.uri, options)
    assert isinstance(whole.payload, FrameIndex)
    frames = whole.payload.frames
    for first in range(0, len(frames), FRAMES_PER_SHARD):
        some = frames[first : first + FRAMES_PER_SHARD]
        yield Contents(len(some), {}, FrameIndex(some), sum(size for _, size in some))


@pytest.fixture
def long_film(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One film of ten frames instead of the two short ones, and the loose image."""
    monkeypatch.setitem(sources.SOURCES, "film", replace(SOURCE, shards=cut))
    (archive / "b.film").unlink()
    write_film(archive / "a.film", [f"a{number}".encode() for number in range(10)])
    return archive


def test_an_object_is_cut_into_several_shards(long_film: Path, tmp_path: Path) -> None:
    planning = Archive(RunConfig(input=str(long_film), output=str(tmp_path / "out")))
    plan = plans.make(str(tmp_path / "out"), planning.shards(), {})
    shards = list(plans.read_shards(plan))
    assert [(shard.kind, shard.rows, shard.size_bytes) for shard in shards[1:]] == [
        ("film", 3, 6),
        ("film", 3, 6),
        ("film", 3, 6),
        ("film", 1, 2),
    ]
    assert len({(shard.uri, shard.etag) for shard in shards[1:]}) == 1
    records = [next(sources.read(shard, ((0, END),), ReadOptions())) for shard in shards[1:]]
    assert [item.data for item in records if isinstance(item, Record)] == [b"a0", b"a3", b"a6", b"a9"]


def test_limit_cuts_through_an_object_of_several_shards(long_film: Path, tmp_path: Path) -> None:
    config = RunConfig(input=str(long_film), output=str(tmp_path / "out"), limit=6)
    assert [shard.rows for shard in Archive(config).shards()] == [1, 3, 2]


def test_an_update_replaces_all_shards_of_an_object(long_film: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    planning = Archive(RunConfig(input=str(long_film), output=str(output)))
    plan = plans.make(str(output), planning.shards(), {})
    unchanged = Change(plan)
    assert list(planning.new_shards(unchanged)) == []
    assert unchanged.unchanged == 2
    write_film(long_film / "a.film", [b"b0", b"b1", b"b2", b"b3"])
    change = Change(plan)
    extended = plans.extend(plan, planning.new_shards(change), {}, change.dropped)
    assert change.dropped == dict.fromkeys((1, 2, 3, 4), ((0, END),))
    assert extended.rows - sum(map(plan.shard_rows.__getitem__, change.dropped)) == 5
    again = Change(extended)
    assert list(planning.new_shards(again)) == []
    assert (again.unchanged, again.removed) == (2, 0)


def test_an_object_whose_header_is_broken_is_one_shard(long_film: Path) -> None:
    (long_film / "b.film").write_bytes(b"")

    def refuse(info: ObjectInfo, options: ReadOptions) -> Iterator[Contents]:
        if not info.size_bytes:
            raise ReadError("empty", f"{info.uri} has no bytes")
        yield from cut(info, options)

    sources.SOURCES["film"] = replace(SOURCE, shards=refuse)
    planned = list(Archive(RunConfig(input=str(long_film), output="/none")).shards())
    assert [(shard.rows, shard.payload is None) for shard in planned[-2:]] == [(1, False), (None, True)]
