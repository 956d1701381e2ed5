"""STAC as --input: collections, single items, catalogs, NDJSON and stac-geoparquet, and what is chosen of them."""

import json
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pystac
import pytest
from items import asset, band, collection, grid, item, write_safe
from scenes import counting_server, numbers, windows_of, write
from servers import S3Server

from pipeline.config import RunConfig
from pipeline.errors import InputRefused, SettingRefused
from pipeline.models import input_spec
from pipeline.planning import plan as plans
from pipeline.planning import stac
from pipeline.planning.archive import Archive
from pipeline.planning.update import Change
from pipeline.sources.scene import Scene
from pipeline.sources.shard import Shard
from pipeline.storage import access

RED_NIR = "bands: [red, nir]\npixels: float32\ndivisor: 10000\ncrop: 64\n"


def archive_of(*inputs: object, **settings: Any) -> Archive:
    return Archive(RunConfig(input=list(map(str, inputs)), output="/none", **{"tile_size": 64, **settings}))


def planned(*inputs: object, **settings: Any) -> list[Shard]:
    return list(archive_of(*inputs, **settings).shards())


def payload(shard: Shard) -> Scene:
    assert isinstance(shard.payload, Scene)
    return shard.payload


def with_files(folder: Path, *names: str) -> dict[str, Any]:
    """Assets of one band each, of 10 m, with relative hrefs."""
    for name in names:
        write(folder / f"{name}.tif", band(name, 640), grid(10), "EPSG:32633")
    return {{"B04": "red", "B08": "nir"}.get(name, name): asset(f"./{name}.tif", name) for name in names}


@pytest.fixture
def assets(tmp_path: Path) -> dict[str, Any]:
    return with_files(tmp_path, "B04", "B08", "B02")


