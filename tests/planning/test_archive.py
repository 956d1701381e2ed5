"""The inputs that `--input` accepts, and those that are refused before any work."""

import io
import itertools
import json
import tarfile
import threading
import tracemalloc
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from servers import S3Server

from pipeline.config import RunConfig
from pipeline.coverage import END
from pipeline.errors import InputRefused, Refused
from pipeline.planning import plan as plans
from pipeline.planning.archive import Archive
from pipeline.planning.lists import HashSet64
from pipeline.sources import Record, read
from pipeline.sources.shard import Shard
from pipeline.storage import access

IMAGE = b"planning does not decode"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Loose images in nested folders, two tars, a zip, two Parquet files, and other files."""
    for name in ["a/1.jpg", "a/2.JPEG", "a/b/3.png", "a-b/4.webp", "notes.md", "meta.json", ".hidden.jpg"]:
        (tmp_path / "loose" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "loose" / name).write_bytes(IMAGE)
    (tmp_path / "shards").mkdir()
    for number in range(2):
        write_tar(tmp_path / "shards" / f"{number:04d}.tar", ["x.jpg", "y.jpg", "y.json"])
        table = pa.table({"image": [IMAGE] * 3, "label": [1, 2, 3]})
        pq.write_table(table, tmp_path / "shards" / f"{number}.parquet")
    with zipfile.ZipFile(tmp_path / "shards" / "z.zip", "w") as archive:
        archive.writestr("q.jpg", IMAGE)
    return tmp_path


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(IMAGE)
            tar.addfile(info, io.BytesIO(IMAGE))


def shards(*inputs: object, **settings: object) -> list[Shard]:
    config = RunConfig(input=[str(name) for name in inputs], output="/nowhere/out", **settings)  # type: ignore[arg-type]
    return list(Archive(config).shards())


def ids(planned: list[Shard]) -> list[str]:
    return [
        item.image_id for shard in planned for item in read(shard, ((0, END),), _options()) if isinstance(item, Record)
    ]


def _options() -> object:
    return Archive(RunConfig(input="x", output="y")).options()


def test_loose_images_are_found_in_sorted_order(folder: Path) -> None:
    names = ["a-b/4.webp", "a/1.jpg", "a/2.JPEG", "a/b/3.png"]
    assert ids(shards(folder / "loose")) == [f"{folder}/loose/{name}" for name in names]


def test_globs_ranges_and_lists_of_inputs(folder: Path) -> None:
    assert len(ids(shards(folder / "loose/*/*.[jJ]*"))) == 2
    assert [s.kind for s in shards(folder / "shards/{0000..0001}.tar")] == ["tar", "tar"]
    assert [s.kind for s in shards(folder / "shards" / "*.tar", folder / "loose")] == ["tar", "tar", "objects"]


def test_mixed_kinds_in_one_folder(folder: Path) -> None:
    kinds = [shard.kind for shard in shards(folder)]
    assert sorted(kinds) == ["objects", "parquet", "parquet", "tar", "tar", "zip"]
    assert len(ids(shards(folder))) == 4 + 4 + 1 + 6


def test_inputs_that_overlap_give_each_object_once(folder: Path) -> None:
    once = ids(shards(folder))
    assert ids(shards(folder, folder / "loose", folder / "shards/0000.tar", folder / "loose/a/*.jpg")) == once
    assert len(set(once)) == len(once)


def test_loose_images_are_grouped_into_shards(tmp_path: Path) -> None:
    for i in range(plans.OBJECTS_PER_SHARD + 3):
        (tmp_path / f"{i:05d}.jpg").write_bytes(b"")
    assert [shard.rows for shard in shards(tmp_path)] == [plans.OBJECTS_PER_SHARD, 3]


def test_the_output_inside_the_input_is_not_read(folder: Path) -> None:
    (folder / "out").mkdir()
    pq.write_table(pa.table({"image": [IMAGE]}), folder / "out" / "part-1.parquet")
    archive = Archive(RunConfig(input=str(folder), output=str(folder / "out")))
    assert all("/out/" not in shard.uri for shard in archive.shards())


def test_cells_of_several_lines_are_one_row(folder: Path) -> None:
    """The file is larger than a block of Arrow's reader, and a block may end within a cell."""
    for length in range(40, 44):
        caption = "word " * length + "\nsecond, line"
        rows = (f'loose/{i:06d}.jpg,"{caption}"\n' for i in range((3 << 20) // len(caption)))
        (folder / "captions.csv").write_text("url,caption\n" + "".join(rows))
        planned = shards(folder / "captions.csv", keep="caption")
        assert sum(len(shard.payload.keys) for shard in planned) == (3 << 20) // len(caption)
        assert {json.loads(each)["caption"] for shard in planned for each in shard.payload.kept or ()} == {caption}


def test_a_csv_without_column_names_is_refused(folder: Path) -> None:
    for text in ("loose/a/1.jpg\nloose/b/2.jpg\n", "s3://bucket/1,7\ns3://bucket/2,8\n"):
        (folder / "bare.csv").write_text(text)
        with pytest.raises(InputRefused, match=r"first line of .* names an image, .*: it must name the columns"):
            shards(folder / "bare.csv")


def test_rows_without_a_uri_are_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    pq.write_table(pa.table({"url": ["./loose/a/1.jpg", None, "", "x.jpg"]}), folder / "gaps.parquet")
    (shard,) = shards(folder / "gaps.parquet", uri_column="url")
    assert shard.payload.keys == (f"{folder}/loose/a/1.jpg", f"{folder}/x.jpg")
    assert "skipped 2 rows without a URI in the column 'url'" in caplog.text


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".parquet"])
def test_lists_of_uris(folder: Path, suffix: str) -> None:
    names = ["loose/a/1.jpg", f"{folder}/loose/a/2.JPEG", "loose/none.jpg", "loose/a/1.jpg"]
    path = folder / f"list{suffix}"
    table = pa.table({"n": [1, 2, 3, 4], "url": names})
    if suffix == ".txt":
        path.write_text("\n\n".join(names) + "\n")
    elif suffix == ".csv":
        pa_csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    image_ids = ids(shards(path))
    full = [f"{folder}/{name}" if not name.startswith("/") else name for name in names]
    assert image_ids == [*full[:3], f"{full[3]}#row=3"]


