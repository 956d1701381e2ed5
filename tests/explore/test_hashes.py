"""Duplicates by perceptual hashes: all pairs within a distance, groups, and runs with `--phash`."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from outputs import run_here, write_output
from PIL import Image
from tile_archives import square, tile_image, write_mbtiles

from jobs import duplicates as job
from jobs import verify
from pipeline import Embedder, RunConfig, open_output
from pipeline.errors import OutputRefused, SettingRefused
from pipeline.explore.hashes import duplicates_by_hash
from pipeline.explore.table import Output

ROWS = 900


def flipped(value: int, bits: list[int]) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value if value < 1 << 63 else value - (1 << 64)


def hashed(folder: Path, hashes: list[int | None]) -> Output:
    ids = [f"/photos/{number:05d}.jpg" for number in range(len(hashes))]
    vectors = np.zeros((len(hashes), 2), np.float32)
    return open_output(str(write_output(folder, ids, vectors, kept={"phash": hashes}, rows_per_part=97)))


def groups_of(output: Output, **settings: object) -> list[list[int]]:
    rows = duplicates_by_hash(output, **settings).table.to_pylist()  # type: ignore[arg-type]
    groups: dict[int, list[int]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(int(row["image_id"][-9:-4]))
    return list(groups.values())


@pytest.mark.parametrize("distance", [0, 1, 4, 7, 10])
def test_all_hashes_within_the_distance_are_found(tmp_path: Path, distance: int) -> None:
    """Random hashes, and copies of some that differ in 0 to 12 bits, of which the sign is one."""
    rng = np.random.default_rng(distance)
    hashes = [int(value) for value in rng.integers(0, 1 << 64, ROWS, np.uint64)]
    bits = [rng.choice(64, number % 13, replace=False).tolist() for number in range(130)]
    copies = [flipped(hashes[number], bits[number]) for number in range(130)]
    output = hashed(tmp_path / "out", [flipped(value, []) for value in hashes] + copies)
    expected = [[number, ROWS + number] for number in range(130) if number % 13 <= distance]
    assert groups_of(output, distance=distance) == expected


def test_copies_of_one_hash_and_near_ones_are_one_group(tmp_path: Path) -> None:
    output = hashed(tmp_path / "out", [5, -1, 7, 5, None, None, -1, 5 | 1 << 40])
    result = duplicates_by_hash(output, distance=1)
    assert groups_of(output, distance=1) == [[0, 2, 3, 7], [1, 6]]
    similarities = result.table["similarity"].to_pylist()
    assert similarities == [1.0, 1 - 1 / 64, 1.0, 1 - 1 / 64, 1.0, 1.0]
    assert "2 images of one colour have no hash" in result.describe()
    assert json.loads(result.table.schema.metadata[b"nightshift"])["distance"] == 1
    assert groups_of(output, distance=0) == [[0, 3], [1, 6]]


def test_no_chain_joins_hashes_that_differ(tmp_path: Path) -> None:
    output = hashed(tmp_path / "out", [0b0, 0b11, 0b1111, 0b111111])
    assert groups_of(output, distance=2) == [[0, 1], [2, 3]]


def test_settings_that_cannot_work_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = hashed(tmp_path / "out", [1, 2, 3])
    for distance in (-1, 11):
        with pytest.raises(SettingRefused, match=f"--distance is {distance}: it must be a number of bits from 0 to 10"):
            duplicates_by_hash(output, distance=distance)
    plain = write_output(tmp_path / "plain", ["/a", "/b"], np.eye(2, dtype=np.float32))
    with pytest.raises(OutputRefused, match="has no column phash of int64: run its job with --phash"):
        duplicates_by_hash(open_output(str(plain)))
    to = ["--to", str(tmp_path / "duplicates.parquet")]
    assert job.main([output.uri, *to, "--hash", "--threshold", "0.9"]) == 2
    assert "--threshold is for vectors: with --hash use --distance" in capsys.readouterr().err
    assert job.main([output.uri, *to, "--distance", "3"]) == 2
    assert "--distance needs --hash" in capsys.readouterr().err


def test_copies_in_an_archive_are_found_with_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run with --phash, its verification, and its groups: an exact copy, a smaller one and a JPEG of one PNG."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize((120, 90), Image.Resampling.BICUBIC).save(photos / f"{number}.png")
    (photos / "2-copy.png").write_bytes((photos / "2.png").read_bytes())
    image = Image.open(photos / "2.png")
    image.resize((80, 60)).save(photos / "2-small.png")
    image.save(photos / "2-again.jpg", quality=60)
    Image.new("RGB", (50, 50), (9, 9, 9)).save(photos / "grey.png")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    (photos / "cut.jpg").write_bytes(buffer.getvalue()[:600])
    config = RunConfig(input=str(photos), output=str(tmp_path / "out"), phash=True)
    out = run_here(config, Embedder(model="tiny:network", weights="random"))
    output = open_output(out)
    assert output.settings["phash"] is True
    assert output.columns[-1] == "phash"
    assert verify.main([out]) == 0
    to = tmp_path / "duplicates.parquet"
    capsys.readouterr()
    assert job.main([out, "--to", str(to), "--hash", "--keep", "largest", "--quiet"]) == 0
    assert "1 groups with 4 of 10 images" in capsys.readouterr().out
    rows = pq.read_table(to).to_pylist()
    assert {Path(row["image_id"]).name for row in rows} == {"2.png", "2-copy.png", "2-small.png", "2-again.jpg"}
    assert [row["keep"] for row in rows] == [True, False, False, False]


def test_tiles_that_are_stored_once_have_the_same_hash(tmp_path: Path) -> None:
    """A tile of an MBTiles that stands at several places is decoded once; each of its rows has the hash."""
    shared = tile_image(99)
    tiles = {tile: shared if tile[1] % 2 else data for tile, data in square(3, 40).items()}
    write_mbtiles(tmp_path / "a.mbtiles", tiles, "map")
    config = RunConfig(input=str(tmp_path / "a.mbtiles"), output=str(tmp_path / "out"), phash=True)
    output = open_output(run_here(config, Embedder(model="tiny:network", weights="random")))
    hashes = [value for batch in output.batches(["phash"]) for value in batch["phash"].to_pylist()]
    assert len(hashes) == 40
    assert None not in hashes
    copies = sum(data == shared for data in tiles.values())
    result = duplicates_by_hash(output, distance=0)
    assert (result.groups, len(result.table)) == (1, copies)


def test_windows_of_scenes_have_hashes(tmp_path: Path) -> None:
    scenes = pytest.importorskip("scenes")
    array = scenes.numbers(3, 32, 64, "uint16")
    array[:, :, 32:] = array[:, :, :32]
    scenes.write(tmp_path / "a.tif", array)
    config = RunConfig(
        input=str(tmp_path / "a.tif"), output=str(tmp_path / "out"), tile_size=32, scale="0:10000", phash=True
    )
    output = open_output(run_here(config, Embedder(model="tiny:network", weights="random")))
    assert duplicates_by_hash(output).groups == 1