def save(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text(collection(items))
    return path


def test_an_item_collection_becomes_windows_with_the_columns_of_its_items(
    tmp_path: Path, assets: dict[str, Any]
) -> None:
    thumbnail = {"href": "t.jpg", "type": "image/jpeg", "roles": ["thumbnail"]}
    items = [item("b", {**assets, "thumbnail": thumbnail}), item("a", assets, time="2024-01-02T03:04:05.5+01:00")]
    path = save(tmp_path / "items.json", items)
    shards = planned(path, assets="red,nir")
    assert [shard.uri for shard in shards] == [f"{path}#a", f"{path}#b"]
    assert [shard.kind for shard in shards] == ["stac"] * 2
    (record,) = windows_of(shards[0])
    assert record.image_id == f"{path}#a#0,0"
    assert record.kept["item_id"] == "a"
    assert record.kept["datetime"] == datetime(2024, 1, 2, 2, 4, 5, 500_000, UTC)
    assert record.kept["eo:cloud_cover"] == np.float32(12.3)
    expected = np.concatenate([band("B04", 640), band("B08", 640)]).transpose(1, 2, 0)
    np.testing.assert_array_equal(record.data, expected)
    archive = archive_of(path, assets="red,nir")
    list(archive.shards())
    assert archive.keep_types["datetime"] == pa.timestamp("us", "UTC")
    assert archive.keep_types["eo:cloud_cover"] == pa.float32()


@pytest.mark.parametrize("names", ["red,nir", "B04,B08", "nir,red"])
def test_assets_by_key_and_by_the_names_of_bands(tmp_path: Path, assets: dict[str, Any], names: str) -> None:
    keys = {f"asset-{key}": each for key, each in assets.items()}
    for given in (assets, keys):
        path = save(tmp_path / "items.json", [item("a", given)])
        (shard,) = planned(path, assets=names)
        order = ["B08", "B04"] if names.startswith("nir") else ["B04", "B08"]
        assert [Path(file.uri).stem for file in payload(shard).files] == order


def test_the_bands_of_a_specification_choose_the_assets(tmp_path: Path, assets: dict[str, Any]) -> None:
    (tmp_path / "own.yaml").write_text(RED_NIR)
    spec = input_spec.load(str(tmp_path / "own.yaml"))
    visual = asset("v.tif", "B04", "B03", "B02", roles=["visual"])
    path = save(tmp_path / "items.json", [item("a", {"visual": visual, **dict(reversed(assets.items()))})])
    archive = archive_of(path)
    archive.use_bands(spec.bands, "")
    (shard,) = archive.shards()
    (record,) = windows_of(shard, wanted=spec.bands, network_bands=2)
    expected = np.concatenate([band("B04", 640), band("B08", 640)]).transpose(1, 2, 0)
    np.testing.assert_array_equal(record.data, expected)
    archive = archive_of(save(tmp_path / "items.json", [item("a", {"nir": assets["nir"]})]))
    archive.use_bands(spec.bands, "")
    with pytest.raises(InputRefused, match=r"#a has no asset for red \(its assets: nir\); choose with --assets"):
        list(archive.shards())


@pytest.mark.parametrize(("nodata", "share"), [(0, 0.5), (-9999, 1), (None, 1)])
def test_zero_is_no_data_if_the_item_says_so(tmp_path: Path, nodata: int | None, share: float) -> None:
    array = numbers(1, 64, 64, "uint16")
    array[:, :32] = 0
    write(tmp_path / "red.tif", array)
    red = {**asset("red.tif", "red"), "raster:bands": [{"nodata": nodata}]}
    path = save(tmp_path / "items.json", [item("a", {"red": red})])
    archive = archive_of(path)
    (shard,) = archive.shards()
    (record,) = windows_of(shard)
    assert record.kept["valid_fraction"] == share
    assert any("value of no data" in line for line in archive.notices.lines()) == (nodata == -9999)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"roles": 5}, "the roles of an asset are 5, no list of names"),
        ({"roles": [["data"]]}, "the roles of an asset are"),
        ({"nodata": {}}, "nodata of an asset or band is {}, no number"),
        ({"raster:bands": [{"nodata": [0]}]}, r"nodata of an asset or band is \[0\], no number"),
        ({"raster:bands": 5}, "raster:bands of an asset is no list of objects"),
        ({"eo:bands": [{"name": 5}]}, "name of an asset or band is 5, no text"),
        ({"bands": [{"eo:common_name": ["red"]}]}, "eo:common_name of an asset or band is"),
        ({"type": 7}, "type of an asset or band is 7, no text"),
    ],
)
def test_an_item_with_values_of_another_type_is_an_error(
    tmp_path: Path, assets: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    bad = {**assets["red"], **more}
    path = save(tmp_path / "items.json", [item("a", {"red": bad}), item("b", {"red": assets["red"]})])
    first, second = planned(path, assets="red")
    assert payload(second).fault is None
    assert payload(first).fault is not None
    with pytest.raises(InputRefused, match=message):
        planned(save(tmp_path / "items.json", [item("a", {"red": bad})]), assets="red")


def test_a_time_outside_of_the_calendar_is_an_error(tmp_path: Path, assets: dict[str, Any]) -> None:
    items = [item("a", assets, time="0001-01-01T00:00:00+14:00"), item("b", assets)]
    first, second = planned(save(tmp_path / "items.json", items), assets="red")
    assert payload(first).fault is not None
    assert payload(second).fault is None


def test_an_asset_of_several_bands_has_the_names_of_the_item(tmp_path: Path) -> None:
    array = numbers(3, 64, 64, "uint16")
    write(tmp_path / "all.tif", array)
    new = {
        "href": "all.tif",
        "type": "image/tiff",
        "bands": [{"name": "x"}, {"eo:common_name": "nir"}, {"name": "red"}],
    }
    path = save(tmp_path / "items.json", [item("a", {"data": new})])
    (shard,) = planned(path, bands="red,nir")
    (record,) = windows_of(shard, bands=("red", "nir"))
    np.testing.assert_array_equal(record.data, array[[2, 1]].transpose(1, 2, 0))
    path = save(tmp_path / "items.json", [item("a", {"data": {**new, "bands": new["bands"][:2]}})])
    with pytest.raises(InputRefused, match=r"all\.tif has 3 bands, and its item names 2 in asset data"):
        planned(path)


def test_what_to_choose_must_be_clear(tmp_path: Path, assets: dict[str, Any]) -> None:
    path = save(tmp_path / "items.json", [item("a", assets)])
    with pytest.raises(InputRefused, match="#a has the assets B02, nir, red; choose with --assets"):
        planned(path)
    twice = {"one": assets["red"], "other": {**assets["red"], "href": "B08.tif"}}
    with pytest.raises(InputRefused, match="has several assets of one band, one, other; choose with --assets"):
        planned(save(tmp_path / "items.json", [item("a", twice)]), assets="B04")
    with pytest.raises(InputRefused, match=r"--input .*items\.json is read as STAC items, .* give --tile-size"):
        planned(path, tile_size=None)


# The kinds of files


def test_a_single_item_lines_of_items_and_a_glob(tmp_path: Path, assets: dict[str, Any]) -> None:
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps(item(name, assets)))
    assert [shard.uri for shard in planned(tmp_path / "a.json", assets="red")] == [f"{tmp_path}/a.json"]
    assert len(planned(f"{tmp_path}/*.json", assets="red")) == 2
    lines = "\n".join(json.dumps(item(name, assets, collection="c")) for name in "ba") + "\n\n"
    (tmp_path / "items.ndjson").write_text(lines)
    shards = planned(tmp_path / "items.ndjson", assets="red")
    assert [shard.uri.rpartition("#")[2] for shard in shards] == ["a", "b"]


