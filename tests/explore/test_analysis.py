"""The analysis of drawn vectors whose clusters, outliers, label errors and changes are known."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from outputs import SETTINGS, run_here, write_output
from PIL import Image

from jobs import analyze as job
from pipeline import Classifier, RunConfig, open_output, verify
from pipeline.errors import OutputRefused, SettingRefused
from pipeline.explore import changes, clusters, reference
from pipeline.explore.class_statistics import stability
from pipeline.explore.drift import drift
from pipeline.explore.outliers import Neighbourhoods
from pipeline.explore.reference import Reference
from pipeline.explore.table import Output
from pipeline.explore.vectors import scaled
from pipeline.output import ledger as ledgers

pytest.importorskip("faiss")

TRAINED = {**SETTINGS, "weights": "sha256:0123456789abcdef"}
DIM, KINDS, ROWS = 24, 6, 900
OUTLIERS, WRONG, NEW = (10, 20), (3, 50, 77), 25


def drawn(rows: int = ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [rows, DIM] around KINDS centres, and the kind of each."""
    centres = np.random.default_rng(7).normal(size=(KINDS, DIM))
    rng = np.random.default_rng(seed)
    kind = rng.integers(KINDS, size=rows)
    return (centres[kind] + 0.25 * rng.normal(size=(rows, DIM))).astype(np.float32), kind


def names(rows: int) -> list[str]:
    return [f"/photos/{number:05d}.jpg" for number in range(rows)]


def write(folder: Path, ids: list[str], vectors: np.ndarray, **more: object) -> Output:
    return open_output(str(write_output(folder, ids, vectors, **{"settings": TRAINED, "rows_per_part": 97, **more})))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Output:
    """Clusters with two outliers and three wrong labels."""
    vectors, kind = drawn()
    rng = np.random.default_rng(1)
    vectors[list(OUTLIERS)] = 2 * rng.normal(size=(2, DIM))
    labels = [f"kind {number}" for number in kind]
    for row in WRONG:
        labels[row] = f"kind {(kind[row] + 1) % KINDS}"
    return write(tmp_path_factory.mktemp("planted") / "out", names(ROWS), vectors, kept={"kind": labels})


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, planted: Output) -> Output:
    """The same without the first 50 images, with 30 replaced, 4 relabelled and NEW new ones, in reversed order."""
    rows = planted.take(np.arange(ROWS), ["image_id", "embedding", "kind"])
    ids, labels = rows["image_id"].to_pylist()[50:], rows["kind"].to_pylist()[50:]
    vectors = np.array(rows["embedding"].to_pylist(), np.float32)[50:]
    vectors[100:130] = drawn(30, seed=5)[0]
    labels[200:204] = ["kind 9"] * 4
    more, kind = drawn(NEW, seed=6)
    ids += [f"/photos/new/{number}.jpg" for number in range(NEW)]
    labels += [f"kind {number}" for number in kind]
    folder = tmp_path_factory.mktemp("changed") / "out"
    joined = np.concatenate([vectors, more])[::-1]
    return write(folder, ids[::-1], joined, kept={"kind": labels[::-1]}, rows_per_part=103)


@pytest.mark.parametrize("flags", [{"clusters": KINDS}, {"method": "hdbscan"}])
def test_planted_clusters_outliers_and_wrong_labels_are_found(planted: Output, tmp_path: Path, flags: dict) -> None:
    analysis = planted.analyze(label="kind", to=tmp_path / "to", **flags)
    table = analysis.clusters
    assert sorted(table["name"].to_pylist()) == [f"kind {number}" for number in range(KINDS)]
    assert min(table["label_share"].to_pylist()) > 0.97
    noise = len(OUTLIERS) if "method" in flags else 0
    assert analysis.figures["clusters"]["in_no_cluster"] == noise
    assert sum(table["images"].to_pylist()) == ROWS - noise
    images = pq.read_table(tmp_path / "to" / "images.parquet")
    assert images["image_id"].to_pylist() == names(ROWS)
    order = np.argsort(-images["outlier"].to_numpy())
    assert sorted(order[:2].tolist()) == list(OUTLIERS)
    assert images["is_outlier"].to_numpy()[order[:2]].all()
    assert images["is_outlier"].to_numpy().sum() <= 5
    wrong = set(np.flatnonzero(images["is_contradicted"].to_numpy()).tolist()) - set(OUTLIERS)
    assert wrong == set(WRONG)
    _, kind = drawn()
    assert [images["neighbour_label"][row].as_py() for row in WRONG] == [f"kind {kind[row]}" for row in WRONG]
    cluster = images["cluster"].to_numpy()
    for row in table.to_pylist():
        exemplars = [int(name[-9:-4]) for name in row["exemplars"]]
        nearest = np.flatnonzero(cluster == row["cluster"])
        nearest = nearest[np.argsort(images["distance"].to_numpy()[nearest], kind="stable")][:5]
        assert exemplars == nearest.tolist()


