"""A whole fit on an output: the files that it writes, one concept, and what to label next."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outputs import write_output

from pipeline.errors import InputRefused, SettingRefused
from pipeline.models.heads import load_head
from pipeline.training.job import FitConfig, fit

IDS = [f"/photos/{'ab'[number % 2]}/{number:04d}.jpg" for number in range(400)]


@pytest.fixture
def output(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    centres = np.where(np.arange(400) % 2, 0.4, -0.4)[:, None]
    vectors = (rng.normal(size=(400, 12)) + centres).astype(np.float32)
    return str(write_output(tmp_path / "out", IDS, vectors, rows_per_part=90))


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_fit_writes_a_head_its_evaluation_and_suggestions(output: str, tmp_path: Path) -> None:
    labelled = IDS[:60]
    lines = "\n".join(f"{image_id},{image_id.split('/')[2]}" for image_id in labelled)
    (tmp_path / "labels.csv").write_text(f"image,label\n{lines}\n")
    config = FitConfig(
        labels=str(tmp_path / "labels.csv"), to=str(tmp_path / "ab.safetensors"), suggest=20, pictures=False
    )
    fit(output, config)
    head = load_head(str(tmp_path / "ab.safetensors")).head
    record = json.loads((tmp_path / "ab.json").read_text())
    assert head.classes == ("a", "b")
    assert head.network == {"model": "tiny:network", "weights": "random", "seed": 0}
    assert record["embedding_space"]["id"] == head.space.id
    assert record["accuracy"] > 0.75
    suggested = rows(tmp_path / "ab.suggest.csv")
    assert len({each["image"] for each in suggested}) == 20
    assert not {each["image"] for each in suggested} & {*labelled}
    assert all(float(each["score"]) < 0.9 for each in suggested), "the images that the head is least sure of"


def test_duplicates_are_left_out(output: str, tmp_path: Path) -> None:
    lines = "\n".join(f"{image_id},{image_id.split('/')[2]}" for image_id in IDS[:60])
    (tmp_path / "labels.csv").write_text(f"image,label\n{lines}\n")
    table = {"group": [0] * 11, "image_id": IDS[:11], "keep": [True] + [False] * 10, "similarity": [1.0] * 11}
    pq.write_table(pa.table(table), tmp_path / "duplicates.parquet")
    config = FitConfig(
        labels=str(tmp_path / "labels.csv"),
        to=str(tmp_path / "ab.safetensors"),
        exclude=str(tmp_path / "duplicates.parquet"),
        pictures=False,
    )
    assert fit(output, config).labels.image_ids == (IDS[0], *IDS[11:60])
    assert json.loads((tmp_path / "ab.json").read_text())["labels"] == 50


def test_one_concept_ranks_the_archive(output: str, tmp_path: Path) -> None:
    (tmp_path / "deer.txt").write_text("\n".join(Path(image_id).name for image_id in IDS[1:41:2]))
    (tmp_path / "misses.txt").write_text("\n".join(IDS[0:40:2]))
    config = FitConfig(
        positives=str(tmp_path / "deer.txt"),
        negatives=str(tmp_path / "misses.txt"),
        to=str(tmp_path / "deer.safetensors"),
        suggest=10,
        pictures=False,
    )
    result = fit(output, config)
    assert result.head.classes == ("deer", "not deer")
    ranked = rows(tmp_path / "deer.ranking.csv")
    scores = [float(each["score"]) for each in ranked]
    assert scores == sorted(scores, reverse=True)
    assert np.mean(["/b/" in each["image"] for each in ranked[:50]]) > 0.8
    reasons = [each["reason"] for each in rows(tmp_path / "deer.suggest.csv")]
    assert reasons == ["likely"] * 5 + ["uncertain"] * 5


def test_what_contradicts_is_refused(output: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0001.jpg\n")
    names = {"positives": str(tmp_path / "a.txt"), "to": str(tmp_path / "a.safetensors")}
    with pytest.raises(InputRefused, match=r"0001.jpg is in --positives and in --negatives"):
        fit(output, FitConfig(**names, negatives=names["positives"]))  # type: ignore[arg-type]
    for more, message in [
        ({"labels": "folder"}, "--labels and --positives are two ways"),
        ({"suggest": -1}, "--suggest is -1"),
        ({"multi_label": True}, "--multi-label does not fit --positives"),
        ({"to": "head.pt"}, r"must end in \.safetensors"),
        ({"holdout": 0.7}, "--holdout is 0.7"),
        ({"positives": None}, "--labels is missing"),
    ]:
        with pytest.raises(SettingRefused, match=message):
            FitConfig(**{**names, **more})  # type: ignore[arg-type]
