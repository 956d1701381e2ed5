"""Head files: what is written is read again, and what is no head is refused."""

import pickle
from pathlib import Path

import pytest
import torch
from outputs import SETTINGS
from safetensors.torch import save_file
from servers import S3Server

from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.models.heads import Head, load_head, load_heads
from pipeline.predictors.heads import HeadColumns

SPACE = EmbeddingSpace.of(SETTINGS)
assert SPACE is not None


def head(**more: object) -> Head:
    tensors = {"weight": torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), "bias": torch.tensor([0.0, 0.5, 0])}
    values = {"method": "linear", "tensors": tensors, "classes": ("a", "b", "<c>"), "space": SPACE, **more}
    return Head(**values)  # type: ignore[arg-type]


def test_a_head_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = head(temperature=0.5, network={"model": "resnet18", "weights": "random", "seed": 1}, multi_label=True)
    written.save(str(tmp_path / "mine.safetensors"))
    read = load_head(str(tmp_path / "mine.safetensors"))
    assert read.name == "mine"
    assert len(read.sha256) == 64
    for name in ("method", "classes", "space", "temperature", "multi_label", "normalize", "network"):
        assert getattr(read.head, name) == getattr(written, name)
    vectors = torch.randn(5, 2)
    torch.testing.assert_close(read.head.scores(vectors), written.scores(vectors))


def test_a_head_lives_in_a_bucket(s3: S3Server, own_caches: None) -> None:
    uri = s3.uri("heads/mine.safetensors")
    head().save(uri)
    assert load_head(uri).head.classes == ("a", "b", "<c>")


def test_scores_are_softmax_over_scaled_vectors_by_the_temperature() -> None:
    scores = head(temperature=2.0).scores(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(scores, (torch.tensor([[0.6, 0.8 + 0.5, -0.6]]) / 2).softmax(1))
    raw = head(normalize=False, multi_label=True).scores(torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(raw, torch.tensor([[3.0, 4.5, -3.0]]).sigmoid())


def test_the_votes_of_neighbours() -> None:
    tensors = {
        "vectors": torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [-1, 0]]),
        "targets": torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]),
        "k": torch.tensor(2),
    }
    scores = head(method="knn", tensors=tensors, classes=("a", "b")).scores(torch.tensor([[1.0, 0.1], [-0.5, 0.9]]))
    assert scores[0, 0] > 0.999
    assert scores[1, 1] > 0.999
    assert head(method="knn", tensors=tensors).dim == 2


def test_what_is_no_head_is_refused(tmp_path: Path) -> None:
    weights, broken = str(tmp_path / "weights.safetensors"), str(tmp_path / "broken.safetensors")
    save_file({"fc.weight": torch.zeros(2, 2)}, weights)
    with pytest.raises(
        WeightsRefused, match=r"--head .*weights.safetensors is no head: make one with `nightshift fit`"
    ):
        load_head(weights)
    head().save(broken)
    Path(broken).write_bytes(Path(broken).read_bytes()[:-7])
    with pytest.raises(WeightsRefused, match=r"broken.safetensors cannot be read"):
        load_head(broken)
    with pytest.raises(WeightsRefused, match="no such file"):
        load_head(str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"classes": ("a", "b")}, r"bias has the shape|weight has the shape \[3, 2\], not \[2, 2\]"),
        ({"classes": ("a", "b", "b")}, "must be different names"),
        ({"classes": ()}, "must be different names"),
        ({"classes": ("a", "b", "")}, "must be different names"),
        ({"method": "forest"}, "its method is 'forest', not one of linear"),
        ({"method": "mlp"}, "hidden.weight"),
        ({"temperature": 0.0}, "its temperature is 0.0"),
        ({"temperature": float("nan")}, "its temperature is nan"),
        ({"tensors": {"weight": torch.zeros(3, 2), "bias": torch.tensor([0, torch.inf, 0])}}, "bias has numbers that"),
        (
            {"tensors": {"weight": torch.zeros(3), "bias": torch.zeros(3)}},
            r"weight has the shape \[3\], not \[classes, dim\]",
        ),
        ({"tensors": {"weight": torch.zeros(3, 2)}}, "bias"),
        (
            {
                "method": "knn",
                "tensors": {"vectors": torch.zeros(4, 2), "targets": torch.zeros(4, 3), "k": torch.tensor(5)},
            },
            "k is 5, of 4 vectors",
        ),
    ],
)
def test_a_head_that_contradicts_itself_is_refused(tmp_path: Path, more: dict[str, object], message: str) -> None:
    head(**more).save(str(tmp_path / "mine.safetensors"))
    with pytest.raises(WeightsRefused, match=rf"mine.safetensors cannot be read: .*({message})"):
        load_head(str(tmp_path / "mine.safetensors"))


