"""From an archive to labels of one's own: embed, fit, and classify from pixels and from vectors."""

import json
from pathlib import Path

import images
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import rasterio.warp
from satellite import OLD_PRODUCT, SENTINEL2, draw_dn, geotiff
from servers import S3Server
from whole import TINY, Jobs, count_commits, wait_for

from pipeline.explore.pictures import pictures
from pipeline.explore.table import open_output
from pipeline.output.verify import verify
from pipeline.storage import access

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
    assert set(pictures(open_output(str(from_vectors)), list(labels)[::9])) == set(list(labels)[::9])
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
        (
            ("--from", other, "--head", head, "--resize", 64),
            "--resize is for images and networks, but --from reads vectors",
        ),
        (("--from", archive, "--head", head), "is not an output of Nightshift"),
    ]:
        assert message in jobs.run("classify", *flags, *out, code=2).stderr


@pytest.mark.long
def test_a_killed_run_on_vectors_continues(jobs: Jobs, tmp_path: Path) -> None:
    from outputs import SETTINGS, write_output

    from pipeline.training.job import FitConfig, fit

    rng = np.random.default_rng(0)
    ids = [f"/photos/{'ab'[number % 2]}/{number:05d}.jpg" for number in range(3000)]
    vectors = rng.normal(size=(3000, 16)).astype(np.float32) + np.where(np.arange(3000) % 2, 0.5, -0.5)[:, None]
    embeddings = write_output(
        tmp_path / "embeddings", ids, vectors.astype(np.float32), rows_per_part=20, settings=SETTINGS
    )
    head = tmp_path / "ab.safetensors"
    chosen = "\n".join(f"{image_id},{image_id.split('/')[2]}" for image_id in ids[:100])
    (tmp_path / "labels.csv").write_text(f"image,label\n{chosen}\n")
    fit(str(embeddings), FitConfig(labels=str(tmp_path / "labels.csv"), to=str(head), pictures=False))
    out = tmp_path / "labels"
    command = ("--from", embeddings, "--head", head, "--output", out, "--rows-per-part", 20)
    process = jobs.start("classify", *command)
    wait_for(lambda: count_commits(out) >= 3)
    process.kill()
    process.wait()
    before = count_commits(out)
    assert before < 150
    jobs.run("classify", *command)
    assert verify(str(out)).is_whole
    table = pd.read_parquet(out)
    assert sorted(table["image_id"]) == sorted(ids)
    assert np.mean([label == image_id.split("/")[2] for image_id, label in labels_of(out).items()]) > 0.9


def two_classes(count: int, seed: int, name: str) -> tuple[list[str], np.ndarray]:
    """Names in folders a and b, and vectors of which the first half is above and below zero."""
    is_b = np.arange(count) % 2
    vectors = np.random.default_rng(seed).normal(size=(count, 8)) / 3 + np.where(is_b, 0.5, -0.5)[:, None]
    return [f"/photos/{'ab'[kind]}/{name}-{i:03d}.jpg" for i, kind in enumerate(is_b)], vectors.astype(np.float32)


