"""A whole fit on an output: the files that it writes, one concept, and what to label next."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outputs import write_output
from servers import S3Server

from jobs import fit as fit_job
from pipeline.errors import InputRefused, OutputRefused, SettingRefused
from pipeline.models.heads import load_head
from pipeline.storage import access
from pipeline.training.job import FitConfig, fit, unknown_text

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


def labels_of(folder: Path, classes: list[str]) -> str:
    lines = "".join(f'{image_id},"{name}"\n' for image_id, name in zip(IDS, classes, strict=False))
    (folder / "labels.csv").write_text(f"image,label\n{lines}")
    return str(folder / "labels.csv")


@pytest.mark.parametrize(
    ("classes", "more", "message"),
    [
        (["a"] * 9, {}, "has one class, a: label images of two classes or more"),
        (["a", "b"] * 5 + ["c"], {}, "has fewer than 3 labels of c, too few to fit and to test a class: label more"),
        (["a", "b"] * 5 + ["c", "d"] * 2, {}, "has fewer than 3 labels of c, d, too few"),
        ([""] * 4, {"multi_label": True}, "has no class"),
        (["", " "], {}, "labels no image of"),
    ],
)
def test_labels_that_cannot_be_tested_are_refused(
    output: str, tmp_path: Path, classes: list[str], more: dict[str, bool], message: str
) -> None:
    config = FitConfig(labels=labels_of(tmp_path, classes), to=str(tmp_path / "h.safetensors"), pictures=False, **more)  # type: ignore[arg-type]
    with pytest.raises(InputRefused, match=message):
        fit(output, config)
    assert not (tmp_path / "h.safetensors").exists()


def test_names_of_classes_are_shown_as_text(output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Markup, another script, a line break, and 3,000 letters, from the labels to the page, the table and the head."""
    from pipeline.training import page

    names = ["<script>alert('x')</script>", "\u9e7f\u2028\x1b[31m" + "long" * 750]
    to = str(tmp_path / "h.safetensors")
    result = fit(output, FitConfig(labels=labels_of(tmp_path, names * 6), to=to, pictures=False))
    assert load_head(to).head.classes == tuple(sorted(name.strip() for name in names))
    text = (tmp_path / "h.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text
    page.show(result.evaluation, 1.0)
    assert "\x1b[31m" not in capsys.readouterr().out


def test_outputs_that_have_no_good_vectors_are_refused(tmp_path: Path) -> None:
    config = FitConfig(labels=labels_of(tmp_path, ["a", "b"] * 6), to=str(tmp_path / "h.safetensors"), pictures=False)
    vectors = np.ones((12, 3), np.float32)
    empty = write_output(tmp_path / "empty", [], vectors, errors=IDS[:2])
    with pytest.raises((InputRefused, OutputRefused), match=r"has no rows yet|labels no image"):
        fit(str(empty), config)
    vectors[5, 1] = np.nan
    with_nan = write_output(tmp_path / "nan", IDS[:12], vectors)
    with pytest.raises(InputRefused, match=rf"the vector of {IDS[5]} has numbers that are not finite"):
        fit(str(with_nan), config)


def test_an_output_in_mid_run_is_fitted_to_the_rows_that_it_has(output: str, tmp_path: Path) -> None:
    Path(output, "_SUCCESS").unlink()
    labels = labels_of(tmp_path, ["a", "b"] * 10)
    with open(labels, "a") as file:
        file.write("not-yet.jpg,a\n")
    result = fit(output, FitConfig(labels=labels, to=str(tmp_path / "h.safetensors"), pictures=False))
    assert unknown_text(result.labels) == "1 name of the labels is not among the rows of the output: not-yet.jpg."


def test_the_head_and_its_evaluation_are_written_to_a_bucket(s3: S3Server, own_caches: None, tmp_path: Path) -> None:
    """EMBEDDINGS, the labels and the head are in S3."""
    embeddings, labels, to = (s3.uri(name) for name in ("emb", "labels.csv", "heads/ab.safetensors"))
    vectors = np.where(np.arange(40)[:, None] % 2, 0.5, -0.5) + np.random.default_rng(0).normal(size=(40, 6)) / 3
    write_output(embeddings, IDS[:40], vectors.astype(np.float32))  # type: ignore[arg-type]
    lines = "".join(f"{image_id},{image_id.split('/')[2]}\n" for image_id in IDS[:30])
    access.write(labels, f"image,label\n{lines}".encode())
    result = fit(embeddings, FitConfig(labels=labels, to=to, suggest=3, pictures=False))
    assert result.files == (to, *(to.replace(".safetensors", end) for end in (".json", ".html", ".suggest.csv")))
    assert json.loads(access.read(result.files[1]))["labels"] == 30
    assert load_head(to).head.classes == ("a", "b")


def test_no_image_that_is_left_to_label_is_said(output: str, tmp_path: Path) -> None:
    labels, to = labels_of(tmp_path, ["a", "b"] * 200), str(tmp_path / "h.safetensors")
    config = FitConfig(labels=labels, to=to, method="centroid", pictures=False)
    result = fit(output, replace(config, suggest=5))
    assert result.notes == ("--suggest 5: no image is left to label, so the file of suggestions is empty",)
    assert rows(tmp_path / "h.suggest.csv") == []
    labels_of(tmp_path, ["a", "b"] * 199)
    assert fit(output, replace(config, suggest=5)).notes == ("--suggest 5: only 2 images without a label left",)


def test_files_are_named_as_they_were_given(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.csv").write_text("file,label\n" + "".join(f"{each},{each.split('/')[2]}\n" for each in IDS[:60]))
    for flag in ("--name-column", "--image-column"):
        arguments = [output, "--labels", "l.csv", flag, "file", "--to", "heads/ab.safetensors", "--no-pictures"]
        arguments += ["--method", "centroid"]
        assert fit_job.main(arguments) == 0
        written = [line for line in capsys.readouterr().err.splitlines() if "wrote" in line]
        assert written == [f"nightshift: wrote heads/ab{end}" for end in (".safetensors", ".json", ".html")]
    with pytest.raises(InputRefused, match=r"has no 'image', only file, label; name the column with --name-column"):
        fit(output, FitConfig(labels="l.csv", to="h.safetensors"))
