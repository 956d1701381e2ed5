"""Sentinel-2's offset: what names, files, products and items say of it, and what is refused."""

import pytest

from pipeline.errors import DecodeError
from pipeline.geo.sentinel2 import (
    Claim,
    claims_of_file,
    claims_of_item,
    claims_of_name,
    claims_of_product,
    harmonize,
)

NEW = "S2B_MSIL2A_20250302T095029_N0511_R079_T33UXP_20250302T104753"
OLD = "S2A_MSIL1C_20170105T013442_N0204_R031_T53NMJ_20170105T013443"


def offset(*claims: Claim, mode: str = "auto") -> float:
    return harmonize(mode, claims, "a.tif").offset


def product(baseline: str, *offsets: int, tag: str = "BOA_ADD_OFFSET", namespace: str = "S2_PDI") -> bytes:
    values = "".join(f'<{tag} band_id="{band}">{value}</{tag}>' for band, value in enumerate(offsets))
    return (
        f'<?xml version="1.0"?><n1:Level-2A_User_Product xmlns:n1="https://{namespace}.xsd"><n1:General_Info>'
        f"<Product_Info><PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE></Product_Info>"
        f"<{tag}_VALUES_LIST>{values}</{tag}_VALUES_LIST></n1:General_Info></n1:Level-2A_User_Product>"
    ).encode()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"s3://bucket/{NEW}.SAFE/tile_3.tif", 1000),
        (f"/data/{OLD}/t.tif", 0),
        (f"/data/archive.tar#{NEW}/{NEW}_7.tif", 1000),
        (NEW.replace("N0511", "N0400"), 1000),
        (NEW.replace("N0511", "N0301"), 0),
    ],
)
def test_the_name_of_a_product_gives_the_baseline(name: str, expected: float) -> None:
    assert offset(*claims_of_name(name)) == expected


@pytest.mark.parametrize("name", ["tile_N0400_E0100.tif", "N0511_R079.tif", NEW.replace("N0511", "N9999"), "a.tif"])
def test_other_names_say_nothing(name: str) -> None:
    assert claims_of_name(name) == []
    with pytest.raises(DecodeError, match=r"nothing says whether .* --harmonize on .* --harmonize off"):
        harmonize("auto", claims_of_name(name), name)


def test_two_products_in_one_name_are_refused() -> None:
    with pytest.raises(DecodeError, match=r"contradicts itself .*05\.11.*\(1000\) but .*02\.04.*\(0\)"):
        harmonize("auto", claims_of_name(f"{NEW}/{OLD}.tif"), "a.tif")


def test_the_user_decides_over_all_claims() -> None:
    claims = claims_of_name(f"{NEW}/{OLD}.tif")
    assert harmonize("on", claims, "a") == Claim(1000, "--harmonize on", is_direct=True)
    assert harmonize("off", claims, "a") == Claim(0, "--harmonize off", is_direct=True)


@pytest.mark.parametrize("tag", ["BOA_ADD_OFFSET", "RADIO_ADD_OFFSET"])
def test_the_product_metadata(tag: str) -> None:
    assert offset(*claims_of_product(product("05.11", *[-1000] * 13, tag=tag))) == 1000
    assert offset(*claims_of_product(product("02.04"))) == 0


@pytest.mark.parametrize("xml", [product("05.11"), product("02.04", -1000), product("05.11", -1000, 0)])
def test_product_metadata_that_contradicts_itself_is_refused(xml: bytes) -> None:
    with pytest.raises(DecodeError, match="contradicts itself"):
        offset(*claims_of_product(xml))


def test_an_unknown_offset_and_broken_metadata_are_refused() -> None:
    with pytest.raises(DecodeError, match=r"offset of -500, and only 0 and -1000 are known"):
        claims_of_product(product("05.11", -500))
    with pytest.raises(DecodeError, match="is no XML"):
        claims_of_product(b"<a>")


@pytest.mark.parametrize(
    ("properties", "asset", "expected"),
    [
        ({"s2:processing_baseline": "04.00"}, {}, 1000),  # Planetary Computer
        ({"s2:processing_baseline": "02.12"}, {}, 0),
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True}, {}, 0),
        ({"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": False}, {}, 1000),
        ({"s2:processing_baseline": "02.12", "earthsearch:boa_offset_applied": False}, {}, 0),
        ({"s2:processing_baseline": "05.09"}, {"raster:bands": [{"scale": 0.0001, "offset": -0.1}]}, 1000),
        ({"s2:processing_baseline": "05.09"}, {"raster:bands": [{"scale": 0.0001, "offset": 0}]}, 0),
        ({"processing:version": "05.11"}, {"raster:scale": 0.0001, "raster:offset": -0.1}, 1000),  # Copernicus
        ({}, {"bands": [{"raster:scale": 0.0001, "raster:offset": -0.1}]}, 1000),
    ],
)
def test_the_properties_of_an_item(properties: dict[str, object], asset: dict[str, object], expected: float) -> None:
    assert offset(*claims_of_item(properties, [asset])) == expected


def test_a_wrong_flag_of_an_item_is_refused() -> None:
    properties = {"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True}
    claims = claims_of_item(properties, [{"raster:bands": [{"scale": 0.0001, "offset": -0.1}]}])
    with pytest.raises(DecodeError, match=r"boa_offset_applied is true \(0\) but .* are 0\.0001 and -0\.1 \(1000\)"):
        harmonize("auto", claims, "S2B_33UXP")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"PROCESSING_BASELINE": "05.11"}, 1000),
        ({"PROCESSING_BASELINE": "02.09"}, 0),
        ({"BOA_ADD_OFFSET:0": "-1000", "BOA_ADD_OFFSET:1": "-1000"}, 1000),
        ({"OFFSET:0": "-0.1", "SCALE:0": "0.0001"}, 1000),
        ({"OFFSET:0": "0", "SCALE:0": "0.0001", "PROCESSING_BASELINE": "05.11"}, 0),
    ],
)
def test_the_metadata_of_a_geotiff(metadata: dict[str, str], expected: float) -> None:
    assert offset(*claims_of_file(metadata)) == expected


@pytest.mark.parametrize("scale", ["nan", "inf", "1e-320", "-0.0001", "0", "", "1" + "0" * 400])
def test_a_scale_that_is_no_number_says_nothing(scale: str) -> None:
    assert claims_of_file({"SCALE:0": scale, "OFFSET:0": "-0.1"}) == []
    assert claims_of_item({}, [{"raster:scale": scale, "raster:offset": -0.1}]) == []
    assert claims_of_file({"BOA_ADD_OFFSET": "nan"}) == []


def test_a_scale_of_another_unit_says_nothing() -> None:
    assert claims_of_file({"OFFSET:0": "-0.1", "SCALE:0": "0.01"}) == []
    assert claims_of_file({"OFFSET:0": "0", "SCALE:0": "1"}) == []
