"""Whole jobs: scenes with an input specification go the same way as tiles in files of their own."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from satellite import OLD_PRODUCT, PRODUCT, SENTINEL2, checkpoint, draw_dn, features, geotiff
from torchvision.transforms.v2.functional import center_crop, resize
from whole import Jobs

from pipeline import models

pytestmark = pytest.mark.slow

SIDE = 64
SPECS = Path(models.__file__).parent / "input_specs"


def command(tmp_path: Path, folder: Path, output: str, *more: object) -> list[object]:
    network = ("--model", "timm:resnet18", "--weights", tmp_path / "w.pth", "--input-spec", "sentinel2-all")
    return ["embed", "--input", folder, "--output", tmp_path / output, *network, "--precision", "float32", *more]


def rows_of(output: Path, *keys: str) -> dict[tuple[object, ...], np.ndarray]:
    table = pd.read_parquet(output)
    return dict(zip(table[list(keys)].itertuples(index=False, name=None), table["embedding"], strict=True))


@pytest.mark.parametrize(("product", "offset"), [pytest.param(OLD_PRODUCT, 0, marks=pytest.mark.long), (PRODUCT, 1000)])
def test_windows_give_the_embeddings_of_tiles_and_of_timm(
    jobs: Jobs, tmp_path: Path, product: str, offset: int
) -> None:
    array = draw_dn(side=3 * SIDE)
    array[:, :20, :30] = 0  # no data, although the file does not say so
    stored = np.where(array, array + offset, 0).astype(np.uint16)
    scenes, tiles = tmp_path / "scenes" / product, tmp_path / "tiles" / product
    scenes.mkdir(parents=True)
    tiles.mkdir(parents=True)
    (scenes / "a.tif").write_bytes(geotiff(stored[::-1], SENTINEL2[::-1], tiled=True, blockxsize=64, blockysize=64))
    windows = {}
    for row in range(0, 3 * SIDE, SIDE):
        for column in range(0, 3 * SIDE, SIDE):
            windows[column, row] = array[:, row : row + SIDE, column : column + SIDE]
            tile = stored[:, row : row + SIDE, column : column + SIDE]
            (tiles / f"{column}-{row}.tif").write_bytes(geotiff(tile, SENTINEL2))
    network = checkpoint(tmp_path / "w.pth", 13)
    done = jobs.run(*command(tmp_path, tmp_path / "scenes", "of-scenes", "--tile-size", SIDE))
    assert "9 of 9 planned: 9 rows, 0 errors" in done.stdout
    assert f"Sentinel-2: {'the offset of 1000' if offset else 'no offset'} is subtracted, by processing" in done.stderr
    jobs.run(*command(tmp_path, tmp_path / "tiles", "of-tiles"))
    of_scenes = rows_of(tmp_path / "of-scenes", "window_col", "window_row")
    of_tiles = rows_of(tmp_path / "of-tiles", "source")
    assert of_scenes.keys() == windows.keys()
    for (column, row), window in windows.items():
        x = torch.from_numpy(window.astype(np.float32))
        expected = features(network, center_crop(resize(x, [256, 256], antialias=True), [224, 224]) / 10_000)
        np.testing.assert_allclose(of_scenes[column, row], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(of_scenes[column, row], of_tiles[(f"{tiles}/{column}-{row}.tif",)], 1e-4, 1e-4)


@pytest.mark.parametrize(
    ("names", "product", "more", "message"),
    [
        ((*SENTINEL2[:12], "B99"), OLD_PRODUCT, (), "lacks B12 of the input specification (its bands: B1, B2, "),
        (SENTINEL2, "scene", (), "nothing says whether the numbers of "),
        ((), OLD_PRODUCT, ("--bands", "1,2,3"), "--bands is '1,2,3': the network takes 13 bands"),
        (SENTINEL2[:12], OLD_PRODUCT, (), "lacks B12 of the input specification"),
        ((), OLD_PRODUCT, (), "gives 12 bands, and the network takes 13"),
    ],
)
def test_scenes_that_would_be_read_wrongly_end_with_2(
    jobs: Jobs, tmp_path: Path, names: tuple[str, ...], product: str, more: tuple[object, ...], message: str
) -> None:
    folder = tmp_path / "in" / product
    folder.mkdir(parents=True)
    bands = 12 if len(names) in (0, 12) else 13
    (folder / "a.tif").write_bytes(geotiff(draw_dn(bands), names))
    checkpoint(tmp_path / "w.pth", 13)
    refused = jobs.run(*command(tmp_path, folder, "out", "--tile-size", 32, *more), code=2)
    assert message in refused.stderr
    assert not (tmp_path / "out").exists()


def test_unnamed_bands_are_said_and_bands_choose(jobs: Jobs, tmp_path: Path) -> None:
    array = draw_dn(13)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"{OLD_PRODUCT}.tif").write_bytes(geotiff(array))
    checkpoint(tmp_path / "w.pth", 13)
    done = jobs.run(*command(tmp_path, tmp_path / "in", "out", "--tile-size", 64))
    assert "does not name its bands, so they are taken in this order: 1 is B1, 2 is B2" in done.stderr
    own = tmp_path / "own.yaml"
    own.write_text((SPECS / "sentinel2-all.yaml").read_text().replace("10000", "5000"))
    refused = jobs.run(*command(tmp_path, tmp_path / "in", "out", "--tile-size", 64, "--input-spec", own), code=2)
    assert "belongs to a run with other settings: " in refused.stderr
    assert "5000.0" in refused.stderr
    refused = jobs.run(*command(tmp_path, tmp_path / "in", "out", "--tile-size", 64, "--tile-stride", 32), code=2)
    assert "belongs to a run with other settings: tiling was" in refused.stderr
