"""Labels: which image a name means, and what is refused instead of guessed."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outputs import write_output

from pipeline.errors import InputRefused, OutputRefused, SettingRefused
from pipeline.explore.table import Output, open_output
from pipeline.training.labels import find
from pipeline.training.samples import VectorFile, read_samples

IDS = [
    "/data/cats/a.jpg",
    "/data/cats/b.jpg",
    "/data/dogs/a.jpg",
    "/data/dogs/c d.jpg",
    "s3://bucket/x.tar#cats/e.jpg",
    "s3://bucket/x.tar#dogs/f.jpg",
    "s3://bucket/x.tar#g.jpg",
    "s3://bucket/x.tar#g.jpg#row=7",
    "/data/dogs/h.jpg",
]
VECTORS = np.arange(len(IDS) * 3, dtype=np.float32).reshape(-1, 3)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    kept = {"cls": ["cat", None, "dog", "dog", "cat", "dog", "", "cat", "dog"], "day": list("112233445")}
    return open_output(str(write_output(tmp_path / "out", IDS, VECTORS, errors=["/data/cats/broken.jpg"], kept=kept)))


def csv(folder: Path, text: str, name: str = "labels.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_name_is_an_image_id_or_its_end(output: Output, tmp_path: Path) -> None:
    file = csv(tmp_path, "image,label\n/data/cats/a.jpg,cat\nb.jpg,cat\n./dogs/a.jpg,dog\nf.jpg,dog\nc d.jpg,dog\n")
    found = find(output, file)
    assert found.rows == (0, 1, 2, 3, 5)
    assert found.image_ids == tuple(IDS[row] for row in found.rows)
    assert found.classes == (("cat",), ("cat",), ("dog",), ("dog",), ("dog",))
    assert (found.names, found.unknown) == (("cat", "dog"), ())


def test_a_name_that_fits_several_images_is_refused_and_listed(output: Output, tmp_path: Path) -> None:
    file = csv(tmp_path, "image,label\na.jpg,cat\nb.jpg,cat\n")
    with pytest.raises(
        InputRefused,
        match=r"1 names fit several images: a.jpg fits /data/cats/a.jpg and /data/dogs/a.jpg; write more of",
    ):
        find(output, file)


def test_a_whole_image_id_means_only_its_own_image(output: Output, tmp_path: Path) -> None:
    found = find(output, csv(tmp_path, "image,label\ns3://bucket/x.tar#g.jpg,cat\nh.jpg,dog\n"))
    assert found.image_ids == ("s3://bucket/x.tar#g.jpg", "/data/dogs/h.jpg")


def test_part_of_a_file_name_is_not_its_end(output: Output, tmp_path: Path) -> None:
    found = find(output, csv(tmp_path, "image,label\nb.jpg,cat\nd.jpg,dog\n"))
    assert found.unknown == ("d.jpg",)


def test_unknown_names_are_listed_and_unreadable_ones_named(output: Output, tmp_path: Path) -> None:
    found = find(output, csv(tmp_path, "image,label\nb.jpg,cat\nnone.jpg,dog\nbroken.jpg,cat\n"))
    assert found.unknown == ("none.jpg", "broken.jpg")
    assert found.unreadable == ("broken.jpg",)
    with pytest.raises(InputRefused, match=r"labels no image of .*: it knows no x.jpg, y.jpg; names must be"):
        find(output, csv(tmp_path, "image,label\nx.jpg,cat\ny.jpg,dog\n"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", "image;label\nb.jpg;cat\nh.jpg;dog, big\n"),
        ("l.tsv", "\ufeffimage\tlabel\textra\nb.jpg\tcat\t1\nh.jpg\tdog, big\t2\n"),
        ("l.json", '[{"image": "b.jpg", "label": "cat"}, {"image": "h.jpg", "label": "dog, big"}]'),
        ("l.json", '{"b.jpg": "cat", "h.jpg": "dog, big"}'),
        ("l.jsonl", '{"image": "b.jpg", "label": "cat"}\n\n{"image": "h.jpg", "label": "dog, big"}\n'),
    ],
)
def test_every_format_of_labels(output: Output, tmp_path: Path, name: str, text: str) -> None:
    assert find(output, csv(tmp_path, text, name)).classes == (("cat",), ("dog, big",))


def test_parquet_with_other_columns_and_numbers(output: Output, tmp_path: Path) -> None:
    pq.write_table(pa.table({"file": ["b.jpg", "h.jpg"], "y": [1.0, None]}), tmp_path / "l.parquet")
    found = find(output, str(tmp_path / "l.parquet"), name_column="file", label_column="y")
    assert (found.classes, found.unlabelled) == ((("1",),), 1)


def test_labels_that_are_not_plain_text(output: Output, tmp_path: Path) -> None:
    """A BOM, line ends of old Macs, names in other scripts and very long ones, NaN for no class, and bytes."""
    long = "🦌" * 5000
    old_mac = tmp_path / "mac.csv"
    old_mac.write_bytes(f"\ufeffimage,label\rb.jpg,{long}\rh.jpg,<b>\u732b</b>\r".encode())
    assert find(output, str(old_mac)).classes == ((long,), ("<b>\u732b</b>",))
    numbers = pa.table({"image": ["b.jpg", "h.jpg", "f.jpg"], "label": [float("nan"), 2.0, 1.5]})
    pq.write_table(numbers, tmp_path / "nan.parquet")
    found = find(output, str(tmp_path / "nan.parquet"))
    assert (found.classes, found.unlabelled) == ((("1.5",), ("2",)), 1)
    pq.write_table(pa.table({"image": [b"b.jpg"], "label": [b"cat"]}), tmp_path / "bytes.parquet")
    assert find(output, str(tmp_path / "bytes.parquet")).classes == (("cat",),)
    (tmp_path / "utf16.csv").write_bytes("image,label\nb.jpg,cat\n".encode("utf-16"))
    with pytest.raises(InputRefused, match=r"utf16.csv cannot be read: 'utf-8' codec can't decode"):
        find(output, str(tmp_path / "utf16.csv"))


def test_a_name_twice_with_one_class_is_one_label(output: Output, tmp_path: Path) -> None:
    found = find(output, csv(tmp_path, "image,label\nb.jpg,cat\n./b.jpg,cat\ncats/b.jpg,cat\nh.jpg,dog\n"))
    assert found.classes == (("cat",), ("dog",))


def test_a_missing_column_is_named(output: Output, tmp_path: Path) -> None:
    with pytest.raises(
        InputRefused, match="entry 1 has no 'label', only image, class; name the column with --label-co"
    ):
        find(output, csv(tmp_path, "image,class\nb.jpg,cat\n"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.json", "3", "it must be a list of objects"),
        ("l.json", "[", "cannot be read"),
        ("l.csv", "image,label\n", "has no entry"),
        ("l.csv", "image,label\n,cat\n", "entry 1 has no name of an image"),
        ("l.parquet", "text", "cannot be read"),
        ("l.csv", "image,label,label\nb.jpg,cat,dog\n", "cannot be read: it has two columns 'label'"),
        ("l.csv", f"image,label\nb.jpg,{'x' * 200_000}\n", "cannot be read: field larger than field limit"),
        ("l.json", r'{"b.jpg": "\ud83d"}', "entry 1 is no valid text: .*surrogates not allowed"),
        ("l.json", "[" * 100_000, "cannot be read"),
        ("l.json", '[{"image": NaN, "label": "cat"}]', "entry 1 has no name of an image"),
    ],
)
def test_a_file_that_is_no_list_of_labels_is_refused(
    output: Output, tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(InputRefused, match=message):
        find(output, csv(tmp_path, text, name))


def test_other_files_and_missing_ones_are_refused(output: Output, tmp_path: Path) -> None:
    with pytest.raises(SettingRefused, match=r"it must be a file that ends in \.csv"):
        find(output, "labels")
    with pytest.raises(InputRefused, match=r"none\.csv does not exist"):
        find(output, str(tmp_path / "none.csv"))


def test_two_classes_of_one_image_are_refused_unless_it_may_have_several(output: Output, tmp_path: Path) -> None:
    file = csv(tmp_path, "image,label\nb.jpg,cat\ncats/b.jpg,pet\nh.jpg,dog\n")
    with pytest.raises(InputRefused, match=r"/data/cats/b.jpg has 2 classes, cat and pet: keep one .* --multi-label"):
        find(output, file)
    assert find(output, file, multi_label=True).classes == (("cat", "pet"), ("dog",))


def test_an_image_without_a_class_counts_only_with_several_labels(output: Output, tmp_path: Path) -> None:
    file = tmp_path / "l.json"
    file.write_text(json.dumps({"b.jpg": [], "h.jpg": ["dog", "pet"], "f.jpg": ["pet"]}))
    found = find(output, str(file), multi_label=True)
    assert found.classes == ((), ("pet",), ("dog", "pet"))
    samples = read_samples(output, found, multi_label=True)
    assert samples.targets.tolist() == [[0, 0], [0, 1], [1, 1]]


def test_folders_are_classes(output: Output) -> None:
    found = find(output, "folder")
    assert found.classes == tuple((name,) for name in ("cats", "cats", "dogs", "dogs", "cats", "dogs", "dogs"))
    assert found.rows == (0, 1, 2, 3, 4, 5, 8)
    assert found.unlabelled == 2, "members without a folder"


def test_a_kept_column_is_the_class(output: Output) -> None:
    found = find(output, "column:cls")
    assert found.rows == (0, 2, 3, 4, 5, 7, 8)
    assert found.unlabelled == 2
    with pytest.raises(OutputRefused, match="has no column breed; its columns are"):
        find(output, "column:breed")


@pytest.mark.parametrize("memory_bytes", [1 << 30, 10])
def test_samples_are_the_vectors_of_the_labelled_images(output: Output, memory_bytes: int) -> None:
    found = find(output, "column:cls")
    samples = read_samples(output, found, group_by="day", normalize=False, memory_bytes=memory_bytes)
    assert isinstance(samples.vectors, VectorFile) == (memory_bytes == 10)
    rows = np.arange(len(samples))
    np.testing.assert_array_equal(samples.take(rows), VECTORS[list(found.rows)])
    np.testing.assert_array_equal(np.concatenate([x for x, _ in samples.chunks()]), VECTORS[list(found.rows)])
    assert samples.names == ("cat", "dog")
    assert [samples.names[c] for c in samples.classes()] == ["cat", "dog", "dog", "cat", "dog", "cat", "dog"]
    assert samples.groups.tolist() == [0, 1, 1, 2, 2, 3, 4]  # type: ignore[union-attr]
    scaled = read_samples(output, found, memory_bytes=memory_bytes).take(rows)
    np.testing.assert_allclose(np.linalg.norm(scaled, axis=1), 1, rtol=1e-6)
