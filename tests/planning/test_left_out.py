"""Files that are not read are counted by suffix, and the counts are known to every later command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from source_contract import image

from pipeline.config import RunConfig
from pipeline.coverage import END
from pipeline.errors import InputRefused
from pipeline.output import directory
from pipeline.output.commit import Commit
from pipeline.output.ledger import Ledger
from pipeline.output.run_record import RunRecord
from pipeline.output.verify import Verification
from pipeline.planning import left_out
from pipeline.planning import plan as plans
from pipeline.planning.archive import Archive
from pipeline.report.progress import meter
from pipeline.report.report import Report
from pipeline.sources.objects import LooseImages
from pipeline.sources.suffixes import MAX_SUFFIXES, NO_END_MARK, LeftOut

COUNTS = {".npy": 12, ".dcm": 3}
EMPTY = "no member whose name is that of an image; --any-suffix looks at the first bytes"
TEXT = "12 .npy, 3 .dcm (not read)"


class Prepared:
    def settings(self) -> dict[str, object]:
        return {"model": "none"}

    def provenance(self) -> dict[str, object]:
        return {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ["a/1.jpg", "a/1.NPY", "a/x.tar.xz", "a/2.npy", "README", "z.dcm", ".hidden.npy", "notes.v2 final"]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"1")
    return tmp_path / "in"


def archive(folder: Path, *names: str, **settings: object) -> Archive:
    inputs = [f"{folder}/{name}" if name else str(folder) for name in names or ("",)]
    return Archive(RunConfig(input=inputs, output=str(folder.parent / "out"), **settings))  # type: ignore[arg-type]


EXPECTED = {".npy": 2, ".dcm": 1, ".tar.xz": 1, "without a suffix": 2}


def test_other_files_are_counted_once(folder: Path) -> None:
    for names in (("",), ("", "a"), ("**/*",)):
        planned = archive(folder, *names)
        assert len(list(planned.shards())) == 1
        assert planned.left_out.counts == EXPECTED, names
    only = archive(folder, "a/*.jpg")
    list(only.shards())
    assert not only.left_out.counts


def test_the_output_is_not_counted(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/_run.json").write_text("{}")
    planned = Archive(RunConfig(input=str(folder), output=str(folder / "out")))
    list(planned.shards())
    assert planned.left_out.counts == EXPECTED


def test_hidden_images_and_broken_links_are_counted(folder: Path) -> None:
    """Of hidden files only images and shards. A hidden folder is one, and is not entered."""
    for name in [".x.png", "a/.y.png", ".z.tar", "._fork.png", ".DS_Store", ".git/1.png", ".git/b/2.png", "a/.d/3.jpg"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"1")
    (folder / "gone.png").symlink_to("/nowhere.png")
    (folder / "a/round.npy").symlink_to("round.npy")
    hidden = {".png hidden": 2, ".tar hidden": 1, ".git/ hidden": 1, ".d/ hidden": 1}
    links = {".png broken link": 1, ".npy broken link": 1}
    for names in (("",), ("", "a")):
        for settings in ({}, {"any_suffix": True}):
            planned = archive(folder, *names, **settings)
            assert sum(shard.rows or 0 for shard in planned.shards()) == 1
            assert planned.left_out.counts == {**EXPECTED, **hidden, **links}, names
    assert left_out.describe(planned.left_out.counts).startswith(
        "2 .npy, 2 .png hidden, 2 without a suffix, 1 .d/ hidden"
    )
    with pytest.raises(InputRefused, match=r"has only 1 .png hidden \(not read\): names that begin with a dot are"):
        list(archive(folder, "*x.png").shards())
    with pytest.raises(InputRefused, match=r"has only 1 .png broken link \(not read\): the targets of links do not"):
        list(archive(folder, "g*.png").shards())


def test_memory_is_flat() -> None:
    counts = LeftOut()
    for number in range(10_000):
        counts.add(f"/a/x.s{number}")
    assert len(counts.counts) == MAX_SUFFIXES + 1
    assert sum(counts.counts.values()) == 10_000


def test_the_text_is_short() -> None:
    assert left_out.describe(COUNTS) == TEXT
    many = {f".s{number:02d}": 1 for number in range(20)}
    assert left_out.describe(many).endswith(".s11, 8 with other suffixes (not read)")
    assert left_out.describe({}) == ""


def test_the_plan_stores_the_counts(folder: Path) -> None:
    planned, output = archive(folder), str(folder.parent / "out")
    (folder.parent / "out").mkdir()
    config, record = planned.config, RunRecord.of(planned.config, Prepared())
    assert directory.preview(archive(folder), record, [])["left_out"] == EXPECTED
    plan, _ = directory.prepare(config, record, planned)
    assert plan.left_out == EXPECTED
    assert directory.prepare(config, record, archive(folder))[0].left_out == EXPECTED, "resumed"
    (folder / "b.npy").write_bytes(b"")
    updated = archive(folder, update=True)
    plan, change = directory.prepare(updated.config, record, updated)
    assert change is not None
    assert plan.left_out == change.left_out == {**EXPECTED, ".npy": 3}
    loaded = plans.load(output)
    assert loaded is not None
    assert loaded.left_out == {**EXPECTED, ".npy": 3}
    path = folder.parent / "out/_plan/plan.json"
    old = json.loads(path.read_text())
    del old["left_out"]
    path.write_text(json.dumps(old))
    loaded = plans.load(output)
    assert loaded is not None
    assert loaded.left_out == {}, "an older plan"


def test_the_report_the_start_of_a_run_and_verify_name_the_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uncounted, dropped = np.full(3, -1, np.int64), {2: ((0, END),)}
    plan = plans.Plan(str(tmp_path), (), 3, 0, pa.schema([]), uncounted, dropped, left_out=COUNTS)
    ledger = Ledger(str(tmp_path), 1)
    ledger.coverage.totals.update({0: 0})
    ends = {2: {".json": 2, NO_END_MARK: 1}, 1: {NO_END_MARK: 1}}
    for name in ("a", "b"):
        ledger.accept(Commit(name, 1, None, None, {}, {2: 0, 1: 3}, 0, 0, left_out=ends))
    assert (ledger.left_out, ledger.unended) == ({".json": 2}, 2)
    report = Report.of(plan, ledger, "resnet18", "done", 1.0)
    report.save()
    assert json.loads((tmp_path / "_report.json").read_text())["members_left_out"] == {".json": 2}
    assert ("", "in tars and zips: 2 .json (not read)") in Report.load(str(tmp_path))._lines()
    assert json.loads((tmp_path / "_report.json").read_text())["left_out"] == COUNTS
    assert ("left out", TEXT) in Report.load(str(tmp_path))._lines()
    assert ("empty", f"1 tar or zip has {EMPTY}") in Report.load(str(tmp_path))._lines()
    assert ("tars", "2 tars have no end mark: they may be cut, and images may be missing") in report._lines()
    with meter(plan, ledger):
        pass
    assert f"left out: {TEXT}" in capsys.readouterr().err.splitlines()
    with meter(replace(plan, left_out={}), ledger):
        pass
    assert "left out" not in capsys.readouterr().err
    lines = list(Verification(str(tmp_path), 0, left_out=COUNTS, empty_shards=2, unended_tars=1).lines())
    assert f"  left out: {TEXT}" in lines
    assert f"  empty: 2 tars or zips have {EMPTY}" in lines
    assert "  tars: 1 tar has no end mark: it may be cut, and images may be missing" in lines


def test_any_suffix_finds_loose_images(tmp_path: Path) -> None:
    for name, data in {"1.img": image(1), "2": image(2), "3.jpg": image(3), "4.npy": b"no", "5": b""}.items():
        (tmp_path / name).write_bytes(data)
    for settings, expected in (({}, ["3.jpg"]), ({"any_suffix": True}, ["1.img", "2", "3.jpg"])):
        planned = Archive(RunConfig(input=str(tmp_path), output="/o", **settings))  # type: ignore[arg-type]
        (shard,) = planned.shards()
        assert isinstance(shard.payload, LooseImages)
        assert list(shard.payload.keys) == expected
        assert sum(planned.left_out.counts.values()) == 5 - len(expected)
    (shard,) = Archive(RunConfig(input=str(tmp_path / "2"), output="/o", any_suffix=True)).shards()
    assert shard.rows == 1
