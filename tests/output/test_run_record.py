"""The record of a run: outputs that earlier versions began must resume."""

import json
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.embedding_space import EmbeddingSpace
from pipeline.output.run_record import RunRecord
from pipeline.predictors.classify import Classifier
from pipeline.predictors.embed import Embedder
from pipeline.predictors.network import NetworkPredictor

OLD_CONFIG_SETTINGS = {
    "input": ["/data/photos", "s3://bucket/tiles/*.tar"],
    "keep": ["cls:truth", "text"],
    "image_column": None,
    "uri_column": None,
    "limit": 500,
    "max_pixels": 200000000,
    "exif_rotate": True,
    "decoder": "fast",
}
OLD_TRANSFORM = {
    "resize": 256,
    "crop": 224,
    "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "squash": False,
}
OLD_EMBEDDER = {
    "predictor": "Embedder",
    "model": "resnet18",
    "precision": "auto",
    "embedding_dtype": "float16",
    "weights": "random, seed 3",
    "transform": OLD_TRANSFORM,
}
OLD_CLASSIFIER = {
    "predictor": "Classifier",
    "model": "resnet18",
    "precision": "auto",
    "embedding_dtype": "float32",
    "top_k": 3,
    "embeddings": True,
    "weights": "random, seed 0",
    "transform": OLD_TRANSFORM,
    "labels": "a503810a9d7aabe7",
}
"""As Nightshift 0.1 wrote them to `_run.json`."""


def record(predictor: NetworkPredictor, **settings: Any) -> RunRecord:
    values = {
        "input": ["/data/photos", "s3://user:secret@bucket/tiles/*.tar"],
        "output": "/data/out",
        "keep": "cls:truth,text",
        "limit": 500,
        **settings,
    }
    predictor.prepare()
    return RunRecord.of(RunConfig(**values), predictor)


def embedder(**settings: Any) -> NetworkPredictor:
    return Embedder(model="resnet18", weights="random", seed=3, embedding_dtype="float16", **settings)


@pytest.mark.parametrize(
    ("predictor", "old_settings", "old_fingerprint"),
    [
        (embedder(), OLD_EMBEDDER, "db3be938400ed021"),
        (Classifier(model="resnet18", weights="random", top_k=3, embeddings=True), OLD_CLASSIFIER, "9267a10384a0959e"),
    ],
)
def test_an_output_of_an_earlier_version_resumes(
    predictor: NetworkPredictor, old_settings: dict[str, object], old_fingerprint: str
) -> None:
    made = record(predictor)
    assert made.settings == {**OLD_CONFIG_SETTINGS, **old_settings}
    assert made.fingerprint == old_fingerprint
    assert json.loads(made.to_json())["settings"] == made.settings, "the same when it is read back"


def test_settings_that_do_not_change_results_are_not_in_the_fingerprint() -> None:
    made = record(embedder())
    assert record(embedder(compile="off"), output="/other", batch_size=7, actors="2").fingerprint == made.fingerprint
    assert record(embedder(precision="float32")).fingerprint != made.fingerprint


def test_bands_and_values_are_recorded_only_if_they_are_set() -> None:
    plain = record(embedder())
    assert not {"bands", "scale", "nodata_fill"} & {*plain.settings, *plain.provenance}
    made = record(embedder(), bands="B04, 3,2", scale="-1:1", nodata_fill=0.0)
    expected = {"bands": ["B04", "3", "2"], "scale": [-1.0, 1.0], "nodata_fill": 0.0}
    assert {name: made.settings[name] for name in expected} == expected
    assert {name: json.loads(made.footer)[name] for name in expected} == expected
    assert made.fingerprint != plain.fingerprint
    assert record(embedder(), scale="-1.0:1").settings["scale"] == made.settings["scale"]


class Plain:
    """A predictor without settings."""

    def settings(self) -> dict[str, object]:
        return {}

    def provenance(self) -> dict[str, object]:
        return {}


def satellite(**settings: Any) -> str:
    config = RunConfig(**{"input": "/in", "output": "/out", "tile_size": 64, **settings})
    return RunRecord.of(config, Plain()).fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"zoom": "3"},
        {"bbox": "0,0,1,1"},
        {"datetime": "2024-01-01T00:00:00Z/.."},
        {"assets": "red,nir"},
        {"tile_size": 32},
        {"tile_stride": 32},
        {"edge": "shift"},
        {"resolution": 20.0},
        {"resampling": "cubic"},
        {"max_nodata": 0.5},
        {"bands": "1,2,3"},
        {"scale": "percentile:2:98"},
        {"nodata_fill": 0.0, "scale": "0:9"},
        {"harmonize": "off"},
        {"limit": 7},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_settings_of_satellite_imagery_change_the_fingerprint(changed: dict[str, Any]) -> None:
    assert satellite(**changed) != satellite()


