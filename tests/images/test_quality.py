"""Brightness, contrast and sharpness of images, and the flags that they stand for."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scenes
from outputs import run_here
from PIL import Image, ImageFilter

from pipeline import Embedder, RunConfig, open_output
from pipeline.errors import OutputRefused
from pipeline.images import quality
from pipeline.images.quality import Quality, flags, measure
from pipeline.output.run_record import RunRecord


def tiny_embedder() -> Embedder:
    return Embedder(model="tiny:network", weights="random")


def picture(number: int = 0, width: int = 320, height: int = 240) -> Image.Image:
    """Blobs with fine noise, as a sharp photo."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(40, 216, (6, 8, 3), np.uint8)).resize((width, height))
    noise = rng.normal(0, 18, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def test_the_numbers_are_those_of_the_definition() -> None:
    grey = np.asarray(picture(1, 200, 150).convert("L"), float) / 255
    laplacian = -4 * grey[1:-1, 1:-1] + grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    expected = grey.mean(), grey.std(), laplacian.var()
    assert measure(picture(1, 200, 150)) == pytest.approx(expected, rel=1e-4)
    assert measure(np.asarray(picture(1, 200, 150))) == measure(picture(1, 200, 150))


def test_large_images_have_about_the_numbers_of_small_ones() -> None:
    small = picture(2, 298, 224)
    large = small.resize((298 * 5, 224 * 5), Image.Resampling.NEAREST)
    assert measure(large) == pytest.approx(measure(small), rel=0.02)


@pytest.mark.parametrize("size", [(1, 1), (2, 500), (3, 3)])
def test_small_and_narrow_images(size: tuple[int, int]) -> None:
    assert measure(Image.new("RGB", size, (255, 255, 255))) == (1.0, 0.0, 0.0)


def test_flags_of_planted_faults() -> None:
    images = {
        "good": picture(),
        "dark": picture().point(lambda value: value // 8),
        "bright": picture().point(lambda value: 240 + value // 16),
        "low_contrast": picture().point(lambda value: 120 + value // 32),
        "blurred": picture().filter(ImageFilter.GaussianBlur(4)),
        "tiny": picture(0, 60, 80),
    }
    rows = [
        {"name": name, "width": image.width, "height": image.height, **Quality()(image)}
        for name, image in images.items()
    ]
    found = flags(pa.Table.from_pylist([*rows, dict.fromkeys(rows[0])]))
    assert tuple(found) == quality.FLAGS
    assert not any(has[-1] for has in found.values()), "a row of nulls"
    of_image = {row["name"]: {name for name, has in found.items() if has[number]} for number, row in enumerate(rows)}
    assert of_image["good"] == set()
    for name in ("dark", "bright", "low_contrast", "blurred", "tiny"):
        assert name in of_image[name], name
    assert of_image["blurred"] == {"blurred"}
    assert of_image["tiny"] == {"tiny"}


def write_archive(folder: Path) -> Path:
    folder.mkdir()
    for number in range(6):
        image = picture(number) if number else picture().point(lambda value: value // 8)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        (folder / f"{number}.png").write_bytes(buffer.getvalue())
    return folder


def test_a_run_writes_the_columns_and_analyze_counts_them(tmp_path: Path) -> None:
    config = RunConfig(str(write_archive(tmp_path / "in")), str(tmp_path / "out"), quality=True, decoder="exact")
    embedder = tiny_embedder()
    output = open_output(run_here(config, embedder))
    rows = output.take(np.arange(6), ["image_id", *quality.COLUMNS.names]).to_pylist()
    for row in rows:
        expected = measure(Image.open(row["image_id"]).convert("RGB"))
        assert [row[name] for name in quality.COLUMNS.names] == pytest.approx(list(expected), rel=1e-5)
    assert output.schema.field(quality.SHARPNESS).type == pa.float32()
    figures = output.analyze().figures
    assert figures["quality"]["dark"] == 1
    assert not any("--quality" in note for note in figures["notes"])
    plain = RunConfig(config.input, config.output, decoder="exact")
    assert RunRecord.of(plain, embedder).embedding_space == RunRecord.of(config, embedder).embedding_space
    assert RunRecord.of(plain, embedder).fingerprint != RunRecord.of(config, embedder).fingerprint
    with pytest.raises(OutputRefused, match="quality was true and is not set"):
        run_here(plain, tiny_embedder())


def test_windows_of_a_scene_have_numbers_of_their_own(tmp_path: Path) -> None:
    array = scenes.numbers(3, 64, 96)
    array[:, :32, :32] = 3
    scenes.write(tmp_path / "in" / "a.tif", array)
    config = RunConfig(str(tmp_path / "in"), str(tmp_path / "out"), quality=True, tile_size=32)
    output = open_output(run_here(config, tiny_embedder()))
    rows = output.take(np.arange(output.rows), ["member", *quality.COLUMNS.names]).to_pylist()
    assert len(rows) == 6
    assert rows[0]["quality_contrast"] == 0
    assert rows[0]["quality_brightness"] == pytest.approx(3 / 255, abs=1e-3)
    assert min(row["quality_contrast"] for row in rows[1:]) > 0.01
