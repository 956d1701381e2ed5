"""Folders of tiles as a template, on disk and in a bucket."""

from pathlib import Path

import pytest
from servers import S3Server
from tile_archives import Tile, square, tile_image

from pipeline import sources
from pipeline.config import RunConfig
from pipeline.coverage import END
from pipeline.errors import InputRefused
from pipeline.planning.archive import Archive
from pipeline.sources import ReadOptions, Record
from pipeline.storage import access

TILES = {**square(3, 20), **square(11, 3, 100), (2, 1, 2): tile_image(500)}


def fill(base: str, template: str = "{z}/{x}/{y}.png", tiles: dict[Tile, bytes] = TILES) -> str:
    """Write tiles; return the template. `{-y}` is the y of TMS."""
    for (z, x, y), data in tiles.items():
        fields = {"{z}": z, "{x}": x, "{y}": y, "{-y}": (1 << z) - 1 - y}
        name = template
        for field, value in fields.items():
            name = name.replace(field, str(value))
        access.write(f"{base}/{name}", data)
    return f"{base}/{template}"


def found(*inputs: str, **settings: str) -> dict[tuple[int | None, ...], bytes]:
    archive = Archive(RunConfig(input=inputs, output="/none", **settings))  # type: ignore[arg-type]
    tiles: dict[tuple[int | None, ...], bytes] = {}
    for shard in archive.shards():
        for item in sources.read(shard, ((0, END),), archive.options()):
            if isinstance(item, Record):
                assert item.member is None
                assert item.image_id == item.source
                assert isinstance(item.data, bytes)
                tiles[tuple(item.kept.get(name) for name in ("tile_z", "tile_x", "tile_y"))] = item.data
    return tiles


@pytest.mark.parametrize(
    "template", ["{z}/{x}/{y}.png", "{z}/{x}/{-y}.png", "{z}/{y}/{x}.png", "z{z}-{x}_{y}@2x.png", "a/{y}/b/{x}.{z}.png"]
)
def test_every_order_of_the_fields(tmp_path: Path, template: str) -> None:
    assert found(fill(str(tmp_path / "in"), template)) == TILES


def test_a_selection_lists_only_its_zooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = fill(str(tmp_path / "in"))
    listed: list[str] = []
    real = access.list_objects
    monkeypatch.setattr(access, "list_objects", lambda uri: listed.append(uri) or real(uri))  # type: ignore[func-returns-value]
    assert found(template, zoom="2:3") == {tile: data for tile, data in TILES.items() if tile[0] in (2, 3)}
    assert set(listed) == {f"{tmp_path}/in/2", f"{tmp_path}/in/3"}
    assert found(template, bbox="-180,45,-90,85", zoom="3") == {
        tile: data for tile, data in TILES.items() if tile[0] == 3 and tile[1] < 2 and tile[2] < 3
    }


@pytest.mark.parametrize("digits", [2, 3])
def test_numbers_with_zeros_in_front(tmp_path: Path, digits: int) -> None:
    """`003/001/7.png`: a folder of each zoom is found, whichever way it is written."""
    for (z, x, y), data in TILES.items():
        access.write(f"{tmp_path}/in/{z:0{digits}}/{x:03}/{y:012}.png", data)
    template = f"{tmp_path}/in/{{z}}/{{x}}/{{y}}.png"
    assert found(template) == TILES
    assert found(template, zoom="3") == square(3, 20)
    assert found(template, zoom="2:11") == TILES


