"""Heads fitted to vectors: each method, the choice of its parameter, and the fit that streams."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pipeline.errors import InputRefused, SettingRefused
from pipeline.training import fit, page
from pipeline.training.evaluate import calibration_error, evaluate, predictions, probabilities
from pipeline.training.fit import FitSettings, choose, class_weights, fit_all, fit_rows, folds_of
from pipeline.training.job import METHODS
from pipeline.training.samples import Samples, VectorFile

DIM = 24


def samples(count: int = 240, classes: int = 4, spread: float = 0.45, seed: int = 0, **more: object) -> Samples:
    """Vectors around one centre per class."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, DIM)) / np.sqrt(DIM)
    y = np.arange(count) % classes
    vectors = (centres[y] + spread * rng.normal(size=(count, DIM)) / np.sqrt(DIM) * 2).astype(np.float32)
    names = tuple(f"class {number}" for number in range(classes))
    ids = tuple(f"/photos/{number:04d}.jpg" for number in range(count))
    return Samples(vectors, np.eye(classes, dtype=np.float32)[y], names, ids, **more)  # type: ignore[arg-type]


def several(count: int = 300) -> Samples:
    """Two of three classes depend on the vector, each on its own; an image may have none."""
    one = samples(count, classes=2)
    assert isinstance(one.vectors, np.ndarray)
    targets = np.stack([one.vectors[:, 0] > 0, one.vectors[:, 1] > 0.1, one.vectors[:, 2] > 0.3], axis=1)
    return replace(one, targets=targets.astype(np.float32), names=("a", "b", "c"), multi_label=True)


def in_file(data: Samples, path: object) -> Samples:
    file = open(str(path), "w+b")  # noqa: SIM115
    file.write(np.asarray(data.vectors).tobytes())
    return replace(data, vectors=VectorFile(file, len(data), DIM))


