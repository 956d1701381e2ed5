"""Maps: each pixel is the result of the window at its place, on the scene's own grid."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import scenes
from affine import Affine
from scene_outputs import LABELS, NAMES, VECTORS, Place, label, write_output

from pipeline.errors import InputRefused, OutputRefused, SettingRefused
from pipeline.explore.map import write_map
from pipeline.geo.windows import Tiling

SOUTH_UP = Affine(10, 0, 500_000, 0, 10, 4_500_000)
ROTATED = Affine(8, 5, 500_000, 5, -8, 4_500_000)


def scene(path: Path, height: int = 130, width: int = 205, **more: Any) -> Path:
    return scenes.write(path, scenes.numbers(3, height, width), **more)


def checkers(place: Place) -> dict[str, Any]:
    return label((place.across + 2 * place.down) % 5, 0.25 + place.across / 100)


def mapped(tmp_path: Path, result: Callable[[Place], Any] = checkers, size: int = 32, **more: Any) -> Any:
    """The open map of one scene. more: of the tiling, of the scene (height, width, transform, crs) and `show`."""
    tiling = {name: more.pop(name) for name in ("stride", "edge", "resolution") if name in more}
    show, columns = more.pop("show", "class"), more.pop("columns", LABELS)
    path = scene(tmp_path / "in" / "a.tif", **more)
    how = Tiling(**{"size": size, "stride": size, **tiling})
    out = write_output(tmp_path / "out", [path], how, result, columns)
    write_map(str(out), tmp_path / "map.tif", show=show)
    return rasterio.open(tmp_path / "map.tif")


PLACED = [
    ({}, "north-up UTM, not square"),
    ({"transform": SOUTH_UP}, "south-up"),
    ({"transform": ROTATED}, "rotated"),
    ({"transform": Affine(0.001, 0, 7, 0, -0.002, 47), "crs": "EPSG:4326"}, "degrees, pixels not square"),
    ({"transform": None, "crs": None}, "no CRS"),
    ({"height": 300, "width": 40}, "tall"),
    ({"edge": "drop"}, "without the rest"),
]


@pytest.mark.parametrize(("more", "name"), PLACED, ids=[name for _, name in PLACED])
def test_each_pixel_is_the_label_of_its_window(tmp_path: Path, more: dict[str, Any], name: str) -> None:
    with mapped(tmp_path, **more) as file, rasterio.open(tmp_path / "in" / "a.tif") as source:
        data = file.read(1)
        assert file.crs == source.crs
        assert file.shape == (-(-source.height // 32), -(-source.width // 32))
        assert file.nodata == 255
        a, b, c, d, e, f = tuple(source.transform)[:6]
        assert tuple(file.transform)[:6] == pytest.approx((32 * a, 32 * b, c, 32 * d, 32 * e, f), rel=1e-12)
        for row in range(file.height):
            for column in range(file.width):
                is_whole = (column + 1) * 32 <= source.width and (row + 1) * 32 <= source.height
                expected = (column + 2 * row) % 5 if is_whole or more.get("edge") != "drop" else 255
                assert data[row, column] == expected
                x, y = source.xy(row * 32 + 15.5, column * 32 + 15.5)  # the centre of the window, found on the map
                assert file.index(x, y) == (row, column)


def test_colours_names_and_metadata(tmp_path: Path) -> None:
    with mapped(tmp_path) as file:
        table = file.colormap(1)
        assert table[0] == (0, 114, 178, 255)
        assert len({table[label] for label in range(5)}) == 5
        assert file.descriptions == ("class (label_id)",)
        assert file.tags(1)["CLASS_3"] == "field"
        assert file.tags()["SCENE"].endswith("in/a.tif")
        assert file.tags()["MODEL"] == "tiny"
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert file.tags(ns="IMAGE_STRUCTURE")["COMPRESSION"] == "DEFLATE"
        assert file.dtypes == ("uint8",)
    text = (tmp_path / "map.tif.aux.xml").read_text()
    assert [name for name in NAMES if f"<Category>{name}</Category>" in text] == list(NAMES[:5])


COLORS = {name: (number, 20, 30) for number, name in enumerate(NAMES)}


def test_given_colours(tmp_path: Path) -> None:
    path = scene(tmp_path / "in" / "a.tif", 64, 64)
    out = str(write_output(tmp_path / "out", [path], scenes.tiling(32), checkers))
    result = write_map(out, tmp_path / "map.tif", colors={**COLORS, "of another scene": (9, 9, 9)})
    assert result.colors == {label: (label, 20, 30) for label in range(4)}
    with rasterio.open(tmp_path / "map.tif") as file:
        assert [file.colormap(1)[label] for label in range(4)] == [(label, 20, 30, 255) for label in range(4)]
    with pytest.raises(SettingRefused, match="no color for 2 classes of the map; add a line for: field, forest"):
        write_map(out, tmp_path / "b.tif", colors={"water": (0, 0, 0), "urban": (0, 0, 0)})
    with pytest.raises(SettingRefused, match="--show score has no classes"):
        write_map(out, tmp_path / "b.tif", show="score", colors=COLORS)
    assert not (tmp_path / "b.tif").exists()


def test_classes_from_vectors_lie_on_the_scenes_of_the_vectors(tmp_path: Path) -> None:
    """`classify --from` plans the parts of another output, whose plan has the scenes."""
    path = scene(tmp_path / "in" / "a.tif", 64, 64)
    embeddings = write_output(tmp_path / "embeddings", [path], scenes.tiling(32), vector, VECTORS)
    labels = write_output(tmp_path / "labels", [path], scenes.tiling(32), checkers)
    record = {"fingerprint": "f", "settings": {"vectors": True, "input": [str(embeddings)]}}
    (labels / "_run.json").write_text(json.dumps(record))
    shutil.rmtree(labels / "_plan")
    write_map(str(labels), tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.read(1).tolist() == [[0, 1], [2, 3]]
    shutil.rmtree(embeddings)
    with pytest.raises(InputRefused, match=r"embeddings, whose plan has the scenes, but there is no plan now"):
        write_map(str(labels), tmp_path / "map.tif", overwrite=True)


def test_windows_that_are_empty_errors_or_missing_have_no_data(tmp_path: Path) -> None:
    def result(place: Place) -> dict[str, Any] | None:
        if place.across == 2:
            return None
        return {"error_type": "corrupt", "stage": "read"} if place.across == 4 else checkers(place)

    with mapped(tmp_path, result) as file:
        data = file.read(1)
        assert (data[:, [2, 4]] == 255).all()
        assert (np.delete(data, [2, 4], axis=1) != 255).all()
        assert (file.dataset_mask() == 255).tolist() == (data != 255).tolist()


def test_an_output_in_mid_run(tmp_path: Path) -> None:
    path = scene(tmp_path / "in" / "a.tif")
    out = write_output(tmp_path / "out", [path], scenes.tiling(32), checkers, rows_per_part=7)
    (out / "_SUCCESS").unlink()
    for commit in sorted((out / "_commits").iterdir())[2:]:
        commit.unlink()
    result = write_map(str(out), tmp_path / "map.tif")
    assert result.pixels == 14
    assert "the run has not finished" in result.describe()
    with rasterio.open(tmp_path / "map.tif") as file:
        assert (file.read(1) != 255).sum() == 14


def share_covered(start: int, size: int, cell: int, stride: int, length: int) -> float:
    """The share of a pixel that a window covers, 0 if it does not cover its centre."""
    begin, end = cell * stride, min((cell + 1) * stride, length)
    if not start <= (begin + end) / 2 < start + size:
        return 0.0
    return (min(end, start + size) - max(begin, start)) / (end - begin)


def brute_force(given: dict[tuple[int, int], tuple[int, float]], size: int, stride: int, shape: Any) -> Any:
    """Votes, counted window by window: the class and its share of the votes of each pixel of a scene of 150 × 96."""
    winner, share = np.full(shape, 255), np.full(shape, np.nan)
    for row in range(shape[0]):
        for column in range(shape[1]):
            votes: dict[int, float] = {}
            total = 0.0
            for (across, down), (number, score) in given.items():
                weight = share_covered(across * stride, size, column, stride, 150)
                weight *= share_covered(down * stride, size, row, stride, 96)
                if weight:
                    votes[number] = votes.get(number, 0) + score * weight
                    total += weight
            if votes:
                winner[row, column] = max(votes, key=lambda number: votes[number])
                share[row, column] = votes[winner[row, column]] / total
    return winner, share


@pytest.mark.parametrize(("size", "stride"), [(32, 16), (32, 8), (30, 20)])
@pytest.mark.parametrize("show", ["class", "score"])
def test_overlapping_windows_vote_by_score(tmp_path: Path, size: int, stride: int, show: str) -> None:
    random = np.random.default_rng(1)
    given: dict[tuple[int, int], tuple[int, float]] = {}

    def result(place: Place) -> dict[str, Any] | None:
        if random.random() < 0.2:
            return None
        number, score = int(random.integers(4)), float(np.float32(random.random()))
        given[place.across, place.down] = number, score
        return label(number, score)

    with mapped(tmp_path, result, size=size, stride=stride, height=96, width=150, show=show) as file:
        data = file.read(1)
        assert file.transform.a == 10 * stride
    winner, share = brute_force(given, size, stride, data.shape)
    if show == "class":
        assert (data == winner).all()
    else:
        np.testing.assert_allclose(data, share, rtol=1e-5)


def test_the_last_windows_may_be_shifted_into_the_scene(tmp_path: Path) -> None:
    """The last column has only the shifted window; the one before is voted on by both."""
    with mapped(tmp_path, edge="shift", width=100, height=64) as file:
        assert file.shape == (2, 4)
        assert file.read(1)[0].tolist() == [0, 1, 2, 3]


def test_a_stride_that_leaves_gaps(tmp_path: Path) -> None:
    """Pixels are half a stride wide here, so that each is all window or all gap."""
    with mapped(tmp_path, size=32, stride=64, height=128, width=192) as file:
        data = file.read(1)
        assert data.shape == (4, 6)
        assert file.transform.a == 320
        assert (data[::2, ::2] != 255).all()
        assert (data != 255).sum() == 6


def test_windows_at_another_resolution(tmp_path: Path) -> None:
    """30 m from 10 m: a window of 32 pixels is 96 pixels of the scene."""
    with mapped(tmp_path, resolution=30, height=192, width=288) as file:
        assert file.shape == (2, 3)
        assert file.transform.a == 960
        assert file.read(1).tolist() == [[0, 1, 2], [2, 3, 4]]


def test_scores(tmp_path: Path) -> None:
    with mapped(tmp_path, show="score") as file:
        assert file.dtypes == ("float32",)
        assert np.isnan(file.nodata)
        np.testing.assert_allclose(file.read(1)[0], 0.25 + np.arange(7) / 100, rtol=1e-6)


def test_many_classes_have_another_number_type(tmp_path: Path) -> None:
    with mapped(tmp_path, lambda place: label(place.across * 150)) as file:
        assert (file.dtypes, file.nodata) == (("uint16",), 65535)
        assert file.read(1)[0].tolist() == [0, 150, 300, 450, 600, 750, 900]
        assert len({file.colormap(1)[number] for number in range(0, 901, 150)}) == 7
    with mapped(tmp_path / "b", lambda place: label(place.across * 20_000)) as file:
        assert (file.dtypes, file.nodata) == (("int32",), -1)
        assert file.read(1)[0, 4] == 80_000


def test_a_large_map_has_overviews_and_is_written_by_blocks(tmp_path: Path) -> None:
    with mapped(tmp_path, size=2, height=1200, width=20) as file:
        assert file.shape == (600, 10)
        assert file.block_shapes == [(512, 512)]
        assert file.overviews(1) == [2]
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        expected = (np.arange(10)[None] + 2 * np.arange(600)[:, None]) % 5
        assert (file.read(1) == expected).all()


def vector(place: Place) -> dict[str, Any]:
    """The first number grows to the east, the second, which varies less, to the south."""
    return {"embedding": [float(place.across), place.down / 2, 0.01 * (place.across % 2), 0.0]}


def test_vectors_that_are_not_finite_have_no_data(tmp_path: Path) -> None:
    def result(place: Place) -> dict[str, Any]:
        vector = [float(place.across), place.down / 2, 0.01 * (place.across % 2), 0.0]
        return {"embedding": [float("nan"), *vector[1:]] if place.across == place.down == 1 else vector}

    with mapped(tmp_path, result, show="embedding", columns=VECTORS) as file:
        alpha = file.read(4)
        assert alpha[1, 1] == 0
        assert (alpha == 0).sum() == 1


def test_embeddings_as_colours(tmp_path: Path) -> None:
    def result(place: Place) -> dict[str, Any] | None:
        return None if (place.across, place.down) == (0, 0) else vector(place)

    with mapped(tmp_path, result, show="embedding", columns=VECTORS) as file:
        red, green, _, alpha = file.read().astype(int)
        assert [role.name for role in file.colorinterp] == ["red", "green", "blue", "alpha"]
        assert "principal component 1 (" in file.descriptions[0]
        assert alpha[0, 0] == 0
        assert (alpha == 255).sum() == alpha.size - 1
        steps = np.diff(red[1:], axis=1)
        assert (steps >= 0).all() or (steps <= 0).all(), "red is the first number, which grows to the east"
        assert abs(np.diff(red[1])).sum() > 200
        assert abs(np.diff(green[:, 3])).sum() > 200
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"


def test_which_scene(tmp_path: Path) -> None:
    paths = [scene(tmp_path / "in" / "a.tif", 64, 64), scene(tmp_path / "in" / "b.tif", 64, 96)]

    def result(place: Place) -> dict[str, Any]:
        return label(3 if place.columns["scene"].endswith("b.tif") else 1)

    out = str(write_output(tmp_path / "out", paths, scenes.tiling(32), result))
    with pytest.raises(SettingRefused, match=r"has 2 scenes; choose one with --scene: .*a\.tif, .*b\.tif"):
        write_map(out, tmp_path / "map.tif")
    with pytest.raises(SettingRefused, match=r"--scene c\.tif names no scene of"):
        write_map(out, tmp_path / "map.tif", "c.tif")
    write_map(out, tmp_path / "map.tif", "b.tif")
    write_map(out, tmp_path / "other.tif", str(paths[0]))
    with rasterio.open(tmp_path / "map.tif") as file, rasterio.open(tmp_path / "other.tif") as other:
        assert (file.shape, np.unique(file.read(1)).tolist()) == ((2, 3), [3])
        assert (other.shape, np.unique(other.read(1)).tolist()) == ((2, 2), [1])


def test_refused(tmp_path: Path) -> None:
    path = scene(tmp_path / "in" / "a.tif", 64, 64)
    out = str(write_output(tmp_path / "out", [path], scenes.tiling(32), checkers))
    to = tmp_path / "map.tif"
    with pytest.raises(SettingRefused, match="--show is 'x'"):
        write_map(out, to, show="x")
    with pytest.raises(OutputRefused, match="has no column embedding"):
        write_map(out, to, show="embedding")
    with pytest.raises(SettingRefused, match=r"must end with \.tif"):
        write_map(out, tmp_path / "map.png")
    with pytest.raises(SettingRefused, match="is a URI"):
        write_map(out, Path("s3://bucket/map.tif"))
    with pytest.raises(SettingRefused, match="there is no folder"):
        write_map(out, tmp_path / "none" / "map.tif")
    with pytest.raises(SettingRefused, match="is the scene itself"):
        write_map(out, path, overwrite=True)
    with pytest.raises(InputRefused, match="is not an output"):
        write_map(str(tmp_path), to)
    write_map(out, to)
    before = to.read_bytes()
    with pytest.raises(SettingRefused, match="exists; choose another name or add --overwrite"):
        write_map(out, to)
    write_map(out, to, overwrite=True)
    assert to.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "map.tif", "map.tif.aux.xml", "out"]


def test_negative_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputRefused, match="a score that is negative or missing"):
        mapped(tmp_path, lambda place: label(1, -0.5))


def test_rows_of_another_plan_are_refused(tmp_path: Path) -> None:
    path = scene(tmp_path / "in" / "a.tif", 64, 64)

    def result(place: Place) -> dict[str, Any]:
        return {**checkers(place), "window_col": place.columns["window_col"] + 1}

    out = write_output(tmp_path / "out", [path], scenes.tiling(32), result)
    with pytest.raises(OutputRefused, match="rows that are no windows of its plan"):
        write_map(str(out), tmp_path / "map.tif")