def test_an_image_that_is_named_several_times_has_several_ids(folder: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (folder / name).write_text("loose/a/1.jpg\nhttps://host/i?n=1\nhttps://host/i?n=2\n")
    image_ids = ids(shards(folder / "loose", folder / "one.txt", folder / "two.txt"))
    assert len(image_ids) == 4 + 3 + 3
    assert len(set(image_ids)) == len(image_ids)
    assert f"{folder}/loose/a/1.jpg#row=0" in image_ids


def test_a_name_that_is_not_utf_8_is_an_error_row(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with open(bytes(tmp_path / "in") + b"/caf\xe9.jpg", "wb") as file:
        file.write(IMAGE)
    plan = plans.make(str(tmp_path / "out"), shards(tmp_path / "in"), {})
    record, _ = read(plan.load(0), ((0, 1),), _options())
    assert isinstance(record, Record)
    name = f"{tmp_path}/in/caf\\xe9.jpg"
    assert (record.image_id, record.error.error_type) == (name, "unreadable")
    assert record.error.message == f"{name}: the name is not UTF-8; rename the file"
    (tmp_path / "list.txt").write_bytes(b"in/caf\\xe8.jpg\n")
    record, _ = read(*shards(tmp_path / "list.txt"), ((0, 1),), _options())
    assert record.error.message == f"{tmp_path}/in/caf\\xe8.jpg does not exist"


def write_odd(folder: Path, name: bytes) -> None:
    """A file whose name is not UTF-8."""
    with open(bytes(folder) + b"/" + name, "wb") as file:
        file.write(IMAGE)


@pytest.mark.parametrize("name", [b"caf\xe9.tar", b"caf\xe9.ZIP", b"caf\xe9.parquet"])
def test_shards_whose_names_are_not_utf_8_are_refused(folder: Path, name: bytes) -> None:
    write_odd(folder / "shards", name)
    text = name.decode("utf-8", "backslashreplace")
    for name_or_glob in ("shards", "shards/*", f"shards/{name.decode('utf-8', 'surrogateescape')}"):
        with pytest.raises(InputRefused) as caught:
            shards(folder / name_or_glob)
        assert str(caught.value) == f"--input {folder}/shards/{text}: the name is not UTF-8; rename the file"


def test_two_images_that_would_have_the_same_name_are_refused(tmp_path: Path) -> None:
    write_odd(tmp_path, b"caf\xe9.jpg")
    write_odd(tmp_path, b"caf\\xe9.jpg")
    with pytest.raises(InputRefused, match="the name is not UTF-8"):
        shards(tmp_path)


def test_names_that_are_not_utf_8_are_sorted(tmp_path: Path) -> None:
    """By their escaped form, which an update compares."""
    (tmp_path / "caf\udce9").mkdir()
    for name in (b"cafa.jpg", b"caf\xe9.jpg", b"caf\xe9/1.jpg", b"caf\xe9.png", b"cafe.jpg"):
        write_odd(tmp_path, name)
    (shard,) = shards(tmp_path, tmp_path / "cafa.jpg")
    assert shard.payload.keys == ("caf\\xe9.jpg", "caf\\xe9.png", "caf\\xe9/1.jpg", "cafa.jpg", "cafe.jpg")


def test_credentials_of_lists_of_any_length_are_read_again(tmp_path: Path) -> None:
    lists = {"a": 3, "b": plans.OBJECTS_PER_SHARD + 1, "c": 3}
    lines = {name: [f"https://host/{name}{i}.jpg?w={i}" for i in range(count)] for name, count in lists.items()}
    for name in lists:
        (tmp_path / f"{name}.txt").write_text("\n".join(lines[name]))
    inputs = [str(tmp_path / f"{name}.txt") for name in lists]
    for limit in (None, 2, 5, plans.OBJECTS_PER_SHARD + 5):
        archive = Archive(RunConfig(input=inputs, output="/o", limit=limit))
        plan = plans.make(str(tmp_path / "out"), archive.shards(), {})
        keys = archive.keys_with_credentials(plan)
        assert list(keys) == list(range(plan.shards))
        assert list(itertools.chain(*keys.values())) == list(itertools.chain(*lines.values()))[:limit]
    (tmp_path / "a.txt").write_text("\n".join(lines["a"][:2]))
    with pytest.raises(InputRefused, match=r"expected https://host/a2\.jpg, found https://host/b0\.jpg"):
        archive.keys_with_credentials(plan)


def test_the_hash_set_uses_little_memory() -> None:
    count = 100_000
    ids = [f"https://host/{i:09d}.jpg" for i in range(count)]
    tracemalloc.start()
    try:
        seen = HashSet64()
        assert all(map(seen.add, ids))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 25 * count
    assert peak < 37 * count
    assert not any(map(seen.add, ids))
    assert seen.add("https://host/another.jpg")


@pytest.mark.parametrize(("delimiter", "suffix"), [(";", "csv"), ("\t", "csv"), ("|", "csv"), ("\t", "tsv")])
def test_lists_with_other_delimiters(folder: Path, delimiter: str, suffix: str) -> None:
    rows = [["path", '"a, b, c"'], ["loose/a/1.jpg", "1"], ['"loose/a/2, 3.jpg"', "2"]]
    path = folder / f"list.{suffix}"
    path.write_text("".join(delimiter.join(row) + "\n" for row in rows))
    (shard,) = shards(path)
    assert shard.payload.keys == (f"{folder}/loose/a/1.jpg", f"{folder}/loose/a/2, 3.jpg")


def test_other_delimiters_in_the_names_of_columns(folder: Path) -> None:
    (folder / "list.csv").write_text("url,a;b;c\nloose/a/1.jpg,1\n")
    (shard,) = shards(folder / "list.csv", keep="a;b;c")
    assert shard.payload.keys == (f"{folder}/loose/a/1.jpg",)


def test_a_column_of_a_csv_may_begin_with_numbers_and_end_with_words(folder: Path) -> None:
    lines = [f"loose/{i}.jpg,{i if i < 200_000 else 'none'}" for i in range(200_001)]
    (folder / "list.csv").write_text("url,score\n" + "\n".join(lines) + "\n")
    planned = shards(folder / "list.csv", keep="score")
    assert sum(shard.rows or 0 for shard in planned) == 200_001
    assert json.loads(planned[-1].payload.kept[-1]) == {"score": "none"}


def test_kept_values_of_a_csv_are_those_of_the_file(folder: Path) -> None:
    names = ["id", "when", "big", "flag", "price", "none"]
    values = ["000123", "2024-01-01T00:00:00Z", "12345678901234567890123", "true", "1.10", ""]
    (folder / "list.csv").write_text(f"url,{','.join(names)}\nloose/a/1.jpg,{','.join(values)}\n")
    archive = Archive(RunConfig(input=str(folder / "list.csv"), output="/o", keep=names))
    (shard,) = archive.shards()
    assert json.loads(shard.payload.kept[0]) == dict(zip(names, values, strict=True))
    assert archive.keep_types == dict.fromkeys(names, pa.string())


@pytest.mark.parametrize("type_", [pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.large_string()])
def test_a_parquet_list_may_hold_its_uris_in_any_kind_of_text(folder: Path, type_: pa.DataType) -> None:
    urls = pa.array(["loose/a/1.jpg", "loose/a/2.JPEG", None]).cast(type_)
    pq.write_table(pa.table({"url": urls, "other": urls}), folder / "list.parquet")
    (shard,) = shards(folder / "list.parquet", keep="other")
    assert shard.payload.keys == (f"{folder}/loose/a/1.jpg", f"{folder}/loose/a/2.JPEG")
    assert json.loads(shard.payload.kept[1]) == {"other": "loose/a/2.JPEG"}


def test_kept_columns_of_a_list(folder: Path) -> None:
    path = folder / "list.csv"
    path.write_text("where,n,place\nloose/a/1.jpg,7,north\nloose/a/2.JPEG,8,\n")
    archive = Archive(RunConfig(input=str(path), output="/o", keep="n,place", uri_column="where"))
    records = [item for shard in archive.shards() for item in read(shard, ((0, 9),), archive.options())][:2]
    assert [dict(record.kept) for record in records] == [{"n": "7", "place": "north"}, {"n": "8", "place": ""}]
    assert archive.keep_types == {"n": pa.string(), "place": pa.string()}


def test_kept_arrays_and_structs_become_text(folder: Path) -> None:
    path = folder / "list.parquet"
    columns = {
        "url": pa.array(["loose/a/1.jpg", "loose/a/2.JPEG"]),
        "tags": pa.array([["a", "b"], None]),
        "box": pa.array([{"x": 1}, {"x": 2}]),
    }
    pq.write_table(pa.table(columns), path)
    archive = Archive(RunConfig(input=str(path), output="/o", keep="tags,box", uri_column="url"))
    records = [item for shard in archive.shards() for item in read(shard, ((0, 9),), archive.options())][:2]
    assert [dict(record.kept) for record in records] == [
        {"tags": '["a", "b"]', "box": '{"x": 1}'},
        {"tags": None, "box": '{"x": 2}'},
    ]
    assert set(archive.keep_types.values()) == {pa.string()}


def test_columns_of_the_same_name_are_refused_if_they_are_used(folder: Path) -> None:
    (folder / "list.csv").write_text("url,label,label\nloose/a/1.jpg,1,2\n")
    assert len(shards(folder / "list.csv")) == 1
    with pytest.raises(InputRefused, match="2 columns named 'label'"):
        shards(folder / "list.csv", keep="label")
    twice = pa.table([[IMAGE], [IMAGE], ["a cat"]], names=["image", "image", "caption"])
    pq.write_table(twice, folder / "twice.parquet")
    with pytest.raises(InputRefused, match="2 columns named 'image'"):
        shards(folder / "twice.parquet")


def test_a_broken_parquet_file_is_refused_only_if_it_is_the_only_input(folder: Path) -> None:
    (folder / "loose" / "half.parquet").write_bytes(b"PAR1 cut")
    assert [shard.kind for shard in shards(folder / "loose")] == ["objects", "parquet"]
    with pytest.raises(InputRefused, match="cannot be read as Parquet"):
        shards(folder / "loose" / "half.parquet")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("photos/**.jpg", "cannot be read: Invalid pattern"), ("a/{0000..0099.tar", "its braces are not valid")],
)
def test_invalid_patterns_are_refused(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        shards(folder / pattern)


def test_s3a_and_file_uris_are_normalized(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"s3a://bucket/x.jpg\nfile://{tmp_path}/y.jpg\ns3://bucket/x.jpg\n")
    assert ids(shards(tmp_path / "list.txt")) == [
        "s3://bucket/x.jpg",
        f"{tmp_path}/y.jpg",
        "s3://bucket/x.jpg#row=2",
    ]


def test_empty_parts_of_a_path_are_kept(tmp_path: Path) -> None:
    access.write("memory://deep//x.jpg", IMAGE)
    try:
        (shard,) = shards("memory://deep//x.jpg")
        assert ids([shard]) == ["memory://deep//x.jpg"]
    finally:
        access.delete("memory://deep//x.jpg")


def test_limit_cuts_shards_of_unknown_length(folder: Path) -> None:
    assert [s.rows for s in shards(folder / "shards/*.tar", limit=3)] == [2, 1]
    assert [s.rows for s in shards(folder / "shards/*.parquet", limit=4)] == [3, 1]
    assert [s.payload.keys for s in shards(folder / "loose", limit=1)] == [("4.webp",)] or len(
        ids(shards(folder / "loose", limit=1))
    ) == 1


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["none"], {}, "none does not exist"),
        (["loose/notes.md"], {}, "notes.md cannot be read: no file name ends in one of .*jpg"),
        (["scan.dcm"], {}, "scan.dcm cannot be read: DICOM files are not read; export them as PNG"),
        (
            ["other"],
            {},
            r"other has only 2 \.npy, 1 \.tar\.xz \(not read\): NumPy files are not read; .*; xz and bzip2",
        ),
        (["other/*.npy"], {}, r"npy has only 2 \.npy \(not read\): NumPy files are not read; save the arrays as PNG"),
        (["empty"], {}, "empty matches no images"),
        (["loose/*.tar"], {}, "matches no images"),
        (["loose", "none/*.jpg"], {}, "none"),
        (["shards/0000.tar", "shards/0009.tar"], {}, "0009.tar does not exist"),
        (["none.csv"], {}, "none.csv does not exist"),
        (["broken.parquet"], {}, "broken.parquet cannot be read as Parquet"),
        (["shards/*.parquet"], {"image_column": "pixels"}, "pixels"),
        (["shards/*.parquet"], {"keep": "nosuch"}, "--keep nosuch: .* has only the columns image, label"),
        (["loose"], {"keep": "label"}, "--keep label: loose images have no columns"),
        (["numbers.csv"], {}, "no column looks like image URIs"),
        (["numbers.csv"], {"uri_column": "x"}, "--uri-column x: .* has only the columns n"),
    ],
)
def test_invalid_inputs_are_refused_by_name(folder: Path, names: list[str], settings: dict, message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "other").mkdir()
    for name in ("scan.dcm", "other/1.npy", "other/2.npy", "other/x.tar.xz"):
        (folder / name).write_bytes(b"1")
    (folder / "broken.parquet").write_bytes(b"PAR1 not really PAR1")
    (folder / "numbers.csv").write_text("n\n1\n2\n")
    with pytest.raises(InputRefused, match=message):
        shards(*[folder / name for name in names], **settings)


