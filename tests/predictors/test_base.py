"""Predictor: the base class for the user's own predictors."""

import pickle
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest
from networks import TINY

from pipeline.config import flag
from pipeline.errors import SettingRefused
from pipeline.images.pixels import PixelFormat
from pipeline.images.transform import Transform
from pipeline.predictors.base import Allotment, Predictor
from pipeline.predictors.embed import Embedder


class Brightness(Predictor):
    columns = pa.schema([("brightness", pa.float32())])

    def predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"brightness": pixels.mean(axis=(1, 2, 3), dtype="float32")}


@dataclass
class Threshold(Brightness):
    threshold: float = 0.5
    threads: int | None = flag("CPU threads", None, fingerprint=False)
    extra: object = field(default=None)
    _cache: int = field(default=0)


@dataclass
class Tagged(Embedder):
    tag: str = ""


class SixteenBit(Brightness):
    pixel_format = PixelFormat("uint16", 4)


def test_a_predictor_needs_only_columns_and_predict() -> None:
    predictor = Brightness()
    predictor.prepare()
    predictor.load(Allotment())
    assert predictor.settings()["predictor"] == "Brightness"
    assert predictor.settings()["columns"] == {"brightness": "float"}
    assert predictor.provenance() == predictor.settings()
    assert predictor.predict(np.full((2, 4, 4, 3), 7, np.uint8))["brightness"].tolist() == [7, 7]
    assert pickle.loads(pickle.dumps(predictor)).transform == Transform()
    assert (predictor.describe(), predictor.lost(), predictor.gpu_memory_bytes()) == ("", False, None)


def test_missing_methods_are_named() -> None:
    for call in (lambda: Predictor().predict(np.empty(0)), lambda: Predictor().join([])):
        with pytest.raises(NotImplementedError, match=r"Predictor has no (predict|join)\(\)"):
            call()


def test_the_fingerprint_contains_the_fields() -> None:
    assert Threshold(0.3).settings() != Threshold(0.4).settings()
    assert Threshold(threads=2).settings() == Threshold().settings()
    assert Threshold(_cache=2).settings() == Threshold().settings()
    with pytest.raises(SettingRefused, match=r"Threshold\.extra is <object .*>, which is not JSON"):
        Threshold(extra=object()).settings()
    with pytest.raises(SettingRefused, match="has no columns"):
        Predictor().settings()


def test_the_fingerprint_contains_the_pixel_format() -> None:
    assert "pixels" not in Brightness().settings()
    assert SixteenBit().settings()["pixels"] == "4 × uint16"


def test_fields_of_a_subclass_of_embedder_are_in_the_fingerprint(own_caches: None) -> None:
    assert Tagged(model=TINY, tag="a").settings() != Tagged(model=TINY, tag="b").settings()
