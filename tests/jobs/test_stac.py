"""Whole jobs over STAC items and Sentinel-2 products: resumed, verified, updated, and with broken assets."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from items import METRES, asset, collection, grid, item, write_safe
from satellite import SENTINEL2, checkpoint, features
from scenes import counting_server, numbers, write
from servers import S3Server
from whole import SLOW, TINY, Jobs, count_commits, same, wait_for

from pipeline.output import ledger as ledgers
from pipeline.output.verify import verify
from pipeline.storage import access

pytestmark = pytest.mark.slow

TILES = ("--tile-size", 32, "--scale", "0:10000", "--assets", "red,green,blue")
LAYOUT = {"tiled": True, "blockxsize": 64, "blockysize": 64}


def assets_of(folder: Path, name: str, side: int = 160, root: object = ".") -> dict[str, Any]:
    """Red and green of 10 m, and blue of 20 m, which is enlarged."""
    assets = {}
    for seed, (key, metres) in enumerate((("red", 10), ("green", 10), ("blue", 20))):
        array = numbers(1, side * 10 // metres, side * 10 // metres, "uint16", seed)
        write(folder / name / f"{key}.tif", array, grid(metres), "EPSG:32633", **LAYOUT)
        assets[key] = asset(f"{root}/{name}/{key}.tif", key)
    return assets


def errors_of(output: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(info.uri) for info in ledgers.parts(str(output)) if "_errors" in info.uri])


def vectors(output: object) -> dict[str, np.ndarray]:
    uris = [info.uri for info in ledgers.parts(str(output)) if "_errors" not in info.uri]
    table = pd.concat([pd.read_parquet(access.open_read(uri)) for uri in uris])
    return dict(zip(table["image_id"], table["embedding"], strict=True))


def test_a_killed_run_goes_on_and_an_update_adds_items(jobs: Jobs, tmp_path: Path) -> None:
    path, out = tmp_path / "items.json", tmp_path / "out"
    items = [item(name, assets_of(tmp_path, name)) for name in "abc"]
    path.write_text(collection(items))
    settings = ("--input", path, *TILES, "--batch-size", 4, "--rows-per-part", 8)
    run = jobs.start("embed", *settings, "--output", out, *SLOW)
    wait_for(lambda: count_commits(out) >= 2)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    done = jobs.run("embed", *settings, "--output", out, *SLOW)
    assert "75 of 75 planned: 75 rows, 0 errors" in done.stdout
    assert verify(str(out)).is_whole, list(verify(str(out)).lines())
    jobs.run("embed", *settings, "--output", tmp_path / "uninterrupted", *SLOW)
    assert same(vectors(out), vectors(tmp_path / "uninterrupted"))
    table = pd.read_parquet(out)
    assert table["item_id"].value_counts().to_dict() == {"a": 25, "b": 25, "c": 25}
    assert str(table["datetime"].dtype) == "datetime64[us, UTC]"
    assert set(table["eo:cloud_cover"]) == {np.float32(12.3)}
    truncated = assets_of(tmp_path, "d")
    os.truncate(tmp_path / "d" / "green.tif", 12_000)
    path.write_text(collection([*items[1:], item("d", truncated), items[0]]))
    done = jobs.run("embed", *settings, "--output", out, *SLOW, "--update", "--max-error-rate", 0.5)
    assert "3 images or shards are unchanged" in done.stdout
    verification = verify(str(out))
    assert verification.is_whole, list(verification.lines())
    assert verification.planned == 100
    assert verification.errors > 0
    errors = errors_of(out)
    assert set(errors["source"]) == {f"{path}#d"}
    assert errors["message"].str.contains(r"green\.tif cannot be read").all()


def test_a_sentinel_2_product_gives_timms_embeddings(jobs: Jobs, tmp_path: Path) -> None:
    write_safe(tmp_path / "in", baseline="05.11", stored_offset=1000)
    network = checkpoint(tmp_path / "w.pth", 13)
    settings = ("--model", "timm:resnet18", "--weights", tmp_path / "w.pth", "--input-spec", "sentinel2-all")
    more = ("--precision", "float32", "--tile-size", 64, "--resize", 64, "--crop", 64)
    done = jobs.run("embed", "--input", tmp_path / "in", "--output", tmp_path / "out", *settings, *more)
    assert "9 of 9 planned: 9 rows, 0 errors" in done.stdout
    assert (
        done.stderr.count("Sentinel-2: the offset of 1000 is subtracted, by processing baseline 05.11 of the product")
        == 1
    )
    table = pd.read_parquet(tmp_path / "out").set_index(["window_col", "window_row"])
    x = (np.arange(64, 128) + 0.5) * 10
    names = [f"B{name[1:]:0>2}" for name in SENTINEL2]  # the bands of `items.band`, which are linear
    ideal = [100 * (1 + list(METRES).index(name)) + 0.5 * x[None, :] + 0.25 * x[:, None] for name in names]
    expected = features(network, torch.from_numpy(np.stack(ideal).astype(np.float32)) / 10_000)
    found = table.loc[(64, 64), "embedding"]
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-3)  # the files hold whole numbers


def test_items_in_a_bucket_with_assets_on_a_web_server(jobs: Jobs, s3: S3Server, tmp_path: Path) -> None:
    with counting_server(tmp_path) as (web, _):
        assets = assets_of(tmp_path, "a", 64, web)
        assets["red"]["href"] += "?sig=geheim"
        uri = s3.uri(f"items-{tmp_path.name}.json")
        access.write(uri, collection([item("a", assets)]).encode())
        done = jobs.run("embed", "--input", uri, "--output", tmp_path / "out", *TINY, *TILES)
    assert "4 of 4 planned: 4 rows, 0 errors" in done.stdout
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert b"geheim" not in written
    assert "geheim" not in json.dumps([done.stdout, done.stderr])
    assert verify(str(tmp_path / "out")).is_whole
