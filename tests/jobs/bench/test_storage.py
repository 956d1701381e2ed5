"""The recall of vectors that are stored in fewer bytes."""

import json
from pathlib import Path

import pytest

from jobs.bench import storage


def test_the_figures_of_drawn_vectors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "figures.json"
    assert storage.main(["--rows", "1000", "--dim", "160", "--json", str(file)]) == 0
    figures = {each["name"]: each for each in json.loads(file.read_text())["figures"]}
    assert {name: each["bytes"] for name, each in figures.items()} == {
        "float32": 640, "float16": 320, "int8": 164, "pca:64": 256, "pca:128": 512,
    }  # fmt: skip
    assert figures["float32"]["recall"] == 1
    assert figures["float16"]["recall"] > figures["int8"]["recall"] > 0.95
    assert figures["int8"]["recall"] > figures["pca:128"]["recall"] > figures["pca:64"]["recall"] > 0.2
    assert all(each["recall_wider"] >= each["recall"] for each in figures.values())
    assert "recall@10" in capsys.readouterr().out


def test_too_few_vectors_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert storage.main(["--rows", "1000", "--dim", "100"]) == 2
    assert "more than 128 numbers" in capsys.readouterr().err