def test_a_parquet_file_without_images_is_passed_over(folder: Path) -> None:
    footer = {b"nightshift": b"{}"}
    others = {
        "loose/metadata.parquet": pa.table({"file_name": ["a/1.jpg"], "label": [1]}),
        "shards/0000.parquet": pa.table({"url": ["u"], "caption": ["c"]}),
        "out/part-1.parquet": pa.table({"thumbnail": [IMAGE]}).replace_schema_metadata(footer),
    }
    expected = ids(shards(folder))
    for name, table in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        pq.write_table(table, folder / name)
    archive = Archive(RunConfig(input=str(folder), output="/o"))
    assert ids(list(archive.shards())) == expected
    assert archive.left_out.counts[".parquet without images"] == 3
    with pytest.raises(InputRefused, match=r"0000\.parquet has no column of image bytes"):
        shards(folder / "loose", folder / "shards/0000.parquet", image_column="image")
    with pytest.raises(InputRefused, match="was written by a run of Nightshift"):
        shards(folder / "out")


def test_a_folder_named_like_a_file_is_a_folder(folder: Path, s3: S3Server) -> None:
    (folder / "shards").rename(folder / "x.parquet")
    assert len(ids(shards(folder / "x.parquet"))) == 11
    for info in access.list_objects(str(folder / "x.parquet")):
        access.write(s3.uri(f"named/x.parquet/{info.uri.rpartition('/')[2]}"), access.read(info.uri))
    assert len(ids(shards(s3.uri("named/x.parquet")))) == 11
    put(s3, "named/x.parquet/", b"")
    put(s3, "named/x.jpg/", b"")
    put(s3, "named/x.jpg/1.jpg")
    put(s3, "named/x.jpg-2.jpg")
    put(s3, "named/alone.jpg/", b"")
    put(s3, "named/empty.jpg", b"")
    put(s3, "named/sub/", b"")
    assert len(ids(shards(s3.uri("named/x.parquet")))) == 11
    archive = Archive(RunConfig(input=s3.uri("named"), output="/o"))
    assert len(ids(list(archive.shards()))) == 11 + 3
    assert not archive.left_out.counts