def accuracy(data: Samples, head: object, rows: np.ndarray) -> float:
    scores = head.scores(torch.from_numpy(data.vectors[rows])).numpy()  # type: ignore[attr-defined, index]
    return float((predictions(scores, data.multi_label) == data.targets[rows]).all(axis=1).mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("classes", [2, 4])
def test_each_method_finds_the_classes_of_images_left_out(method: str, classes: int) -> None:
    data, settings = samples(180, classes=classes), FitSettings(method)
    fitted, left_out = np.arange(0, 100), np.arange(100, 180)
    choice = choose(data, fitted, settings)
    head = fit_rows(data, fitted, settings, choice.parameter)
    assert accuracy(data, head, left_out) > 0.8
    scores = head.scores(torch.from_numpy(data.vectors))
    assert torch.allclose(scores.sum(1), torch.ones(len(data)), atol=1e-5)
    assert head.dim == DIM


@pytest.mark.parametrize("method", METHODS)
def test_each_method_takes_several_labels_per_image(method: str) -> None:
    data, settings = several(), FitSettings(method)
    fitted, left_out = np.arange(0, 200), np.arange(200, 300)
    head = fit_rows(data, fitted, settings, choose(data, fitted, settings).parameter)
    scores = head.scores(torch.from_numpy(data.vectors[left_out])).numpy()
    right = (scores >= 0.5) == (data.targets[left_out] > 0)
    assert right.mean() > (0.6 if method == "centroid" else 0.8)


def test_the_linear_probe_is_that_of_scikit_learn() -> None:
    data = samples()
    head = fit_rows(data, np.arange(160), FitSettings(class_weights="none"), parameter=10.0)
    x = data.take(np.arange(240))
    reference = LogisticRegression(C=10.0, max_iter=1000).fit(x[:160], data.classes()[:160])
    np.testing.assert_allclose(head.scores(torch.from_numpy(x)).numpy(), reference.predict_proba(x), atol=2e-3)


def test_the_same_seed_gives_the_same_head() -> None:
    data, settings = samples(60), FitSettings("mlp", seed=3)
    heads = [fit_all(data, settings, choose(data, np.arange(60), settings)) for _ in range(2)]
    assert all(torch.equal(each, heads[1].tensors[name]) for name, each in heads[0].tensors.items())
    assert heads[0].temperature == heads[1].temperature


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("weights", ["none", "balanced"])
def test_a_streamed_linear_probe_is_that_in_memory(
    classes: int, weights: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = samples(classes=classes)
    targets = np.concatenate([data.targets[:120], np.roll(data.targets[:120], 1, axis=0)])
    targets[200:] = targets[0]  # classes of unequal size
    data = replace(data, targets=targets)
    settings = FitSettings(class_weights=weights)
    monkeypatch.setattr("pipeline.training.samples.CHUNK_BYTES", 50 * DIM * 4)
    streamed = in_file(data, f"{tmp_path}/vectors")
    assert len(list(streamed.chunks())) == 5
    np.testing.assert_array_equal(streamed.take(np.array([7, 3])), data.take(np.array([7, 3])))
    choice = replace(choose(data, np.arange(240), settings), parameter=10.0)
    heads = [fit_all(each, settings, choice) for each in (data, streamed)]
    of_classes = torch.from_numpy(class_weights(data.targets, weights))
    x = data.take(np.arange(240))

    def loss(tensors: dict[str, torch.Tensor]) -> float:
        weight, bias = tensors["weight"].double(), tensors["bias"].double()
        penalty = weight.square().sum() * (1 if classes == 4 else 2) / 20
        return float(fit._loss(x, data.targets, weight, bias, of_classes, False) + penalty)

    in_memory, from_file = (loss(dict(head.tensors)) for head in heads)
    assert from_file == pytest.approx(in_memory, rel=1e-4)
    first, second = (head.scores(torch.from_numpy(data.vectors)).numpy() for head in heads)
    np.testing.assert_allclose(first, second, atol=3e-2)  # scikit-learn stops a little before the minimum


def test_a_streamed_probe_of_several_labels_is_that_in_memory(tmp_path: object) -> None:
    data, settings = several(), FitSettings(class_weights="balanced")
    choice = replace(choose(data, np.arange(300), settings), parameter=10.0)
    heads = [fit_all(each, settings, choice) for each in (data, in_file(data, f"{tmp_path}/vectors"))]
    first, second = (head.scores(torch.from_numpy(data.vectors)).numpy() for head in heads)
    np.testing.assert_allclose(first, second, atol=1e-2)


def test_a_method_that_cannot_stream_says_so(tmp_path: object) -> None:
    data, settings = samples(), FitSettings("knn")
    with pytest.raises(SettingRefused, match="--method knn needs all vectors in memory, and 240 of 24 numbers"):
        fit_all(in_file(data, f"{tmp_path}/vectors"), settings, choose(data, np.arange(240), settings))


def test_centroids_stream(tmp_path: object) -> None:
    data, settings = samples(), FitSettings("centroid")
    choice = choose(data, np.arange(240), settings)
    first, second = (fit_all(each, settings, choice) for each in (data, in_file(data, f"{tmp_path}/vectors")))
    torch.testing.assert_close(first.tensors["weight"], second.tensors["weight"])


def test_classes_are_weighted_only_if_they_are_unbalanced() -> None:
    targets = np.eye(2, dtype=np.float32)[[0] * 30 + [1] * 10]
    np.testing.assert_allclose(class_weights(targets, "auto"), [40 / 60, 2.0])
    np.testing.assert_allclose(class_weights(targets, "none"), [1, 1])
    np.testing.assert_allclose(class_weights(targets[20:], "auto"), [1, 1])


def test_folds_keep_groups_together() -> None:
    data = samples(groups=np.arange(240) // 12)
    folds = folds_of(data, np.arange(240), 5, seed=0)
    assert len(folds) == 5
    assert sorted(np.concatenate([left_out for _, left_out in folds]).tolist()) == list(range(240))
    for fitted, left_out in folds:
        assert not {*data.groups[fitted]} & {*data.groups[left_out]}  # type: ignore[index]


def test_labels_that_cannot_be_divided_are_refused() -> None:
    data = samples(5, classes=4)
    with pytest.raises(InputRefused, match="class 1, class 2, class 3 has 1 label; add labels"):
        folds_of(data, np.arange(5), 5, seed=0)
    with pytest.raises(InputRefused, match="all labelled images are in one group"):
        folds_of(samples(groups=np.zeros(240, np.int64)), np.arange(240), 5, seed=0)


@pytest.mark.parametrize("method", METHODS)
def test_three_labels_of_a_class_are_enough_for_every_step(method: str) -> None:
    data, settings = samples(12, classes=4), FitSettings(method)
    choice = choose(data, np.arange(12), settings)
    result = evaluate(data, settings, None, choice)
    assert (result.images, result.how) == (12, "3-fold cross-validation")
    assert fit_all(data, settings, choice).classes == data.names


def test_few_groups_are_enough_or_refused() -> None:
    two = samples(24, classes=2, groups=np.arange(24) // 12)
    assert evaluate(two, FitSettings(), None, choose(two, np.arange(24), FitSettings())).images == 24
    uneven = samples(24, classes=2, groups=(np.arange(24) > 22).astype(np.int64))
    with pytest.raises(InputRefused, match="without one group only 1 are left; label images of more groups"):
        evaluate(uneven, FitSettings(), None, choose(uneven, np.arange(24), FitSettings()))
    apart = samples(12, classes=4, groups=np.repeat([0, 1, 1], 4))
    assert evaluate(apart, FitSettings(), None, choose(apart, np.arange(12), FitSettings())).images == 12


def test_an_evaluation_is_of_images_that_were_left_out() -> None:
    """Random labels can only be learned by heart: neighbours would find each image itself."""
    rng = np.random.default_rng(0)
    data = replace(samples(), targets=np.eye(4, dtype=np.float32)[rng.integers(0, 4, 240)])
    settings = FitSettings("knn")
    result = evaluate(data, settings, None, choose(data, np.arange(240), settings))
    assert result.accuracy < 0.4
    assert result.images == 240


def test_an_evaluation_has_all_figures() -> None:
    data, settings = samples(), FitSettings()
    result = evaluate(data, settings, None, choose(data, np.arange(240), settings))
    assert result.how == "5-fold cross-validation"
    assert result.accuracy > 0.85
    assert abs(result.balanced_accuracy - result.accuracy) < 1e-6, "the classes have equal numbers"
    assert result.baseline_accuracy == pytest.approx(0.25, abs=0.01)
    assert np.trace(result.confusion) == round(result.accuracy * 240)
    assert [sum(row) for row in result.confusion] == [60] * 4
    assert result.ece_after <= result.ece_before + 0.02
    assert [point[0] for point in result.curve] == [24, 48, 96, 192]
    assert result.curve[-1][1] >= result.curve[0][1]
    assert result.curve[-1][1:] == (result.accuracy, pytest.approx(result.macro_f1)), "the same folds and images"
    assert len(result.mistakes) == 240 - np.trace(result.confusion)
    assert all(each.label != each.predicted for each in result.mistakes)
    assert not result.warnings
    held_out = evaluate(data, settings, 0.25, choose(data, np.arange(240), settings))
    assert (held_out.images, held_out.how) == (60, "hold-out of 60 labels")
    assert (held_out.curve[-1][:2]) == (180, held_out.accuracy)


def test_groups_that_leak_make_the_figures_too_good() -> None:
    """Each group is 12 copies of one random vector with a random class."""
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(40, DIM)), 12, axis=0).astype(np.float32)
    targets = np.eye(2, dtype=np.float32)[np.repeat(np.arange(40) % 2, 12)]
    ids = tuple(map(str, range(480)))
    leaking = Samples(vectors, targets, ("a", "b"), ids)
    grouped = replace(leaking, groups=np.repeat(np.arange(40), 12))
    results = [
        evaluate(each, FitSettings("knn"), None, choose(each, np.arange(480), FitSettings("knn")))
        for each in (leaking, grouped)
    ]
    assert results[0].accuracy == 1
    assert results[1].accuracy < 0.7
    assert "groups kept together" in results[1].how


def test_wrong_labels_are_found() -> None:
    data = samples(spread=0.25)
    targets = data.targets.copy()
    wrong = [7, 50, 101]
    targets[wrong] = np.roll(targets[wrong], 1, axis=1)
    data = replace(data, targets=targets)
    result = evaluate(data, FitSettings(), None, choose(data, np.arange(240), FitSettings()))
    assert {each.image_id for each in result.doubtful[:3]} == {data.image_ids[row] for row in wrong}


def test_few_labels_are_warned_of() -> None:
    data = samples(32)
    result = evaluate(data, FitSettings(), None, choose(data, np.arange(32), FitSettings()))
    assert "class 0 has 8 labels" in result.warnings[0]
    assert len(result.warnings) == 4
    held_out = evaluate(data, FitSettings(), 0.25, choose(data, np.arange(32), FitSettings()))
    assert held_out.warnings[0].startswith("only 8 labels tested the classes: all figures are uncertain")


def test_a_head_that_is_no_better_than_the_most_frequent_class_is_warned_of() -> None:
    data = samples(120)
    frequent = np.zeros(120, int)
    frequent[::3] = 1
    rng = np.random.default_rng(0)
    data = replace(data, targets=np.eye(2, dtype=np.float32)[rng.permutation(frequent)], names=("a", "b"))
    result = evaluate(data, FitSettings(), None, choose(data, np.arange(120), FitSettings()))
    assert result.accuracy <= result.baseline_accuracy == pytest.approx(2 / 3)
    assert "is not better than that of always answering a, 66.7 %: check the labels" in result.warnings[0]


def test_the_temperature_calibrates() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((4000, 3)).astype(np.float32) * 3
    p = probabilities(truth, 1.0, multi_label=False)
    y = np.array([rng.choice(3, p=row / row.sum()) for row in p.astype(float)])
    targets = np.eye(3, dtype=np.float32)[y]
    temperature = fit.best_temperature(truth * 4, targets, multi_label=False)
    assert temperature == pytest.approx(4, rel=0.1)
    before, after = (calibration_error(probabilities(truth * 4, t, False), targets, False) for t in (1.0, temperature))
    assert after < 0.04 < before


@pytest.mark.parametrize(
    ("labels", "errors", "temperature", "note"),
    [
        (29, 0, 1.0, "no error among 29 labels left out, so nothing shows that the scores may be surer"),
        (29, 3, 1.0, "only 29 labels left out, so nothing shows"),
        (600, 0, 1.0, "no error among 600 labels left out"),
        (600, 6, 0.5, ""),
        (12, 6, 2.0, ""),
    ],
)
def test_scores_are_made_surer_only_with_evidence(labels: int, errors: int, temperature: float, note: str) -> None:
    """Logits that a perfect fit would sharpen, or of many errors, which it would flatten."""
    logits = np.tile(np.float32([[1, -1]]), (labels, 1))
    targets = np.eye(2, dtype=np.float32)[(np.arange(labels) < errors).astype(int)]
    made = fit.calibrate(logits, targets, multi_label=False)
    assert made.note.startswith(note)
    assert bool(made.note) == bool(note)
    assert made.temperature == 1 if note else (made.temperature < 1) == (temperature < 1)
    several = fit.calibrate(logits, np.concatenate([targets[:, :1], targets[:, 1:]], axis=1), multi_label=True)
    assert (several.temperature == 1) == bool(note)


def test_the_page_says_why_scores_are_not_surer() -> None:
    data = samples(24, spread=0.1)
    choice = choose(data, np.arange(24), FitSettings())
    head, result = fit_all(data, FitSettings(), choice), evaluate(data, FitSettings(), None, choice)
    assert head.temperature == 1
    assert ("temperature", f"1.00: {result.temperature_note}") in page.figures(result, head.temperature)
    assert "no error among 24 labels left out" in page.html("t", "s", result, head.temperature, {})
