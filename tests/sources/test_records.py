"""image_ids and WebDataset keys."""

import pytest

from pipeline.sources.records import UniqueIds, split_key


def test_ids_are_unique_for_any_member_names() -> None:
    ids = UniqueIds("u")
    names = ["a", "a#row=2", "a", "a#row=2", "a"]
    image_ids = [ids.new(name, row) for row, name in enumerate(names)]
    assert len(set(image_ids)) == 5
    assert image_ids[:2] == ["u#a", "u#a#row=2"]


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
def test_keys_and_extensions_as_in_webdataset(name: str, key: str, extension: str) -> None:
    assert split_key(name) == (key, extension)