def test_a_sample_finds_what_all_images_find(planted: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = planted.analyze(label="kind", clusters=KINDS)
    monkeypatch.setattr(reference, "MAX_BYTES", 4 * DIM * 500)
    monkeypatch.setattr(reference, "MAX_FLAT", 100)
    some = planted.analyze(label="kind", clusters=KINDS)
    assert "500 images drawn at random of 900" in some.figures["outliers"]["how"]
    assert set(some.clusters["name"].to_pylist()) == set(everything.clusters["name"].to_pylist())
    for part, rows in (("outliers", OUTLIERS), ("contradictions", WRONG)):
        for each in (everything, some):
            found = [row["image_id"] for row in each.figures[part]["rows"]]
            assert {names(ROWS)[row] for row in rows} <= set(found)
            assert len(found) <= len(rows) + 5


def test_neighbours_leave_the_image_itself_out(planted: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_BYTES", 4 * DIM * 300)
    sample = Reference.of(planted, ["kind"])
    assert len(sample) == 300
    stored = scaled(np.array(planted.take(np.arange(ROWS), ["embedding"])["embedding"].to_pylist(), np.float32))
    assert np.array_equal(sample.vectors, stored[sample.positions])
    cosines, found = sample.neighbours(stored, np.arange(ROWS), 4)
    products = stored @ sample.vectors.T
    products[sample.positions, np.arange(300)] = -2
    assert np.array_equal(found, np.argsort(-products, axis=1, kind="stable")[:, :4])
    assert np.allclose(cosines, -np.sort(-products, axis=1)[:, :4], atol=1e-6)


def test_rare_classes_are_not_judged(tmp_path: Path) -> None:
    vectors, kind = drawn(200)
    labels: list[str | None] = [f"kind {number}" for number in kind]
    labels[5], labels[6], labels[7] = "rare", "rare", None
    output = write(tmp_path / "out", names(200), vectors, kept={"kind": labels})
    analysis = output.analyze(label="kind", to=tmp_path / "to")
    images = pq.read_table(tmp_path / "to" / "images.parquet")
    assert images["contradiction"].slice(5, 3).to_pylist() == [None] * 3
    assert images["contradiction"].null_count == 3
    assert any("labels of rare are not judged" in note for note in analysis.notes)
    assert "kind" not in {row["label"] for row in analysis.figures["classes"]}
    assert sum(row["images"] for row in analysis.figures["classes"]) == 199


def test_changes_since_an_earlier_output(planted: Output, changed: Output, tmp_path: Path) -> None:
    analysis = changed.analyze(against=planted, label="kind", clusters=KINDS, to=tmp_path / "to")
    against = analysis.figures["against"]
    assert against["images"] == {"new": NEW, "gone": 50, "replaced": 30, "relabelled": 4, "same": ROWS - 50 - 34}
    table = pq.read_table(tmp_path / "to" / "changes.parquet")
    assert len(table) == NEW + 50 + 34
    kinds = table.group_by("change").aggregate([([], "count_all")]).to_pylist()
    assert {row["change"]: row["count_all"] for row in kinds} == {
        "new": NEW, "gone": 50, "replaced": 30, "relabelled": 4,
    }  # fmt: skip
    gone = table.filter(pa.compute.equal(table["change"], "gone"))["image_id"].to_pylist()
    assert gone == names(ROWS)[:50]
    replaced = table.filter(pa.compute.equal(table["change"], "replaced"))
    assert sorted(replaced["image_id"].to_pylist()) == names(ROWS)[150:180]
    assert max(replaced["similarity"].to_pylist()) < 0.999
    relabelled = table.filter(pa.compute.equal(table["change"], "relabelled"))
    assert set(relabelled["label"].to_pylist()) == {"kind 9"}
    images = pq.read_table(tmp_path / "to" / "images.parquet")
    similarity = dict(zip(images["image_id"].to_pylist(), images["earlier_similarity"].to_pylist(), strict=True))
    assert similarity["/photos/00060.jpg"] == pytest.approx(1, abs=1e-6)
    assert similarity["/photos/new/3.jpg"] is None
    assert {row["image_id"] for row in against["moved"]} == set(names(ROWS)[150:180])
    assert against["classes"]["kind"]["verdict"] == "stable"
    assert not against["drift"]["is_significant"]
    shares = {row["label"]: row["earlier_share"] for row in analysis.figures["classes"]}
    assert shares["kind 9"] == 0
    assert sum(shares.values()) == pytest.approx(1)
    assert "earlier_share" in analysis.clusters.column_names


def test_a_class_that_is_gone_is_listed(planted: Output, tmp_path: Path) -> None:
    vectors, kind = drawn()
    rest = np.flatnonzero(kind != 2)
    labels = [f"kind {number}" for number in kind[rest]]
    later = write(tmp_path / "out", [names(ROWS)[row] for row in rest], vectors[rest], kept={"kind": labels})
    analysis = later.analyze(against=planted, label="kind", clusters=KINDS)
    gone = next(row for row in analysis.figures["classes"] if row["label"] == "kind 2")
    assert gone["images"] == 0
    assert gone["earlier_share"] == pytest.approx((kind == 2).mean(), abs=0.01)
    assert analysis.figures["against"]["classes"]["kind"]["verdict"] == "shifted"
    assert analysis.figures["against"]["drift"]["is_significant"]


def test_drift_has_the_p_values_of_a_test() -> None:
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(20):
        one, other = (scaled(rng.normal(size=(150, DIM)).astype(np.float32)) for _ in range(2))
        p_values.append(drift(one, other).p_value)
    assert 0.2 < np.mean(p_values) < 0.8
    assert min(p_values) > 0.002
    shifted = rng.normal(size=(150, DIM))
    shifted[:40] += 2
    result = drift(one, scaled(shifted.astype(np.float32)))
    assert result.p_value == 0.001
    assert set(result.typical[:12].tolist()) <= set(range(40))


def test_stability_of_shares() -> None:
    same = stability([100, 200, 300], [50, 100, 150])
    assert same
    assert same.psi == pytest.approx(0, abs=1e-4)
    p, q = np.array([100.5, 300.5]) / 401, np.array([300.5, 100.5]) / 401
    moved = stability([100, 300], [300, 100])
    assert moved
    assert moved.psi == pytest.approx(((q - p) * np.log(q / p)).sum())
    assert moved.verdict == "shifted"
    assert moved.by_chance == pytest.approx(2 / 400)
    rng = np.random.default_rng(0)
    share = np.full(200, 1 / 200)
    draws = [stability(rng.multinomial(5000, share), rng.multinomial(5000, share)) for _ in range(20)]
    assert all(each and each.verdict == "stable" for each in draws)
    assert np.mean([each.psi for each in draws if each]) == pytest.approx(draws[0].by_chance, rel=0.15)  # type: ignore[union-attr]
    assert stability([], []) is None


def test_other_spaces_are_refused_and_named(planted: Output, tmp_path: Path) -> None:
    vectors, _ = drawn()
    other = write(tmp_path / "out", names(ROWS), vectors, settings={**TRAINED, "precision": "bfloat16"})
    with pytest.raises(OutputRefused, match="embedding spaces differ: precision is float32, not bfloat16"):
        planted.analyze(against=other)
    with pytest.raises(OutputRefused, match="is the output itself"):
        planted.analyze(against=open_output(planted.uri))
    assert not changes.refuse_other_space(planted, planted)


def test_outputs_in_other_orders_of_many_rows_are_not_looked_up(
    planted: Output, changed: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "MAX_SHUFFLED_ROWS", 100)
    analysis = changed.analyze(against=planted, label="kind")
    assert any("in other orders" in note for note in analysis.notes)
    assert "moved" not in analysis.figures["against"]
    assert analysis.figures["against"]["images"]["new"] == NEW


def test_other_folders_are_named(planted: Output, tmp_path: Path) -> None:
    vectors, _ = drawn()
    other = write(tmp_path / "out", [f"/elsewhere/{number}.jpg" for number in range(ROWS)], vectors)
    analysis = other.analyze(against=planted)
    assert any("no image_id is in both outputs" in note for note in analysis.notes)
    assert analysis.figures["against"]["images"]["gone"] == ROWS
    assert not analysis.figures["against"]["drift"]["is_significant"]


@pytest.mark.parametrize("rows", [1, 2, 12])
def test_small_outputs(tmp_path: Path, rows: int) -> None:
    vectors, _ = drawn(rows)
    for method in clusters.METHODS:
        analysis = write(tmp_path / method, names(rows), vectors).analyze(method=method)
        in_none = analysis.figures["clusters"]["in_no_cluster"]
        assert sum(row["images"] for row in analysis.figures["clusters"]["rows"]) + in_none == rows
        assert ("outliers" in analysis.figures) == (rows > 1)


def test_copies_are_no_outliers(tmp_path: Path) -> None:
    vectors = np.repeat(drawn(1)[0], 100, axis=0)
    analysis = write(tmp_path / "out", names(100), vectors).analyze(clusters=5)
    assert analysis.figures["outliers"]["images"] == 0
    assert sum(analysis.clusters["images"].to_pylist()) == 100


def test_an_output_without_rows_or_in_mid_run(tmp_path: Path) -> None:
    vectors, _ = drawn(50)
    empty = write(tmp_path / "empty", [], vectors[:0], errors=["/photos/bad.jpg"])
    with pytest.raises(OutputRefused, match="no rows of results, only 1 errors"):
        empty.analyze()
    folder = write_output(tmp_path / "half", names(50), vectors, settings=TRAINED)
    (folder / "_SUCCESS").unlink()
    for commit in sorted((folder / "_commits").iterdir())[3:]:
        commit.unlink()
    assert ledgers.last_attempt(str(folder)) == 1
    analysis = open_output(str(folder)).analyze()
    assert analysis.figures["rows"] == 21
    assert any("has not finished" in note for note in analysis.notes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"method": "dbscan"}, "--method is 'dbscan': it must be one of kmeans, hdbscan"),
        ({"clusters": 0}, "--clusters is 0"),
        ({"method": "hdbscan", "clusters": 3}, "--clusters is of k-means"),
        ({"sample": 100}, "--sample is of HDBSCAN"),
        ({"method": "hdbscan", "sample": 100_000}, "it must be from 5 to 20,000"),
        ({"neighbours": 0}, "--neighbours is 0"),
        ({"label": "embedding"}, "it must be a column of texts"),
    ],
)
def test_settings_that_cannot_work_are_refused(planted: Output, flags: dict, message: str) -> None:
    with pytest.raises(SettingRefused, match=message):
        planted.analyze(**flags)