def test_an_object_of_another_kind_is_refused_by_its_kind(s3: S3Server) -> None:
    access.write(s3.uri("other/scan.dcm"), IMAGE)
    with pytest.raises(InputRefused, match=r"scan\.dcm cannot be read: DICOM files are not read"):
        shards(s3.uri("other/scan.dcm"))
    with pytest.raises(InputRefused, match=r"other has only 1 \.dcm \(not read\): DICOM files are not read"):
        shards(s3.uri("other"))
    with pytest.raises(InputRefused, match=r"none\.dcm matches no images"):
        shards(s3.uri("other/none.dcm"))


def test_an_unreadable_folder_is_refused(s3: S3Server) -> None:
    with pytest.raises(Refused, match="no-such-bucket"):
        shards("s3://no-such-bucket/images")
    with pytest.raises(Refused, match="nosuch"):
        shards("nosuch://host/images")


def test_an_s3_prefix_is_found_like_a_folder(s3: S3Server, folder: Path) -> None:
    for info in access.list_objects(str(folder)):
        access.write(s3.uri(f"discover/{info.uri[len(str(folder)) + 1 :]}"), access.read(info.uri))
    local = [image_id.replace(str(folder), "s3://archive/discover") for image_id in ids(shards(folder))]
    assert ids(shards("s3://archive/discover")) == local
    assert len(ids(shards("s3://archive/discover/shards/{0000..0001}.tar"))) == 4
    assert len(ids(shards("s3://archive/discover/loose/**/*.jpg"))) == 1