def test_files_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    template = fill(str(tmp_path / "in"))
    for name in ("3/0/0.jpg", "3/0/legend.png", "00003/0/0.png", "readme.txt"):
        access.write(f"{tmp_path}/in/{name}", b"1")
    archive = Archive(RunConfig(input=(template,), output="/none"))
    assert sum(shard.rows or 0 for shard in archive.shards()) == len(TILES)
    counts = {".jpg": 1, ".png": 2, ".txt": 1}
    assert archive.left_out.counts == {f"{suffix} beside the template": count for suffix, count in counts.items()}
    assert len(found(template, str(tmp_path / "in"))) == len(TILES) + 1  # the folder's other images have no tile


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("3/01/2", "3/1/2"), "1"),
        (("3/1/2", "3/1/02"), "2"),
        (("03/1/2", "3/1/2"), "3"),
        (("11/100/2", "11/12/1", "11/012/1"), "12"),
        (("3/0/5", "3/1/05", "3/2/1"), "5"),
    ],
)
def test_a_number_that_is_written_in_two_ways_is_refused(tmp_path: Path, names: tuple[str, ...], text: str) -> None:
    for name in names:
        access.write(f"{tmp_path}/in/{name}.png", b"1")
    for settings in ({}, {"zoom": "3:11"}):
        with pytest.raises(InputRefused, match=rf"has the number 0?{text}, and other tiles of zoom \d+ write such"):
            found(f"{tmp_path}/in/{{z}}/{{x}}/{{y}}.png", **settings)


def test_in_a_bucket(s3: S3Server) -> None:
    template = fill(s3.uri("template"))
    assert found(template) == TILES
    assert found(template, zoom="11") == {tile: data for tile, data in TILES.items() if tile[0] == 11}


def test_braces_are_expanded_beside_the_fields(tmp_path: Path) -> None:
    for year, format in ((2023, "png"), (2024, "jpg")):
        fill(f"{tmp_path}/{year}", f"{{z}}/{{x}}/{{y}}.{format}", square(1, 2, year))
    inputs = [f"{tmp_path}/{{2023..2024}}/{{z}}/{{x}}/{{y}}.{{png,jpg}}"]
    with pytest.raises(InputRefused, match=r"2023/\{z\}/\{x\}/\{y\}\.jpg matches no tiles"):
        found(*inputs)
    (tmp_path / "2023/1/0/1.jpg").write_bytes(b"1")
    (tmp_path / "2024/1/0/1.png").write_bytes(b"1")
    (shard,) = Archive(RunConfig(input=inputs, output="/none")).shards()
    assert shard.rows == 6


def test_a_tile_beside_other_images(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(b"photo")
    template = fill(str(tmp_path / "in"), tiles=square(1, 1))
    assert found(str(tmp_path / "photos"), template) == {**square(1, 1), (None, None, None): b"photo"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("in/{z}/{x}.png", r"has \{z\}, \{x\} and \{y\}"),
        ("in/{z}/{x}/{y}/{y}.png", r"has \{z\}, \{x\} and \{y\}"),
        ("in/{z}/{x}/{y}.pbf", "ends as an image does"),
        ("in/{z}/{x}/{y}", "ends as an image does"),
        ("in*/{z}/{x}/{y}.png", r"has no \* \? \["),
        ("none/{z}/{x}/{y}.png", "does not exist"),
        ("in/{z}/{x}/{y}.webp", "matches no tiles"),
        ("in/{x}/{z}/{y}.png", "is no tile, at zoom"),
    ],
)
def test_templates_that_cannot_work_are_refused(tmp_path: Path, template: str, message: str) -> None:
    fill(str(tmp_path / "in"))
    with pytest.raises(InputRefused, match=message):
        found(f"{tmp_path}/{template}")


def test_a_template_on_the_web_is_refused() -> None:
    with pytest.raises(InputRefused, match="a web server does not list its tiles"):
        found("https://tile.example.org/{z}/{x}/{y}.png")


def test_a_local_file_of_that_name_is_no_template(tmp_path: Path) -> None:
    folder = tmp_path / "{z}" / "{x}"
    folder.mkdir(parents=True)
    (folder / "{y}.png").write_bytes(b"1")
    assert found(f"{folder}/{{y}}.png") == {(None, None, None): b"1"}
    assert ReadOptions().selection.is_all