def test_several_heads_on_vectors_in_a_bucket_that_grow(jobs: Jobs, s3: S3Server, tmp_path: Path) -> None:
    """The embeddings, the labels, both heads and the result are in S3. Afterwards the embeddings are updated."""
    from outputs import write_output

    from pipeline.training.job import FitConfig, fit

    embeddings, out = s3.uri("embeddings"), s3.uri("labels")
    ids, vectors = two_classes(40, 0, "old")
    write_output(embeddings, ids, vectors, errors=["/photos/bad.jpg"], rows_per_part=20)  # type: ignore[arg-type]
    for name, classes in (("sides", ("left", "right")), ("Top", ("low", "high"))):
        lines = "".join(f"{image_id},{classes[number % 2]}\n" for number, image_id in enumerate(ids))
        access.write(s3.uri(f"{name}.csv"), f"image,label\n{lines}".encode())
        to = s3.uri(f"{name}.safetensors")
        fit(embeddings, FitConfig(labels=s3.uri(f"{name}.csv"), to=to, pictures=False))
    heads = [word for name in ("sides", "Top") for word in ("--head", s3.uri(f"{name}.safetensors"))]
    command = ("--from", embeddings, *heads, "--output", out, "--top-k", 1, "--max-error-rate", 0.5)
    jobs.run("classify", *command)
    assert verify(out).is_whole
    table = read_all(out)
    own = ["label", "label_id", "score", "top_labels", "top_label_ids", "top_scores"]
    assert table.schema.names[7:] == [f"{head}_{name}" for head in ("sides", "Top") for name in own]
    rows = {row["image_id"]: (row["sides_label"], row["Top_label"]) for row in table.to_pylist()}
    expected = {image_id: ("right", "high") if "/b/" in image_id else ("left", "low") for image_id in ids}
    assert sum(rows[image_id] == each for image_id, each in expected.items()) >= 38
    assert rows.keys() == expected.keys()

    new_ids, new_vectors = two_classes(30, 1, "new")
    write_output(embeddings, new_ids, new_vectors, rows_per_part=20, shard=1)  # type: ignore[arg-type]
    assert "already done" in jobs.run("classify", *command).stderr
    jobs.run("classify", *command, "--update")
    assert verify(out).is_whole
    after = {row["image_id"]: row["sides_label"] for row in read_all(out).to_pylist()}
    assert after.keys() == {*ids, *new_ids}
    assert {image_id: after[image_id] for image_id in ids} == {image_id: each[0] for image_id, each in rows.items()}
    assert sum((after[image_id] == "right") == ("/b/" in image_id) for image_id in new_ids) >= 28


def read_all(output: str) -> pa.Table:
    opened = open_output(output)
    return pa.Table.from_batches(list(opened.batches()))


def test_a_head_gives_the_flags_of_satellite_scenes(jobs: Jobs, tmp_path: Path) -> None:
    """Labels on a map, an input specification, and windows that overlap: the head alone gives them all again."""
    numbers = draw_dn(13, 192)
    numbers[:, :, 96:] = numbers[:, :, 96:] // 3
    scene = tmp_path / f"{OLD_PRODUCT}.tif"
    scene.write_bytes(geotiff(numbers, SENTINEL2))
    network = ("--model", "timm:resnet18", "--weights", "random", "--precision", "float32", "--crop", 64)
    windows = ("--input-spec", "sentinel2-all", "--tile-size", 32, "--tile-stride", 16)
    embeddings, head = tmp_path / "embeddings", tmp_path / "halves.safetensors"
    jobs.run("embed", "--input", scene, "--output", embeddings, *network, *windows)
    halves = {"bright": (5e5, 5e5 + 960), "dark": (5e5 + 960, 5e5 + 1920)}
    features = []
    for name, (left, right) in halves.items():
        corners = [(left, 5e6), (left, 5e6 - 1920), (right, 5e6 - 1920), (right, 5e6), (left, 5e6)]
        ring = list(zip(*rasterio.warp.transform("EPSG:32633", "OGC:CRS84", *zip(*corners, strict=True)), strict=True))
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": geometry, "properties": {"label": name}})
    labels = tmp_path / "halves.geojson"
    labels.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    jobs.run("fit", embeddings, "--labels", labels, "--to", head, "--no-pictures")
    command = ("classify", "--input", scene, "--head", head, "--output")
    done = jobs.run(*command, tmp_path / "pixels")
    assert "taken from --head halves: --tile-size 32 --tile-stride 16 --model timm:resnet18 --input-spec" in done.stderr
    jobs.run("classify", "--from", embeddings, "--head", head, "--output", tmp_path / "vectors")
    of_pixels, of_vectors = labels_of(tmp_path / "pixels"), labels_of(tmp_path / "vectors")
    assert of_pixels == of_vectors
    assert len(of_pixels) == 121
    runs = [json.loads((tmp_path / name / "_run.json").read_text()) for name in ("embeddings", "pixels")]
    assert runs[0]["embedding_space"] == runs[1]["embedding_space"]
    refused = jobs.run(*command, tmp_path / "other", "--tile-size", 64, code=2)
    assert "halves was fitted on other vectors than those of this command: tiling.size is 64, not 32" in refused.stderr