def test_the_check_and_the_plan_share_one_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "loose" / "notes.npy").write_bytes(b"")
    names = [str(folder / name) for name in ("loose", "shards/0000.tar", "shards/0001.tar")]
    expected = shards(*names)
    asked: list[str] = []
    for name in ("list_objects", "head"):
        original = getattr(access, name)
        monkeypatch.setattr(
            access, name, lambda uri, original=original, **more: (asked.append(uri), original(uri, **more))[1]
        )
    archive = Archive(RunConfig(input=names, output="/o"))
    archive.check()
    assert archive.left_out.counts == {}
    before = len(asked)
    assert before == 1 + 2
    assert list(archive.shards()) == expected
    assert archive.left_out.counts == {".npy": 1, ".md": 1, ".json": 1, ".jpg hidden": 1}
    assert len(asked) == before
    assert list(archive.shards()) == expected, "a second plan lists again"
    assert len(asked) == 2 * before


def test_many_inputs_are_asked_for_at_the_same_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests for a range of tars would take an hour if they were one by one."""
    barrier, head = threading.Barrier(2, timeout=30), access.head
    monkeypatch.setattr(access, "head", lambda uri: (barrier.wait(), head(uri))[1])
    assert len(shards(folder / "shards/0000.tar", folder / "shards/0001.tar")) == 2


def put(s3: S3Server, key: str, data: bytes = IMAGE) -> None:
    """Write by HTTP, since obstore refuses such keys."""
    urllib.request.urlopen(urllib.request.Request(f"{s3.endpoint}/archive/{key}", data=data, method="PUT")).close()


@pytest.mark.parametrize("key", ["a//b.jpg", "a/%2E%2E/b.jpg", "a/%01.jpg"])
def test_an_object_key_that_is_no_path_is_planned(s3: S3Server, key: str) -> None:
    prefix = f"pathless/{len(key)}"
    put(s3, f"{prefix}/0.jpg")
    put(s3, f"{prefix}/{key}")
    expected = sorted(s3.uri(f"{prefix}/{name}") for name in ("0.jpg", unquote(key)))
    for name in (prefix, f"{prefix}/**/*.jpg"):
        assert ids(shards(s3.uri(name))) == expected


def test_listed_names_that_look_like_credentials_are_names(s3: S3Server) -> None:
    names = [f"img.jpg?key={i}.jpg" for i in range(2)] + ["z.zip?sig=1.zip", "z.zip?sig=2.zip"]
    uris = [s3.uri(f"looks/{name}") for name in names]
    for uri in uris[:2]:
        access.write(uri, IMAGE)
    for uri in uris[2:]:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("q.jpg", IMAGE)
        access.write(uri, buffer.getvalue())
    assert sorted(ids(shards(s3.uri("looks")))) == [*uris[:2], *(f"{uri}#q.jpg" for uri in uris[2:])]


def test_inputs_that_differ_only_in_their_credentials_are_refused() -> None:
    names = ["https://127.0.0.1:9/get.jpg?id=1", "https://127.0.0.1:9/get.jpg?id=2"]
    with pytest.raises(InputRefused, match="given twice with different queries"):
        list(Archive(RunConfig(input=names, output="o")).shards())