def test_stac_geoparquet(tmp_path: Path, assets: dict[str, Any]) -> None:
    from stac_geoparquet.arrow import parse_stac_items_to_arrow, to_parquet

    full = {key: {**each, "href": f"{tmp_path}/{each['href'][2:]}"} for key, each in assets.items()}
    items = [item(name, full, time=f"2024-01-0{day}T00:00:00Z") for day, name in enumerate("ba", 1)]
    to_parquet(parse_stac_items_to_arrow(items), tmp_path / "items.parquet")
    shards = planned(tmp_path / "items.parquet", assets="red,nir")
    assert [shard.uri.rpartition("#")[2] for shard in shards] == ["a", "b"]
    (record,) = windows_of(shards[0])
    assert record.kept["datetime"] == datetime(2024, 1, 2, tzinfo=UTC)


def static_catalog(folder: Path) -> pystac.Catalog:
    """A catalog with a collection of two items, with relative links, as pystac writes it."""
    catalog = pystac.Catalog("root", "all")
    extent = pystac.Extent(pystac.SpatialExtent([[10, 50, 11, 51]]), pystac.TemporalExtent([[None, None]]))
    inner = pystac.Collection("c", "some", extent)
    catalog.add_child(inner)
    for name in ("a", "b"):
        inner.add_item(pystac.Item.from_dict(item(name, {})))
    catalog.normalize_hrefs(str(folder))
    for each in inner.get_items():
        href = write(Path(each.self_href).parent / "red.tif", band("B04", 640), grid(10), "EPSG:32633")
        each.add_asset("red", pystac.Asset(href.name, media_type=pystac.MediaType.COG))
    catalog.save(pystac.CatalogType.SELF_CONTAINED)
    return catalog