def test_the_same_setting_in_other_words_has_the_same_fingerprint() -> None:
    assert satellite(tile_stride=64) == satellite(any_values=True) == satellite()
    assert satellite(zoom="3") == satellite(zoom="3:3") == satellite(zoom="03")
    assert satellite(bbox="0,0,1,1") == satellite(bbox="0.0,0,1.00, 1e0")
    assert satellite(assets="red,nir") == satellite(assets="red, nir") != satellite(assets="nir,red")


def test_the_footer_of_a_part_names_the_network() -> None:
    made = record(embedder())
    footer = json.loads(made.footer)
    assert footer == json.loads(
        json.dumps(
            {
                "fingerprint": made.fingerprint,
                "embedding_space": made.embedding_space.to_json(),
                **made.provenance,
            }
        )
    )
    assert (footer["model"], footer["weights"], footer["embedding_dim"]) == ("resnet18", "random", 512)


def test_run_json_holds_no_credentials_of_inputs() -> None:
    text = record(embedder()).to_json().decode()
    assert "secret" not in text
    assert list(json.loads(text)) == [
        "layout", "fingerprint", "embedding_space", "settings", "provenance", "config", "versions",
    ]  # fmt: skip


def test_a_difference_names_each_setting_and_both_values() -> None:
    made = record(embedder())
    earlier = {**made.settings, "limit": None, "model": "resnet50"}
    assert made.difference(earlier) == 'limit was not set and is 500; model was "resnet50" and is "resnet18"'


@pytest.mark.parametrize(
    ("output", "run", "label"),
    [
        ("/data/Straße 5/", "Stra-e-5-db3be938", "/data/Stra%C3%9Fe 5"),
        ("s3://user:secret@bucket/tiles/embeddings", "embeddings-db3be938", "s3://bucket/tiles/embeddings"),
    ],
)
def test_labels_are_ascii_and_hold_no_credentials(output: str, run: str, label: str) -> None:
    assert record(embedder(), output=output).labels == {"run": run, "output": label}


SPACE = EmbeddingSpace.of({**OLD_CONFIG_SETTINGS, **OLD_EMBEDDER})


def test_the_embedding_space_depends_on_all_that_changes_vectors() -> None:
    ids = {SPACE.id}
    for change in (
        {"model": "resnet50"},
        {"weights": "random, seed 4"},
        {"precision": "float32"},
        {"decoder": "exact"},
        {"exif_rotate": False},
        {"transform": {**OLD_TRANSFORM, "crop": 192}},
        {"scale": [0.0, 3000.0]},
        {"bands": ["3", "2", "1"]},
        {"pixels": "13 × uint16"},
        {"tiling": {"size": 256, "resolution": 10.0, "stride": 128}},
        {"tiling": {"size": 256, "resolution": 20.0, "stride": 128}},
        {"a_setting_of_the_future": 1},
    ):
        ids.add(EmbeddingSpace.of({**OLD_CONFIG_SETTINGS, **OLD_EMBEDDER, **change}).id)
    assert len(ids) == 13


def test_the_embedding_space_does_not_depend_on_the_input_or_on_the_columns() -> None:
    of_classifier = {**OLD_CONFIG_SETTINGS, **OLD_CLASSIFIER, "weights": OLD_EMBEDDER["weights"]}
    others = {"input": ["elsewhere"], "limit": 3, "keep": [], "max_pixels": 9, "uri_column": "url", "any_suffix": True}
    assert EmbeddingSpace.of({**of_classifier, **others}) == SPACE
    with_windows = {**OLD_CONFIG_SETTINGS, **OLD_EMBEDDER, "tiling": {"size": 256, "resolution": None, "stride": 128}}
    side_by_side = {**with_windows, "tiling": {"size": 256, "resolution": None, "stride": 256}}
    assert EmbeddingSpace.of(with_windows).id == EmbeddingSpace.of(side_by_side).id


def test_a_run_without_a_network_has_no_embedding_space() -> None:
    assert EmbeddingSpace.of({**OLD_CONFIG_SETTINGS, "predictor": "Histogram", "bins": 8}) is None


def test_the_difference_of_two_spaces_is_named_in_words() -> None:
    other = EmbeddingSpace.of(
        {
            **OLD_CONFIG_SETTINGS,
            **OLD_EMBEDDER,
            "weights": "sha256:" + "3f9a1c20" * 8,
            "transform": {**OLD_TRANSFORM, "crop": 192},
            "scale": [0.0, 1.0],
        }
    )
    assert SPACE.difference(other) == (
        "weights is random, seed 3, not sha256:3f9a1c203f9a1…; transform.crop is 224, not 192; "
        "scale is not set, not [0.0, 1.0]"
    )
    assert SPACE.difference(SPACE) == ""


def test_a_record_and_its_parts_hold_the_embedding_space() -> None:
    made = record(embedder())
    assert made.embedding_space == SPACE
    for text in (made.to_json(), made.footer):
        described = json.loads(text)["embedding_space"]
        assert described["id"] == SPACE.id
        assert EmbeddingSpace.from_json(described) == SPACE
