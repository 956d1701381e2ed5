"""Class names from text, JSON and CSV."""

from pathlib import Path

import pytest

from pipeline.errors import WeightsRefused
from pipeline.models.labels import read_labels


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "cat\ndog\nbig bird\n"),
        ("l.txt", "\ufeffcat\r\ndog\r\nbig bird"),
        ("l.json", '["cat", "dog", "big bird"]'),
        ("l.json", '{"1": "dog", "0": "cat", "2": "big bird"}'),
        ("l.json", '{"0": ["n01", "cat"], "1": ["n02", "dog"], "2": ["n03", "big bird"]}'),
        ("l.json", '{"big bird": 2, "cat": 0, "dog": 1}'),
        ("l.json", '{"model_type": "resnet", "id2label": {"0": "cat", "1": "dog", "2": "big bird"}}'),
        ("l.csv", "id,label\n1,dog\n0,cat\n2,big bird\n"),
        ("l.csv", "Class_Name,Index\ncat,0\nbig bird,2\ndog,1\n"),
        ("l.csv", "label\ncat\ndog\nbig bird\n"),
    ],
)
def test_labels_are_read_in_order(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_labels(str(tmp_path / name), 3) == ("cat", "dog", "big bird")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "cat\ndog\n", "has 2 class names, but the network has 3 classes"),
        ("l.json", '{"0": "cat", "2": "dog", "3": "bird"}', "ids must be 0 to 2"),
        ("l.json", '{"cat": 0,', "cannot be read"),
        ("l.csv", "a,b\n1,2\n", "name them id and label"),
        ("l.csv", "", "cannot be read"),
    ],
)
def test_labels_that_do_not_match_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(WeightsRefused, match=message):
        read_labels(str(tmp_path / name), 3)
    with pytest.raises(WeightsRefused, match="cannot be read"):
        read_labels(str(tmp_path / "none.txt"), 3)