def test_a_static_catalog_on_a_disk_in_a_bucket_and_on_a_web_server(s3: S3Server, tmp_path: Path) -> None:
    static_catalog(tmp_path / "in")
    prefix = f"stac-{tmp_path.name}"
    for path in (tmp_path / "in").rglob("*.*"):
        access.write(s3.uri(f"{prefix}/{path.relative_to(tmp_path / 'in')}"), path.read_bytes())
    with counting_server(tmp_path / "in") as (web, _):
        for root in (tmp_path / "in", s3.uri(prefix), web):
            shards = planned(f"{root}/catalog.json")
            assert [shard.uri for shard in shards] == [f"{root}/c/{name}/{name}.json" for name in "ab"]
            assert payload(shards[0]).files[0].uri == f"{root}/c/a/red.tif"
            (record,) = windows_of(shards[1])
            np.testing.assert_array_equal(np.ma.getdata(record.data)[..., 0], band("B04", 640)[0])
        assert len(planned(tmp_path / "in" / "c" / "collection.json")) == 2


def test_an_item_that_is_missing_in_a_catalog_is_an_error_row(tmp_path: Path) -> None:
    static_catalog(tmp_path)
    (tmp_path / "c" / "a" / "a.json").unlink()
    shards = planned(tmp_path / "catalog.json")
    assert [shard.rows for shard in shards] == [None, 1]
    (record,) = windows_of(shards[0]) if shards[0].rows else _broken(shards[0])
    assert record.error.error_type == "not_found"
    assert "a.json does not exist" in record.error.message


def _broken(shard: Shard) -> list[Any]:
    from pipeline import sources
    from pipeline.coverage import END
    from pipeline.sources import ReadOptions

    *records, end = sources.read(shard, ((0, END),), ReadOptions())
    assert end.rows == 1  # type: ignore[union-attr]
    return records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is no STAC: it has a None without id or assets; give an ItemCollection"),
        ("[1]", "is no STAC"),
        ("{", "is no JSON"),
        ('{"type": "FeatureCollection", "features": [{"type": "Feature", "properties": {}}]}', "is no STAC"),
        ('{"type": "FeatureCollection", "features": []}', "has no STAC items"),
    ],
)
def test_other_json_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputRefused, match=rf"a\.json.*{message}"):
        planned(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("href", "message"),
    [
        ("gopher://host/a.tif", "the asset red is gopher://host/a.tif, which has an unsupported scheme"),
        ("/vsicurl/https://host/a.tif", "a path of GDAL; write its URI instead"),
        ("gone.tif", "gone.tif does not exist"),
    ],
)
def test_assets_that_cannot_be_read_are_refused_by_name(tmp_path: Path, href: str, message: str) -> None:
    path = save(tmp_path / "items.json", [item("a", {"red": asset(href, "B04")})])
    with pytest.raises(InputRefused, match=message):
        planned(path)


@pytest.mark.parametrize(
    "change",
    [
        {"assets": {"red": 5}},
        {"assets": {"red": {"href": "B04.tif", "eo:bands": ["B04"]}}},
        {"properties": [1]},
        {"properties": {"datetime": "yesterday"}},
        {"properties": {"eo:cloud_cover": [1]}},
        {"geometry": {"type": "Polygon", "coordinates": 7}},
        {"geometry": 1},
    ],
)
def test_an_item_that_is_not_valid_is_an_error_row(
    tmp_path: Path, assets: dict[str, Any], change: dict[str, Any]
) -> None:
    path = save(tmp_path / "items.json", [item("good", assets), {**item("bad", assets), **change, "links": [3]}])
    broken, good = planned(path, assets="red", bbox="0,0,90,90")
    assert (broken.rows, good.rows) == (None, 1)
    (record,) = _broken(broken)
    assert record.error.error_type == "corrupt"
    assert "#bad is no valid STAC item: " in record.error.message


def test_pages_and_repeated_items_are_said(tmp_path: Path, assets: dict[str, Any]) -> None:
    content = json.loads(collection([item("a", assets), item("a", assets)]))
    (tmp_path / "a.json").write_text(json.dumps({**content, "links": [{"rel": "next", "href": "x"}]}))
    archive = archive_of(tmp_path / "a.json", assets="red")
    archive.check()
    assert len(list(archive.shards())) == 1
    lines = "\n".join(archive.notices.lines())
    assert "a link to a next page, which is not followed" in lines
    assert "an item that occurs again with the same id is read once" in lines


