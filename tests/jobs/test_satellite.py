"""Whole jobs on tiles of a satellite: a folder and a tar, a range that is measured once, and refusals in seconds."""

import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from satellite import OLD_PRODUCT, PRODUCT, SENTINEL2, checkpoint, draw_dn, features, geotiff
from torchvision.transforms.v2.functional import center_crop, resize
from whole import Jobs, write_tar

pytestmark = pytest.mark.slow


def test_tiles_in_a_folder_and_in_a_tar_give_timms_embeddings(jobs: Jobs, tmp_path: Path) -> None:
    folder = tmp_path / "in" / f"{OLD_PRODUCT}.SAFE"
    folder.mkdir(parents=True)
    arrays = [draw_dn(seed=i) for i in range(6)]
    for i in range(3):
        (folder / f"{i}.tif").write_bytes(geotiff(arrays[i][::-1], SENTINEL2[::-1]))
    members = {f"{PRODUCT}/{i}.tif": geotiff(arrays[i] + 1000, SENTINEL2) for i in range(3, 6)}
    write_tar(tmp_path / "in" / "a.tar", members)
    network = checkpoint(tmp_path / "w.pth", 13)
    done = jobs.run(
        *("embed", "--input", tmp_path / "in", "--output", tmp_path / "out", "--model", "timm:resnet18"),
        *("--weights", tmp_path / "w.pth", "--input-spec", "sentinel2-all", "--precision", "float32"),
    )
    assert "6 of 6 planned: 6 rows, 0 errors" in done.stdout
    assert "offset of 1000 is subtracted from 3 of 6 images" in done.stderr
    table = pd.read_parquet(tmp_path / "out").sort_values("member", na_position="first")
    for name, embedding in zip(table["image_id"], table["embedding"], strict=True):
        array = arrays[int(name[-5])]
        x = torch.from_numpy(array.astype(np.float32))
        expected = features(network, center_crop(resize(x, [256, 256], antialias=True), [224, 224]) / 10_000)
        np.testing.assert_allclose(embedding, expected, rtol=1e-4, atol=1e-4)
    record = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert record["settings"]["input"] == [str(tmp_path / "in")]
    assert record["settings"]["specification"]["divisor"] == [10_000.0] * 13
    assert record["provenance"]["input_spec"] == "sentinel2-all"


def test_a_measured_range_is_recorded_and_taken_again(jobs: Jobs, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    arrays = [draw_dn(4, seed=i) for i in range(5)]
    for i, array in enumerate(arrays):
        (folder / f"{i}.tif").write_bytes(geotiff(array, ["blue", "green", "red", "nir"]))
    command = ["embed", "--input", folder, "--output", out, "--model", "resnet18", "--weights", "random"]
    command += ["--bands", "red,green,blue", "--scale", "percentile:2:98"]
    jobs.run(*command)
    low, high = np.percentile(np.stack(arrays)[:, :3], [2, 98])
    settings = json.loads((out / "_run.json").read_text())["settings"]
    assert settings["scale"] == [low, high]
    (folder / "5.tif").write_bytes(geotiff(draw_dn(4, seed=5) * 3, ["blue", "green", "red", "nir"]))
    done = jobs.run(*command, "--update")
    assert "6 of 6 planned: 6 rows, 0 errors" in done.stdout
    assert json.loads((out / "_run.json").read_text())["settings"] == settings
    refused = jobs.run(*command[:-1], "percentile:1:99", code=2)
    assert "scale_percentiles was [2.0, 98.0] and is [1.0, 99.0]" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing says whether the numbers of the image contain Sentinel-2's offset"),
        (["--harmonize", "off"], "99 % of the values are below 0.0"),
        (["--input-spec", "sentinel2-al"], "did you mean sentinel2-all?"),
        (["--input-spec", "landsat-oli-sr"], "takes 13 channels, but --input-spec landsat-oli-sr has 7 bands"),
    ],
)
def test_what_would_be_silently_wrong_ends_with_2(jobs: Jobs, tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tif").write_bytes(geotiff(draw_dn(low=0, high=200), SENTINEL2))
    checkpoint(tmp_path / "w.pth", 13)
    started = time.monotonic()
    refused = jobs.run(
        *("embed", "--input", tmp_path / "in", "--output", tmp_path / "out", "--model", "timm:resnet18"),
        *("--weights", tmp_path / "w.pth", "--input-spec", "sentinel2-all", *flags),
        code=2,
    )
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - started < 60
