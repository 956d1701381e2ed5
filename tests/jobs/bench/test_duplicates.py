"""Planted copies, and the figures of what was found of them."""

from pathlib import Path

import images
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.bench import duplicates as bench


def test_copies_are_named_after_their_photos(tmp_path: Path) -> None:
    photos = []
    for number in range(12):
        photos.append(tmp_path / f"{number}.jpg")
        photos[-1].write_bytes(images.encode(images.tile("urban", number, (80, 60))))
    count = bench.plant(photos, tmp_path / "a", 3)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 12 + count
    assert count >= 8
    assert {name.split(".")[1] for name in names} == {"original", *bench.KINDS}
    assert bench.plant(photos, tmp_path / "b", 3) == count
    assert bench.plant(photos, tmp_path / "c", 4) != count


def test_the_figures_count_pairs(tmp_path: Path) -> None:
    names = ["a.original.jpg", "a.resized.jpg", "a.cropped.jpg", "b.original.jpg", "c.original.jpg", "c.resized.jpg"]
    found = [("a.original.jpg", 0), ("a.resized.jpg", 0), ("b.original.jpg", 1), ("c.original.jpg", 1)]
    table = pa.table({"image_id": [f"/p/{name}" for name, _ in found], "group": [group for _, group in found]})
    pq.write_table(table, tmp_path / "found.parquet")
    figures = bench.scores(names, tmp_path / "found.parquet")
    assert figures["precision"] == 1 / 2
    assert figures["recall"] == 1 / 4
    assert figures["f1"] == pytest.approx(1 / 3)
    assert figures["kinds"].startswith("resized 0.500, recompressed 0.000, cropped 0.000")
