"""Search: exact neighbours, filters, ties, and queries that are embedded as the output was."""

import json
from dataclasses import asdict
from pathlib import Path

import images
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from outputs import run_here, write_output

from jobs import search as job
from pipeline import Embedder, RunConfig, open_output
from pipeline.errors import InputRefused, OutputRefused, SettingRefused, WeightsRefused
from pipeline.explore.search import nearest, read_vectors
from pipeline.explore.table import Output
from pipeline.images.transform import Transform

ROWS, DIM = 60, 12
KINDS = ("forest", "water", "urban", "field")


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(ROWS, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, vectors: np.ndarray) -> Output:
    """60 rows of random vectors in nine parts, with a kept column of kinds."""
    ids = [f"/photos/{number % 2}/{number:03d}.jpg" for number in range(ROWS)]
    kept = {"kind": [KINDS[number % 4] if number != 5 else None for number in range(ROWS)]}
    folder = tmp_path_factory.mktemp("search") / "out"
    return open_output(str(write_output(folder, ids, vectors, errors=["/photos/bad.jpg"], kept=kept)))


def brute(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    wide, q = vectors.astype(float), query.astype(float)
    return wide @ q / np.linalg.norm(wide, axis=1) / np.linalg.norm(q)


def test_the_hits_are_those_of_all_pairs(output: Output, vectors: np.ndarray) -> None:
    queries = np.random.default_rng(4).normal(size=(3, DIM)).astype(np.float32)
    hits = output.search(vectors=queries, count=7).table.to_pylist()
    for number, query in enumerate(queries):
        cosines = brute(vectors, query)
        found = [row for row in hits if row["query"] == f"vector {number}"]
        assert [row["row"] for row in found] == np.argsort(-cosines)[:7].tolist()
        assert [row["rank"] for row in found] == [1, 2, 3, 4, 5, 6, 7]
        np.testing.assert_allclose([row["similarity"] for row in found], np.sort(cosines)[::-1][:7], atol=1e-6)


def test_more_hits_than_rows_are_all_rows(output: Output) -> None:
    table = output.search(ids=["000.jpg"], count=500).table
    assert len(table) == ROWS
    assert (table["image_id"][0].as_py(), table["similarity"][0].as_py()) == ("/photos/0/000.jpg", 1.0)
    assert "embedding" not in table.column_names


def test_an_id_is_the_end_of_one_image_id(output: Output) -> None:
    whole = output.search(ids=["/photos/1/007.jpg"], count=3).table
    end = output.search(ids=["1/007.jpg"], count=3).table
    assert whole["image_id"] == end["image_id"]
    with pytest.raises(InputRefused, match=r"--id 07.jpg is no image_id of"):
        output.search(ids=["07.jpg"])
    with pytest.raises(InputRefused, match=r"nothing to search for|no image_id"):
        output.search(ids=["bad.jpg"])


def test_an_ambiguous_id_is_refused(tmp_path: Path) -> None:
    folder = write_output(tmp_path / "out", ["/a/x.jpg", "/b/x.jpg", "/t.tar#x.jpg"], np.eye(3, dtype=np.float32))
    with pytest.raises(InputRefused, match=r"--id x.jpg is the end of several image_ids: /a/x.jpg, /b/x.jpg"):
        open_output(str(folder)).search(ids=["x.jpg"])


def test_equal_vectors_are_equally_similar_and_sorted_by_name(tmp_path: Path) -> None:
    """Copies of one vector, far apart, whose products as a matrix differ in the last bits."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(1000, 37)).astype(np.float32)
    copies = [3, 250, 251, 640, 999]
    data[copies] = data[3]
    ids = [f"/p/{number:04d}.jpg" for number in reversed(range(1000))]
    folder = write_output(tmp_path / "out", ids, data, rows_per_part=173)
    table = open_output(str(folder)).search(vectors=data[3] + np.float32(0.1), count=5).table
    assert len(set(table["similarity"].to_pylist())) == 1
    assert table["image_id"].to_pylist() == sorted(ids[row] for row in copies)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("kind = 'water'", lambda n: n % 4 == 1 and n != 5),
        ("kind IS NULL", lambda n: n == 5),
        ("KIND in ('water', 'field') and row >= 30", lambda n: n % 4 in (1, 3) and n >= 30),
        ("not kind = 'forest'", lambda n: n % 4 != 0 and n != 5),
        ("image_id like '/photos/1/%'", lambda n: n % 2 == 1),
        ("row > 1000", lambda n: False),
    ],
)
def test_where(output: Output, where: str, expected) -> None:
    rows = output.search(ids=["000.jpg"], count=ROWS, where=where).table["row"].to_pylist()
    assert sorted(rows) == [number for number in range(ROWS) if expected(number)]


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ("label = 'x'", OutputRefused, "has no column label that can be compared; there are image_id, source"),
        ("embedding is null", OutputRefused, "has no column embedding"),
        ('kind = "water"', OutputRefused, "has no column water.* texts are in single quotes"),
        ("kind = 'a' AND", SettingRefused, "is no SQL expression"),
        ("kind = 'a'; select 1", SettingRefused, "is no SQL expression"),
        ("row = 1) union select (2", SettingRefused, "must be one expression"),
        ("row in (select 1)", SettingRefused, "--where has a subquery"),
        ("row_number() over () > 1", SettingRefused, "--where has a window function"),
        ("sum(row) > 1", SettingRefused, "cannot be evaluated|sums up rows"),
        ("row", SettingRefused, "is a BIGINT: it must be true or false"),
        ("row > 'many'", SettingRefused, "cannot be evaluated"),
        ("nosuch(row)", SettingRefused, "cannot be evaluated"),
    ],
)
def test_a_bad_expression_is_refused(output: Output, where: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        output.search(ids=["000.jpg"], where=where)


def test_an_expression_reads_no_files(output: Output, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    with pytest.raises(SettingRefused):
        output.search(ids=["000.jpg"], where=f"length(getenv('HOME')) > 0 or read_text('{tmp_path}/secret.csv') = '1'")


def test_bad_queries_are_refused(output: Output, tmp_path: Path) -> None:
    with pytest.raises(SettingRefused, match="nothing to search for"):
        output.search()
    with pytest.raises(SettingRefused, match="-k is 0: it must be a number from 1"):
        output.search(ids=["000.jpg"], count=0)
    with pytest.raises(InputRefused, match=f"--vector has width 5, but the vectors of .* have {DIM}"):
        output.search(vectors=np.ones(5, np.float32))
    with pytest.raises(InputRefused, match="the vector of vector 0 is zero"):
        output.search(vectors=np.zeros(DIM, np.float32))
    with pytest.raises(InputRefused, match="NaN"):
        output.search(vectors=np.full(DIM, np.nan, np.float32))
    with pytest.raises(OutputRefused, match="has no footprints"):
        output.search(ids=["000.jpg"], bbox="1,2,3,4")
    np.save(tmp_path / "texts.npy", np.array(["a"]))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    for name in ("texts", "objects", "text"):
        with pytest.raises(InputRefused, match=f"--vector .*{name}.npy"):
            read_vectors([str(tmp_path / f"{name}.npy")])
    with pytest.raises(InputRefused, match="does not exist"):
        read_vectors([str(tmp_path / "none.npy")])


def test_row_groups_without_a_chosen_row_are_not_read(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.explore import table

    read: list[list[str]] = []
    original = table._read
    monkeypatch.setattr(
        table, "_read", lambda out, wanted, *rest: read.append(wanted.names) or original(out, wanted, *rest)
    )
    from pipeline.explore.choices import Where

    nearest(output, np.eye(1, DIM, dtype=np.float32), 3, [Where.of(output, "row = 8")])
    assert read.count(["embedding"]) == 1
    assert read.count(["row"]) == len(output.parts)


def test_take_returns_rows_in_the_asked_order(output: Output, vectors: np.ndarray) -> None:
    positions = np.array([59, 0, 8, 8, 30])
    table = output.take(positions, ["row", "embedding"])
    assert table["row"].to_pylist() == positions.tolist()
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), vectors[positions])
    assert len(output.take(positions[:0], ["row"])) == 0


# Queries that are embedded


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        size = (64 + number, 48)
        (folder / f"{number:02d}.jpg").write_bytes(images.encode(images.tile(KINDS[number % 4], number, size)))
    return folder


def embedded(photos: Path, folder: Path, **settings: object) -> Output:
    embedder = Embedder(**{"model": "tiny:network", "weights": "random", **settings})
    return open_output(run_here(RunConfig(input=str(photos), output=str(folder)), embedder))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bfloat16", "resize": 60, "crop": 48, "interpolation": "bicubic"},
        {"embedding_dtype": "float16", "mean": "0.4", "std": "0.2"},
        {"embedding_dtype": "int8"},
    ],
)
def test_an_image_finds_itself(photos: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    output = embedded(photos, tmp_path / "out", **settings)
    queries = [str(photos / f"{number:02d}.jpg") for number in (0, 7)]
    hits = output.search(images=queries, count=2).to_list()
    best = [row for row in hits if row["rank"] == 1]
    assert [row["image_id"] for row in best] == queries
    assert all(row["similarity"] >= 0.9999 for row in best)


@pytest.mark.parametrize(("place", "squash"), [("file", True), ("checkpoint", True), ("checkpoint", False)])
def test_an_image_finds_itself_with_a_stated_transform(photos: Path, tmp_path: Path, squash: bool, place: str) -> None:
    """--transform FILE, and the transform in a checkpoint of `finetune`; both also without the aspect ratio."""
    from torchvision.models import shufflenet_v2_x0_5

    from pipeline.models.record import CheckpointRecord, write_checkpoint

    transform = Transform(40, 36, "bicubic", (0.3, 0.4, 0.5), (0.2, 0.3, 0.25), squash)
    network, weights = shufflenet_v2_x0_5(num_classes=2), str(tmp_path / "w.safetensors")
    record = CheckpointRecord("shufflenet_v2_x0_5", transform, ("a", "b"))
    write_checkpoint(weights, network.state_dict(), record)
    stated = {}
    if place == "file":
        torch.save(network.state_dict(), weights := str(tmp_path / "w.pt"))
        (tmp_path / "t.json").write_text(json.dumps(asdict(transform)))
        stated = {"transform_": str(tmp_path / "t.json")}
    output = embedded(photos, tmp_path / "out", model="shufflenet_v2_x0_5", weights=weights, **stated)
    assert output.settings["transform"]["squash"] is squash
    assert output.settings["transform"]["resize"] == 40
    queries = [str(photos / f"{number:02d}.jpg") for number in (0, 7)]
    best = output.search(images=queries, count=1).table
    assert best["image_id"].to_pylist() == queries
    assert min(best["similarity"].to_pylist()) >= 0.9999


def test_another_network_of_the_same_name_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    weights = tmp_path / "weights.pt"
    network = torchvision.models.shufflenet_v2_x0_5()
    torch.save(network.state_dict(), weights)
    output = embedded(photos, tmp_path / "out", model="shufflenet_v2_x0_5", weights=str(weights), crop=64, resize=64)
    query = str(photos / "03.jpg")
    assert output.search(images=[query], count=1).to_list()[0]["image_id"] == query
    with torch.no_grad():
        network.conv1[0].weight.mul_(1.5)
    torch.save(network.state_dict(), weights)
    with pytest.raises(WeightsRefused, match=r"weights is sha256:.*, not sha256:"):
        output.search(images=[query])
    weights.unlink()
    with pytest.raises(WeightsRefused):
        output.search(images=[query])


def test_a_part_of_another_space_is_refused(photos: Path, tmp_path: Path) -> None:
    ours, theirs = embedded(photos, tmp_path / "ours"), embedded(photos, tmp_path / "theirs", crop=24)
    Path(ours.uri, ours.parts[0].path).write_bytes(Path(theirs.uri, theirs.parts[0].path).read_bytes())
    other = theirs.record["embedding_space"]["id"]
    with pytest.raises(OutputRefused, match=f"has vectors of embedding space {other}, but _run.json says"):
        open_output(ours.uri).search(ids=["00.jpg"])


def test_an_unreadable_image_is_refused_by_name(photos: Path, tmp_path: Path) -> None:
    output = embedded(photos, tmp_path / "out")
    (tmp_path / "bad.jpg").write_bytes(images.truncated())
    with pytest.raises(InputRefused, match=r"--image .*bad.jpg cannot be read \(truncated\)"):
        output.search(images=[str(photos / "00.jpg"), str(tmp_path / "bad.jpg")])
    with pytest.raises(InputRefused, match=r"--image .*none.jpg cannot be read \(not_found\)"):
        output.search(images=[str(tmp_path / "none.jpg")])


@pytest.mark.parametrize("more", [{}, {"edge": "shift", "tile_stride": 24}, {"resolution": 20.0}])
def test_windows_of_scenes_find_themselves(tmp_path: Path, more: dict) -> None:
    """By their names in the output, as a raster of their own, and in the order of the queries."""
    scenes = pytest.importorskip("scenes")
    array = scenes.numbers(3, 100, 130, "uint16")
    scenes.write(tmp_path / "scenes/a.tif", array)
    config = RunConfig(
        input=str(tmp_path / "scenes"), output=str(tmp_path / "out"), tile_size=32, scale="0:10000", **more
    )
    output = open_output(run_here(config, Embedder(model="tiny:network", weights="random", precision="float32")))
    names = [name for batch in output.batches(["image_id"]) for name in batch["image_id"].to_pylist()]
    queries = [names[-1], names[3], names[0]]
    hits = output.search(images=queries, count=1).table
    assert hits["image_id"].to_pylist() == queries
    assert min(hits["similarity"].to_pylist()) >= 0.9999
    if not more:
        column, line = map(int, names[3].rpartition("#")[2].split(","))
        chip = scenes.write(tmp_path / "chip.tif", array[:, line : line + 32, column : column + 32])
        assert output.search(images=[str(chip)], count=1).table["image_id"].to_pylist() == [names[3]]
    scene = str(tmp_path / "scenes/a.tif")
    with pytest.raises(InputRefused, match=rf"--image {scene} is cut into {len(names)} windows: name one, as in"):
        output.search(images=[scene])
    with pytest.raises(InputRefused, match=rf"#7,7 is none of the {len(names)} windows"):
        output.search(images=[f"{scene}#7,7"])
    with pytest.raises(InputRefused, match="the output has vectors of windows of rasters; give a raster of one window"):
        output.search(images=["x.jpg"])
    with pytest.raises(InputRefused, match=r"--image: .*none\.tif"):
        output.search(images=[str(tmp_path / "none.tif")])


# The command


def test_the_command(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = embedded(photos, tmp_path / "out")
    query = str(photos / "04.jpg")
    assert job.main([output.uri, "--image", query, "-k", "3", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert hits[0]["image_id"] == query
    assert hits[0]["width"] == 68
    assert job.main([output.uri, "--id", "04.jpg", "-k", "3"]) == 0
    assert "04.jpg" in capsys.readouterr().out
    for name in ("hits.parquet", "hits.html"):
        assert job.main([output.uri, "--id", "04.jpg", "--id", "05.jpg", "-k", "3", "--to", str(tmp_path / name)]) == 0
    assert pq.read_table(tmp_path / "hits.parquet").num_rows == 6
    page = (tmp_path / "hits.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 6
    assert job.main([output.uri, "--id", "04.jpg", "--to", str(tmp_path / "hits.html")]) == 2
    assert "exists; choose another name or add --overwrite" in capsys.readouterr().err
    assert job.main([output.uri, "--id", "none.jpg"]) == 2
    assert job.main([str(tmp_path), "--id", "x"]) == 2
    np.save(tmp_path / "v.npy", np.ones((2, 8)))
    assert job.main([output.uri, "--vector", str(tmp_path / "v.npy"), "--json", "-k", "1"]) == 0