def test_the_folder_is_replaced_only_when_told(planted: Output, tmp_path: Path) -> None:
    folder = tmp_path / "to"
    planted.analyze(to=folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "analysis.json", "classes.parquet", "clusters.parquet", "images.parquet",
    ]  # fmt: skip
    with pytest.raises(SettingRefused, match="has an analysis; choose another folder or add --overwrite"):
        planted.analyze(to=folder)
    planted.analyze(to=folder, label="kind", overwrite=True)
    assert json.loads((folder / "analysis.json").read_text())["contradictions"]["column"] == "kind"
    (folder / "mine.txt").touch()
    with pytest.raises(SettingRefused, match=r"has other files \(mine.txt\)"):
        planted.analyze(to=folder, overwrite=True)


def test_the_command_prints_tables_or_json(planted: Output, changed: Output, capsys: pytest.CaptureFixture) -> None:
    flags = [changed.uri, "--against", planted.uri, "--label", "kind", "--clusters", "6"]
    assert job.main(flags) == 0
    text = capsys.readouterr().out
    assert "6 clusters by k-means of 875 images" in text
    assert "25 new, 50 gone, 30 replaced, 4 relabelled, 816 same" in text
    assert "no significant drift" in text
    assert job.main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 875
    assert job.main([planted.uri, "--label", "colour"]) == 2
    assert "has no such column" in capsys.readouterr().err


