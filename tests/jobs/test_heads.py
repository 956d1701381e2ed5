"""From an archive to labels of one's own: embed, fit, and classify from pixels and from vectors."""

import json
from pathlib import Path

import images
import numpy as np
import pandas as pd
import pytest
from whole import TINY, Jobs, count_commits, wait_for

from pipeline.output.verify import verify

pytestmark = pytest.mark.slow

KINDS = ("forest", "water", "urban")
NETWORK = ("--model", "resnet18", "--weights", "random", "--precision", "float32", "--resize", 64, "--crop", 64)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 tiles of three kinds, and two broken ones."""
    folder = tmp_path_factory.mktemp("archive")
    for number in range(45):
        path = folder / KINDS[number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(images.encode(images.tile(KINDS[number % 3], number, (72, 64))))
    (folder / "forest/bad.jpg").write_bytes(b"")
    (folder / "water/bad.jpg").write_bytes(images.truncated())
    return folder


def labels_of(output: Path) -> dict[str, str]:
    table = pd.read_parquet(output)
    return dict(zip(table["image_id"], table["label"], strict=True))


def test_a_head_from_labels_to_the_whole_archive(jobs: Jobs, archive: Path, tmp_path: Path) -> None:
    embeddings, head = tmp_path / "embeddings", tmp_path / "kinds.safetensors"
    bad = ("--max-error-rate", "0.2")
    jobs.run("embed", "--input", archive, "--output", embeddings, *NETWORK, *bad, "--rows-per-part", 10)
    lines = [f"{number:03d}.jpg,{KINDS[number % 3]}" for number in range(36)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *lines, "none.jpg,water", "forest/bad.jpg,forest"]))
    done = jobs.run("fit", embeddings, "--labels", tmp_path / "labels.csv", "--to", head)
    assert "36 labels, 5-fold cross-validation" in done.stdout
    assert "2 names of the labels are no rows of the output, 1 of them could not be read: none.jpg" in done.stderr
    report = json.loads((tmp_path / "kinds.json").read_text())
    assert report["accuracy"] > 0.7
    assert report["unknown"] == ["none.jpg", "forest/bad.jpg"]
    run = json.loads((embeddings / "_run.json").read_text())
    assert report["embedding_space"] == run["embedding_space"]
    if report["mistakes"]:
        assert "data:image/jpeg;base64," in (tmp_path / "kinds.html").read_text()

    # from vectors
    from_vectors = tmp_path / "from-vectors"
    command = ("--from", embeddings, "--head", head, "--output", from_vectors, *bad)
    jobs.run("classify", *command, "--rows-per-part", 10)
    assert verify(str(from_vectors)).is_whole
    labels = labels_of(from_vectors)
    assert len(labels) == 45
    right = np.mean([label == Path(image_id).parent.name for image_id, label in labels.items()])
    assert right > 0.8
    table = pd.read_parquet(from_vectors)
    assert set(table["width"]) == {72}
    assert set(table["source"]) == set(table["image_id"])
    errors = pd.read_parquet(from_vectors / "_errors")
    of_embed = pd.read_parquet(embeddings / "_errors")
    names = ["image_id", "stage", "error_type", "message"]
    pd.testing.assert_frame_equal(
        errors[names].sort_values("image_id", ignore_index=True),
        of_embed[names].sort_values("image_id", ignore_index=True),
    )
    assert "already done" in jobs.run("classify", *command).stderr

    # from pixels: the head gives network, weights and transform
    from_pixels = tmp_path / "from-pixels"
    jobs.run("classify", "--input", archive, "--head", head, "--output", from_pixels, "--embeddings", *bad)
    assert labels_of(from_pixels) == labels
    both = pd.read_parquet(from_pixels).merge(table, on="image_id")
    np.testing.assert_allclose(both["score_x"], both["score_y"], atol=2e-3)
    assert json.loads((from_pixels / "_run.json").read_text())["embedding_space"] == run["embedding_space"]


def test_heads_of_other_vectors_are_refused_by_name(jobs: Jobs, archive: Path, tmp_path: Path) -> None:
    embeddings, other, head = tmp_path / "embeddings", tmp_path / "other", tmp_path / "kinds.safetensors"
    limit = ("--limit", 12, "--max-error-rate", "0.5")
    jobs.run("embed", "--input", archive / "water", archive / "urban", "--output", embeddings, *TINY, "--limit", 28)
    jobs.run("fit", embeddings, "--labels", "folder", "--to", head, "--no-pictures")
    assert "--seed 1" not in head.name
    jobs.run("embed", "--input", archive, "--output", other, *TINY, "--seed", 1, *limit)
    refused = jobs.run("classify", "--from", other, "--head", head, "--output", tmp_path / "labels", code=2)
    assert "weights is random, seed 1, not random, seed 0" in refused.stderr
    assert not (tmp_path / "labels").exists()
    out = ("--output", tmp_path / "labels")
    refused = jobs.run("classify", "--input", archive, "--head", head, *out, "--decoder", "exact", code=2)
    assert "decoder is exact, not fast" in refused.stderr
    for flags, message in [
        (("--from", other), "--from needs --head"),
        (("--from", other, "--head", head, "--input", archive), "leave one of them out"),
        (("--from", other, "--head", head, "--resize", 64), "--resize is for images, but --from reads no images"),
        (("--from", archive, "--head", head), "is not an output of Nightshift"),
    ]:
        assert message in jobs.run("classify", *flags, *out, code=2).stderr


def test_a_killed_run_on_vectors_continues(jobs: Jobs, tmp_path: Path) -> None:
    from outputs import SETTINGS, write_output

    from pipeline.training.job import FitConfig, fit

    rng = np.random.default_rng(0)
    ids = [f"/photos/{'ab'[number % 2]}/{number:05d}.jpg" for number in range(3000)]
    vectors = rng.normal(size=(3000, 16)).astype(np.float32) + np.where(np.arange(3000) % 2, 0.5, -0.5)[:, None]
    embeddings = write_output(
        tmp_path / "embeddings", ids, vectors.astype(np.float32), rows_per_part=200, settings=SETTINGS
    )
    head = tmp_path / "ab.safetensors"
    chosen = "\n".join(f"{image_id},{image_id.split('/')[2]}" for image_id in ids[:100])
    (tmp_path / "labels.csv").write_text(f"image,label\n{chosen}\n")
    fit(str(embeddings), FitConfig(labels=str(tmp_path / "labels.csv"), to=str(head), pictures=False))
    out = tmp_path / "labels"
    command = ("--from", embeddings, "--head", head, "--output", out, "--batch-size", 50, "--rows-per-part", 50)
    process = jobs.start("classify", *command)
    wait_for(lambda: count_commits(out) >= 3)
    process.kill()
    process.wait()
    before = count_commits(out)
    assert before < 60
    jobs.run("classify", *command)
    assert verify(str(out)).is_whole
    table = pd.read_parquet(out)
    assert sorted(table["image_id"]) == sorted(ids)
    assert np.mean([label == image_id.split("/")[2] for image_id, label in labels_of(out).items()]) > 0.9