# Selection


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"bbox": "9,49,10.5,50.5"}, "a"),
        ({"bbox": "10.2,50.2,12.5,50.4"}, "ab"),
        ({"bbox": "170,0,-170,90"}, "c"),
        ({"bbox": "0,0,1,1"}, ""),
        ({"datetime": "2024-01-01T00:00:00Z"}, "a"),
        ({"datetime": "2024-01-02T00:00:00Z/.."}, "bc"),
        ({"datetime": "../2024-01-02T00:00:00Z"}, "ab"),
        ({"datetime": "2024-01-02T00:30:00+01:00/2024-01-02T02:00:00+01:00"}, "b"),
        ({"datetime": "2024-01-02T00:00:00Z/..", "bbox": "10.2,50.2,12.5,50.4"}, "b"),
    ],
)
def test_items_are_selected_by_place_and_time(
    tmp_path: Path, assets: dict[str, Any], settings: dict[str, str], names: str
) -> None:
    items = [
        item(name, assets, west=west, time=f"2024-01-0{day}T00:00:00Z")
        for day, (name, west) in enumerate([("a", 10), ("b", 12), ("c", 179.5)], 1)
    ]
    path = save(tmp_path / "items.json", items)
    if names:
        shards = planned(path, assets="red", **settings)
        assert "".join(shard.uri[-1] for shard in shards) == names
    else:
        with pytest.raises(InputRefused, match="has no STAC items that --bbox select"):
            planned(path, assets="red", **settings)


def test_an_item_of_a_range_of_times(tmp_path: Path, assets: dict[str, Any]) -> None:
    ends = {"start_datetime": "2024-01-01T00:00:00Z", "end_datetime": "2024-02-01T00:00:00Z"}
    path = save(tmp_path / "items.json", [item("a", assets, time=None, **ends)])  # type: ignore[arg-type]
    (shard,) = planned(path, assets="red", datetime="2024-01-10T00:00:00Z/..")
    assert "datetime" not in payload(shard).item


@pytest.mark.parametrize(
    "value", ["2024-01-01", "../..", "2024-01-01T00:00:00", "2025-01-01T00:00:00Z/2024-01-01T00:00:00Z"]
)
def test_bad_times_are_refused(value: str) -> None:
    with pytest.raises(SettingRefused, match=r"--datetime is .*RFC 3339"):
        RunConfig(input="a", output="o", datetime=value)


def test_selections_are_in_the_settings_and_need_items(tmp_path: Path) -> None:
    config = RunConfig(input="a", output="o", datetime="2024-01-01T00:00:00Z/..", assets="red,nir")
    settings = config.result_settings()
    assert (settings["datetime"], settings["assets"]) == ("2024-01-01T00:00:00Z/..", ["red", "nir"])
    write(tmp_path / "a.tif", numbers(1, 64, 64))
    with pytest.raises(InputRefused, match=r"--assets selects from STAC items, and .*a\.tif is none"):
        planned(tmp_path, assets="red")


# Sentinel-2's offset, updates, credentials and memory


def sentinel2(folder: Path, **properties: Any) -> Path:
    product = write_safe(folder, baseline="05.11", stored_offset=1000)
    files = sorted(product.glob("GRANULE/*/IMG_DATA/*.jp2"))
    assets = {
        path.stem[-3:]: {"href": f"s/{path.name}", "type": "image/jp2", "eo:bands": [{"name": path.stem[-3:]}]}
        for path in files
    }
    (folder / "s").mkdir()
    for path in files:
        path.rename(folder / "s" / path.name)
    return save(folder / "items.json", [item("a", assets, **properties)])


