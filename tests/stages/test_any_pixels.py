"""Pixels of every format, from a source through a predictor of a user to the output."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline import Allotment, PixelFormat, Predictor, schema, sources
from pipeline.coverage import END, Ranges
from pipeline.images.transform import Transform
from pipeline.images.values import Values
from pipeline.output import ledger as ledgers
from pipeline.sources import ReadOptions, Record, ShardEnd
from pipeline.sources.base import Source
from pipeline.sources.shard import Shard
from pipeline.stages.load import Loader
from pipeline.stages.predict import Predict
from pipeline.stages.write import Sink

SIZES = [(9, 5), (5, 9), (7, 7)]


def scene(dtype: str, bands: int, row: int) -> np.ndarray:
    height, width = SIZES[row % len(SIZES)]
    numbers = np.random.default_rng(row).integers(0, 200, (height, width, bands))
    return (numbers * (300 if dtype == "uint16" else 1)).astype(dtype)


class Statistics(Predictor):
    """The mean of each band, and the shape that the predictor has seen."""

    transform = Transform(resize=8, crop=8)

    def __init__(self, pixel_format: PixelFormat) -> None:
        self.pixel_format = pixel_format
        self.columns = pa.schema(
            [
                ("means", pa.list_(pa.float32(), pixel_format.bands)),
                ("seen", pa.string()),
            ]
        )

    def load(self, allotment: Allotment) -> None:
        self.batch_size = allotment.batch_size

    def join(self, pixels: Any) -> list[np.ndarray]:
        return [image for group in pixels for image in group]

    def predict(self, pixels: Any) -> dict[str, Any]:
        assert len(pixels) <= self.batch_size
        return {
            "means": np.stack([image.mean((0, 1), dtype=np.float64) for image in pixels]).astype(np.float32),
            "seen": [f"{image.dtype} {image.shape}" for image in pixels],
        }


def run_stages(folder: Path, pixel_format: PixelFormat, monkeypatch: pytest.MonkeyPatch, *, source_format: str) -> None:
    """A source that decodes gives 8 images of `source_format`; the output lies in `folder`."""

    def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
        for row in range(8):
            pixels = scene(source_format, pixel_format.bands, row)
            yield Record(row, f"{shard.uri}#{row}", shard.uri, str(row), pixels)
        yield ShardEnd(8)

    monkeypatch.setitem(sources.SOURCES, "scene", Source("scene", (".scene",), read))
    predictor = Statistics(pixel_format)
    loader = Loader(
        predictor.transform,
        ReadOptions(),
        {},
        10**6,
        True,
        False,
        False,
        3,
        2,
        values=Values(pixel_format=pixel_format),
    )
    stage = Predict(predictor, {}, Allotment(batch_size=3))
    tables = [stage(table) for table in loader.load(Shard(0, "scene", "a.scene"), ((0, END),))]
    assert len(tables) == 3
    ledgers.begin(str(folder))
    Sink(str(folder), 1, schema.result(predictor.columns, {}), "{}")(pa.concat_tables(tables))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("bands", [1, 3, 13])
def test_pixels_reach_the_predictor_as_the_source_gave_them(
    tmp_path: Path, dtype: str, bands: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stages(tmp_path, PixelFormat(dtype, bands), monkeypatch, source_format=dtype)
    rows = pd.read_parquet(tmp_path).sort_values("row")
    assert rows["row"].tolist() == list(range(8))
    for row, means, seen, width, height in rows[["row", "means", "seen", "width", "height"]].itertuples(index=False):
        expected = scene(dtype, bands, row)
        assert seen == f"{dtype} {expected.shape}"
        assert (height, width) == expected.shape[:2]
        assert np.allclose(means, expected.mean((0, 1)), rtol=1e-6)
    assert ledgers.read(str(tmp_path)).rows == 8


def test_pixels_that_the_predictor_does_not_take_are_error_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stages(tmp_path, PixelFormat("uint8", 13), monkeypatch, source_format="uint16")
    errors = pd.read_parquet(tmp_path / "_errors")
    assert errors["error_type"].tolist() == ["unsupported"] * 8
    assert errors["stage"].tolist() == ["decode"] * 8
    assert "the image is uint16 [9, 5, 13]" in errors.sort_values("row")["message"].iloc[0]


def test_an_encoded_image_for_a_network_of_13_bands_is_an_error_row(tmp_path: Path) -> None:
    import images

    (tmp_path / "a.png").write_bytes(images.encode(images.tile(), "PNG"))
    from pipeline.sources.objects import LooseImages

    shard = Shard(0, "objects", str(tmp_path), payload=LooseImages(("a.png",)))
    loader = Loader(
        Transform(),
        ReadOptions(),
        {},
        10**6,
        True,
        True,
        False,
        3,
        1,
        values=Values(pixel_format=PixelFormat("uint16", 13)),
    )
    (table,) = loader.load(shard, ((0, 1),))
    row = table.to_pylist()[0]
    assert (row["stage"], row["error_type"], row["pixels"]) == ("decode", "unsupported", None)