def test_votes_of_neighbours() -> None:
    """Two of three neighbours say b: of an image labelled a, and of one labelled b."""
    labels = pa.array(["a", "a", "b", "b", "b", "b", "b", "b", "a", "a"])
    sample = Reference(np.arange(10), scaled(np.eye(10, dtype=np.float32)), pa.table({}), 10)
    judged = Neighbourhoods(sample, 3, labels)
    share, winners, is_contradicted = judged.contradictions(
        np.array([[0, 2, 3], [2, 3, 0], [2, 3, 4]]), pa.array(["a", "b", "a"])
    )
    assert np.allclose(share, [2 / 3, 1 / 3, 1])
    assert winners.to_pylist() == ["b", "b", "b"]
    assert is_contradicted.tolist() == [False, False, True]


def classified(folder: Path, output: Path, **flags: object) -> Output:
    """A whole run of `classify --quality` over a folder, without Ray."""
    config = RunConfig(str(folder), str(output), quality=True)
    return open_output(run_here(config, Classifier(model="tiny:network", weights="random", **flags)))  # type: ignore[arg-type]


def test_two_nights_of_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(24):
        level = 10 if number < 4 else 128
        pixels = np.clip(rng.normal(level, level / 4, (80, 100, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number:02d}.png")
    first = classified(tmp_path / "in", tmp_path / "first", embeddings=True)
    (tmp_path / "in" / "05.png").unlink()
    Image.fromarray(np.full((90, 100, 3), 250, np.uint8)).save(tmp_path / "in" / "06.png")
    Image.fromarray(np.full((80, 100, 3), 5, np.uint8)).save(tmp_path / "in" / "new.png")
    second = classified(tmp_path / "in", tmp_path / "second", embeddings=True)
    assert verify(second.uri).is_whole
    assert job.main([second.uri, "--against", first.uri, "--to", str(tmp_path / "to")]) == 0
    text = capsys.readouterr().out
    assert "1 new, 1 gone, 1 replaced, 0 relabelled, 22 same" in text
    assert "0 tiny, 5 dark, 1 bright" in text
    assert "the vectors are of random weights" in text
    figures = json.loads((tmp_path / "to" / "analysis.json").read_text())
    assert sum(row["images"] for row in figures["classes"]) == 24
    assert sum(sum(row["scores"]) for row in figures["classes"] if row["scores"]) == 24
    images = pq.read_table(tmp_path / "to" / "images.parquet")
    assert "dark" in images["flags"][0].as_py()


def test_an_output_without_vectors_gives_its_classes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        Image.fromarray(np.full((20, 20, 3), 40 * number, np.uint8)).save(tmp_path / "in" / f"{number}.png")
    output = classified(tmp_path / "in", tmp_path / "out")
    assert job.main([output.uri, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert "clusters" not in figures
    assert figures["quality"]["tiny"] == 5
    assert sum(row["images"] for row in figures["classes"]) == 5
    assert any("there are no vectors" in note for note in figures["notes"])
    later = classified(tmp_path / "in", tmp_path / "later")
    against = later.analyze(against=output).figures["against"]
    assert against["images"]["same"] == 5
    assert against["classes"]["label"]["verdict"] == "stable"