@pytest.mark.parametrize(
    ("properties", "offset"),
    [
        ({"s2:processing_baseline": "05.11"}, 1000),
        ({"s2:processing_baseline": "05.11", "earthsearch:boa_offset_applied": True}, 0),
        ({"processing:version": "02.04"}, 0),
        ({}, None),
    ],
)
def test_the_offset_is_that_of_the_item(tmp_path: Path, properties: dict[str, Any], offset: int | None) -> None:
    spec = input_spec.load("sentinel2-all")
    archive = archive_of(sentinel2(tmp_path, **properties))
    archive.use_bands(spec.bands, "auto")
    if offset is None:
        with pytest.raises(InputRefused, match=r"nothing says whether the numbers of .*#a contain Sentinel-2's offset"):
            list(archive.shards())
        return
    (shard,) = archive.shards()
    assert payload(shard).offset == offset
    (record, *_) = windows_of(shard, wanted=spec.bands, network_bands=13, harmonize="auto")
    expected = band("B02")[0, :64, :64] + (1000 - offset)
    np.testing.assert_array_equal(record.data.data[..., 1], expected)  # type: ignore[union-attr]


def test_an_update_reads_new_and_changed_items(tmp_path: Path, assets: dict[str, Any]) -> None:
    items = [item(name, assets) for name in "bd"]
    path = save(tmp_path / "items.json", items)
    archive = archive_of(path, assets="red")
    plan = plans.make(str(tmp_path / "out"), archive.shards(), archive.keep_types)
    save(path, [item("c", assets), items[1], item("a", assets)])
    change = Change(plan)
    new = list(archive.new_shards(change))
    assert [shard.uri[-1] for shard in new] == ["a", "c"]
    assert (change.unchanged, change.removed, dict(change.dropped)) == (1, 1, {})
    save(path, [item("b", assets, time="2020-01-01T00:00:00Z"), items[1]])
    change = Change(plan)
    assert [shard.uri[-1] for shard in archive.new_shards(change)] == ["b"]
    assert set(change.dropped) == {0}


def test_signatures_are_not_in_the_plan_and_may_change(tmp_path: Path, assets: dict[str, Any]) -> None:
    with counting_server(tmp_path) as (web, _):

        def signed(secret: str) -> Path:
            href = f"{web}/B04.tif?sig={secret}"
            return save(tmp_path / "items.json", [item("a", {"red": asset(href, "B04")})])

        archive = archive_of(signed("geheim1"))
        plan = plans.make(str(tmp_path / "out"), archive.shards(), archive.keep_types)
        assert plan.hides_credentials
        (shard,) = plans.read_shards(plan)
        assert "geheim" not in payload(shard).to_json()
        assert archive.keys_with_credentials(plan) == {0: (f"{web}/B04.tif?sig=geheim1",)}
        archive = archive_of(signed("geheim2"))
        assert archive.keys_with_credentials(plan) == {0: (f"{web}/B04.tif?sig=geheim2",)}
        change = Change(plan)
        assert list(archive.new_shards(change)) == []
        assert change.unchanged == 1


def test_a_large_collection_is_read_as_a_stream(tmp_path: Path) -> None:
    """5,000 items of 4 kB: 20 MB of JSON, of which little stays in memory."""
    one = item("item", {f"b{n}": asset(f"s3://bucket/{n}.tif", f"B{n}") for n in range(12)}, description="x" * 2000)
    text = json.dumps(one)
    path = tmp_path / "items.json"
    with open(path, "w") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number in range(5_000):
            file.write(("," if number else "") + text.replace('"item"', f'"item{number:05d}"', 1))
        file.write("]}")
    assert path.stat().st_size > 15 << 20
    tracemalloc.start()
    try:
        items = list(stac.items_of(str(path), stac.ItemSelection()))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(items) == 5_000
    assert items[123].record()["id"] == "item00123"
    assert peak < 8 << 20, peak