class Evil:
    """A pickle that would write a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> object:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["mine.safetensors", "mine.pt"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    target = tmp_path / "owned"
    (tmp_path / name).write_bytes(pickle.dumps(Evil(target)))
    with pytest.raises(WeightsRefused, match=rf"--head .*{name} cannot be read"):
        load_head(str(tmp_path / name))
    torch.save({"weight": Evil(target)}, tmp_path / name)
    with pytest.raises(WeightsRefused, match=rf"--head .*{name} cannot be read"):
        load_head(str(tmp_path / name))
    assert not target.exists()


def test_heads_of_other_widths_are_refused(tmp_path: Path) -> None:
    head().save(str(tmp_path / "two.safetensors"))
    wide = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
    head(tensors=wide).save(str(tmp_path / "four.safetensors"))
    files = [str(tmp_path / f"{name}.safetensors") for name in ("two", "four")]
    with pytest.raises(WeightsRefused, match="two takes 2 numbers and four takes 4 numbers"):
        load_heads(files)
    columns = HeadColumns(load_heads(files[:1]), 5)
    columns.check_width(2, "this run")
    with pytest.raises(WeightsRefused, match="--head two takes vectors of 2 numbers, and those of this run have 512"):
        columns.check_width(512, "this run")


def test_two_heads_of_one_name_are_refused(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("a/same.safetensors", "b/same.safetensors", "c/SAME.safetensors")]
    for file in files:
        Path(file).parent.mkdir()
        head().save(file)
    for other in files[1:]:  # in SQL, the columns of the third would be those of the first
        with pytest.raises(SettingRefused, match=r"two files are named same.safetensors.*rename one"):
            load_heads([files[0], other])


def test_columns_of_one_head_and_of_several(tmp_path: Path) -> None:
    for name in ("trees", "roads"):
        head().save(str(tmp_path / f"{name}.safetensors"))
    both = load_heads([str(tmp_path / "trees.safetensors"), str(tmp_path / "roads.safetensors")])
    vectors = torch.tensor([[1.0, 0], [0, 2], [-3, 0.1]])
    one = HeadColumns(both[:1], 2)
    columns = one.results(vectors)
    assert one.schema.names == ["label", "label_id", "score", "top_labels", "top_label_ids", "top_scores"]
    assert list(columns) == one.schema.names
    assert columns["label"].to_pylist() == ["a", "b", "<c>"]
    assert [len(each) for each in columns["top_labels"].to_pylist()] == [2, 2, 2]
    names = HeadColumns(both, 2).schema.names
    assert names[0] == "trees_label"
    assert names[6] == "roads_label"
    assert len(names) == 12


def test_a_head_of_another_space_is_refused_by_name(tmp_path: Path) -> None:
    head().save(str(tmp_path / "mine.safetensors"))
    columns = HeadColumns(load_heads([str(tmp_path / "mine.safetensors")]), 5)
    columns.check(SPACE, "this run")
    other = EmbeddingSpace.of({**SETTINGS, "weights": "random, seed 1", "decoder": "exact"})
    with pytest.raises(
        WeightsRefused,
        match=r"--head mine was fitted on other vectors than those of this run: decoder is exact, not fast; "
        r"weights is random, seed 1, not random, seed 0; fit a head",
    ):
        columns.check(other, "this run")
