"""The footer key `emb`: STAC's embedding extension for the parts of one run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scenes
from affine import Affine
from scene_outputs import KEEP, Place, write_output

from pipeline import schema
from pipeline.config import RunConfig
from pipeline.explore.export import export
from pipeline.output import embedding_metadata, parts
from pipeline.output import ledger as ledgers
from pipeline.output.run_record import RunRecord
from pipeline.predictors import base
from pipeline.stages.ground_resolution import metres_per_pixel

VECTOR = pa.schema([("embedding", schema.vector(pa.float32(), 4))])
SCENE = schema.result(VECTOR, KEEP)
SHA256 = "ab" * 32


class Described(base.Predictor):
    """What `Embedder` says of a network with a file of weights."""

    def settings(self) -> dict[str, object]:
        return {"model": "timm:resnet50", "weights": f"sha256:{SHA256}", "transform": {"crop": 224}}

    def provenance(self) -> dict[str, object]:
        uri = {"weights_uri": "https://host/w.pth", "weights_sha256": SHA256}
        return {**self.settings(), "weights": "w.pth", **uri}


def describe(columns: pa.Schema = SCENE, **settings: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"input": ("s3://bucket/scenes",), "output": "/out", **settings}
    record = RunRecord.of(RunConfig(**values), Described())
    return embedding_metadata.describe(record.settings, record.provenance, columns)


def test_windows_of_scenes() -> None:
    fields = describe(tile_size=224, tile_stride=112, resolution=10.0)
    assert (fields["emb:type"], fields["emb:dimensions"], fields["data_type"]) == ("chip", 4, "float32")
    assert fields["gsd"] == 10.0
    layout = {"layout_type": "regular_grid", "chip_size": [224, 224], "stride": [112, 112]}
    assert fields["emb:chip_layout"] == layout
    assert fields["links"] == [
        {
            "rel": "emb:model",
            "href": "https://host/w.pth",
            "title": "timm:resnet50",
            "file:checksum": f"1220{SHA256}",
        },
        {"rel": "emb:source-data", "href": "s3://bucket/scenes"},
    ]
    assert fields["emb:runtime_parameters"]["transform"] == {"crop": 224}
    assert "emb:quantization" not in fields
    assert json.loads(json.dumps(fields)) == fields


def test_what_differs_by_run() -> None:
    half = pa.schema([*SCENE.remove(SCENE.get_field_index("embedding")), ("embedding", pa.list_(pa.float16(), 4))])
    fields = describe(half, tile_size=64, edge="shift")
    assert fields["data_type"] == "float16"
    assert fields["emb:quantization"]["original_dtype"] == "float32"
    assert fields["emb:chip_layout"]["layout_type"] == "variable_grid"
    assert "gsd" not in fields
    small = SCENE.set(SCENE.get_field_index("embedding"), pa.field("embedding", schema.vector(pa.int8(), 4)))
    fields = describe(small.append(pa.field("embedding_scale", pa.float32())), tile_size=64)
    assert fields["data_type"] == fields["emb:quantization"]["quantized_dtype"] == "int8"
    assert "embedding_scale" in fields["emb:quantization"]["method"]
    tiles = pa.schema([*VECTOR, ("tile_z", pa.int32()), *schema.FOOTPRINT])
    assert describe(tiles)["emb:chip_layout"] == {"layout_type": "named_grid", "grid_id": "WebMercatorQuad"}
    assert "emb:chip_layout" not in describe(pa.schema([*SCENE, ("tile_z", pa.int32())]), tile_size=64), "both"


def test_photos_and_classes_have_none() -> None:
    assert describe(VECTOR) == {}
    assert describe(schema.result(pa.schema([("label", pa.string())]), KEEP), tile_size=64) == {}
    assert embedding_metadata.to_text({}) == embedding_metadata.text_of({b"geo": b"{}"}) == {}


def test_credentials_stay_out() -> None:
    text = json.dumps(describe(input=("https://user:secret@host/a.tif",), tile_size=64))
    assert "secret" not in text
    assert "https://host/a.tif" in text


def test_random_weights_have_no_checksum() -> None:
    settings = {"model": "resnet18", "weights": "random, seed 0", "transform": {}, "input": ["/in"]}
    provenance = {**settings, "weights": "random", "weights_uri": None, "weights_sha256": None}
    model, source = embedding_metadata.describe(settings, provenance, SCENE)["links"]
    assert model == {"rel": "emb:model", "href": "random", "title": "resnet18"}
    assert source["href"] == "/in"


def vector(place: Place) -> dict[str, Any]:
    return {"embedding": [float(place.across), float(place.down), 0.0, 1.0]}


def footer(path: Path) -> dict[str, Any]:
    return json.loads(pq.read_metadata(path).metadata[b"emb"])  # type: ignore[no-any-return]


def test_parts_have_it_also_after_rows_were_dropped_and_exports_too(tmp_path: Path) -> None:
    scene = scenes.write(tmp_path / "a.tif", scenes.numbers(3, 96, 128))
    tiling = asdict(scenes.tiling(32))
    settings = {"model": "tiny", "weights": "w", "transform": {}, "input": ["/in"], "tiling": tiling}
    fields = embedding_metadata.describe(settings, settings, SCENE)
    out = write_output(tmp_path / "out", [scene], scenes.tiling(32), vector, VECTOR, embeddings=fields)
    (part,) = (out / "results").iterdir()
    written = footer(part)
    assert written["gsd"] == 10.0, "of the scene's own pixels"
    assert np.datetime64(written["processing:datetime"].rstrip("Z")) > np.datetime64("2025-01-01")
    assert {**fields, "gsd": 10.0, "processing:datetime": written["processing:datetime"]} == written
    (commit,) = ledgers.valid_commits(str(out), ledgers.last_attempt(str(out)))
    kept = parts.drop_rows(str(out), {0: ((0, 3),)}, commit, 2)
    assert kept is not None
    assert footer(out / str(kept.part)) == written
    (out / "_run.json").write_text(json.dumps({"fingerprint": "f", "settings": settings}))
    export(str(out), tmp_path / "w.parquet", ["embedding"])
    assert footer(tmp_path / "w.parquet")["emb:chip_layout"] == written["emb:chip_layout"]
    export(str(out), tmp_path / "v.parquet", ["image_id"])
    assert b"emb" not in pq.read_metadata(tmp_path / "v.parquet").metadata


def rows(*places: tuple[str | None, Affine | None]) -> pa.Table:
    crs, transforms = zip(*places, strict=True)
    values = [None if each is None else list(each)[:6] for each in transforms]
    return pa.table({"crs": pa.array(crs, pa.string()), "transform": pa.array(values, pa.list_(pa.float64()))})


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([("EPSG:32618", Affine(10, 0, 5e5, 0, -10, 4e6)), ("EPSG:32619", Affine(0, 10, 0, 10, 0, 0))], 10.0),
        ([("EPSG:2263", Affine(100, 0, 0, 0, -100, 0))], 30.480061),  # feet
        ([("EPSG:32618", Affine(10, 0, 0, 0, -10, 0)), ("EPSG:32618", Affine(20, 0, 0, 0, -20, 0))], None),
        ([("EPSG:32618", Affine(10, 0, 0, 0, -20, 0))], None),
        ([("EPSG:4326", Affine(0.1, 0, 0, 0, -0.1, 0))], None),
        ([("EPSG:32618", Affine(10, 0, 0, 0, -10, 0)), (None, None)], None),
        ([(None, Affine(10, 0, 0, 0, -10, 0))], None),
    ],
)
def test_metres_per_pixel(places: list[tuple[str | None, Affine | None]], expected: float | None) -> None:
    assert metres_per_pixel(rows(*places)) == expected


def test_other_tables_have_no_pixels() -> None:
    assert metres_per_pixel(pa.table({"image_id": ["a"]})) is None
    assert metres_per_pixel(rows(("EPSG:32618", Affine.identity()))[:0]) is None
