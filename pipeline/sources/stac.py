"""STAC items: the assets of the chosen bands are one scene. `pipeline.planning.stac` reads the items.

https://github.com/radiantearth/stac-spec, versions 1.0 (`eo:bands`) and 1.1 (`bands`).
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import DecodeError, InputRefused, ReadError
from pipeline.geo import sentinel2
from pipeline.geo.bands import Band
from pipeline.geo.sentinel2 import Claim
from pipeline.sources import scene
from pipeline.sources.base import Compound, Contents, ReadOptions, Source
from pipeline.sources.records import storage_fault
from pipeline.sources.scene import ITEM_COLUMNS, RASTER_SUFFIXES, Scene
from pipeline.sources.stack import stack
from pipeline.storage import access, uris
from pipeline.storage.base import ObjectInfo
from pipeline.threads import ordered_map

THREADS = 4
RASTER_TYPES = ("image/tiff", "image/jp2", "image/geotiff", "application/vrt")
NOT_DATA = {"thumbnail", "overview", "visual", "metadata"}
"""Roles of assets that hold no numbers of a sensor. `--assets` may name such an asset."""

ItemRecord = Mapping[str, Any]
"""What planning keeps of an item: id, item (values of ITEM_COLUMNS), properties (of CLAIMS), assets; or its fault."""
NODATA_OF_ITEM = "the item names a value of no data that its files do not have: it is not applied"
CLAIMS = (*sentinel2.BASELINES, *sentinel2.APPLIED)
ASSET_KEYS = (
    "href",
    "type",
    "roles",
    "eo:bands",
    "bands",
    "raster:bands",
    "eo:common_name",
    "nodata",
    "raster:scale",
    "raster:offset",
)


@dataclass(frozen=True, slots=True, eq=False)
class Item(Compound):
    """A STAC item. file, start, length: where its ItemRecord is, as JSON. etag: of the ItemRecord."""

    file: BinaryIO | None = None
    start: int = 0
    length: int = 0

    def record(self) -> ItemRecord:
        """Safe to call from several threads."""
        assert self.file is not None
        record: ItemRecord = json.loads(os.pread(self.file.fileno(), self.length, self.start))
        return record


def shards(info: ObjectInfo, options: ReadOptions) -> Iterator[Contents]:
    """The shards of an item. Raises ReadError, and InputRefused without `--tile-size`."""
    if options.tiling is None:
        raise InputRefused(f"{info.uri} is a STAC item: give --tile-size, as in --tile-size 224")
    assert isinstance(info, Item)
    record = info.record()
    if fault := record.get("fault"):
        raise ReadError(*fault)
    keys = chosen_assets(record["assets"], options, info.uri)
    assets = {key: record["assets"][key] for key in keys}
    inspected = list(ordered_map(lambda key: _inspect(key, assets[key], options), keys, THREADS, THREADS))
    whole = stack([each.scene for each in inspected], info.uri)
    hides_credentials = any(asset.get("signed") for asset in assets.values())
    zero_is_missing, notices = _missing(inspected, assets)
    whole = replace(whole, item=record["item"], hides_credentials=hides_credentials, zero_is_missing=zero_is_missing)
    claims = _claims(record, assets, inspected, info.uri) if options.harmonize else []
    for contents in scene.planned(whole, claims, sum(each.size_bytes for each in inspected), options):
        yield replace(contents, notices=(*contents.notices, *notices))
        notices = ()


@dataclass(frozen=True, slots=True)
class _Inspected:
    scene: Scene
    size_bytes: int
    metadata: Mapping[str, str]


def _inspect(key: str, asset: Mapping[str, Any], options: ReadOptions) -> _Inspected:
    """The header of an asset. Raises ReadError."""
    href = asset["href"]
    if href.startswith("/vsi"):
        raise ReadError("unsupported", f"the asset {key} is {href}, a path of GDAL; write its URI instead")
    if problem := uris.check_uri(href):
        raise ReadError("unsupported", f"the asset {key} is {href}, which {problem}")
    assert options.tiling is not None
    try:
        info = access.head(href)
        header, metadata = scene.gdal().inspect(info, options.tiling, has_siblings=False)
    except OSError as error:
        raise storage_fault(href, error) from error
    return _Inspected(_named(header, key, asset), info.size_bytes, metadata)


def _missing(inspected: Sequence[_Inspected], assets: Mapping[str, Mapping[str, Any]]) -> tuple[bool, tuple[str, ...]]:
    """Whether 0 is no data because the item says so and its files do not, and a notice about other such values."""
    unknown = [
        entry.get("nodata")
        for each, asset in zip(inspected, assets.values(), strict=True)
        for entry in (asset.get("raster:bands") or asset.get("bands") or [asset])
        if all(band.mask == "" for band in each.scene.bands)
    ]
    values = {value for value in unknown if value is not None and str(value).lower() != "nan"}
    if values and not any(unknown) and len(unknown) >= len(assets) and None not in unknown:
        return True, ()
    return False, (NODATA_OF_ITEM,) * bool(values)


def _named(header: Scene, key: str, asset: Mapping[str, Any]) -> Scene:
    """The scene of one asset, its bands named as the item names them."""
    (file,) = header.files
    names = bands_of(key, asset)
    if len(names) != len(file.bands):
        if any(names) and len(names) > 1:
            raise ReadError(
                "unsupported", f"{file.uri} has {len(file.bands)} bands, and its item names {len(names)} in asset {key}"
            )
        return header
    bands = tuple(
        replace(band, name=called[0] if called else band.name, also=tuple(called[1:]))
        for band, called in zip(file.bands, names, strict=True)
    )
    return replace(header, files=(replace(file, bands=bands),))


def bands_of(key: str, asset: Mapping[str, Any]) -> list[list[str]]:
    """The names of each band of an asset: name, common name, and the asset's key if it has one band."""
    entries = asset.get("eo:bands") or asset.get("bands") or [{"eo:common_name": asset.get("eo:common_name")}]
    names = []
    for entry in entries:
        given = [entry.get("name"), entry.get("common_name"), entry.get("eo:common_name")]
        names.append(list(dict.fromkeys([name for name in given if name] + ([key] if len(entries) == 1 else []))))
    return names


def chosen_assets(assets: Mapping[str, Mapping[str, Any]], options: ReadOptions, uri: str) -> list[str]:
    """Keys of the assets to read. Raises ReadError (unsupported)."""
    rasters = {key: asset for key, asset in assets.items() if _is_raster(asset)}
    data = {key: asset for key, asset in rasters.items() if not NOT_DATA & set(asset.get("roles") or ())}
    names = options.assets or tuple(name for name in options.bands if not name.isdecimal())
    if names:
        found = [[name] if name in rasters else _called(Band((name,)), data) for name in names]
        missing = [name for name, keys in zip(names, found, strict=True) if not keys]
    elif options.wanted:
        found = [_called(band, data) for band in options.wanted]
        missing = [
            band.names[0] for band, keys in zip(options.wanted, found, strict=True) if not keys and band.filler is None
        ]
    else:
        found, missing = [[key] for key in data], []
        if len(data) != 1:
            raise ReadError(
                "unsupported",
                f"{uri} has the assets {_list(data)}; choose with --assets, as in --assets red,nir",
            )
    if missing:
        names_of = f"{', '.join(missing)} (its assets: {_list(assets)})"
        raise ReadError("unsupported", f"{uri} has no asset for {names_of}; choose with --assets")
    if several := next((keys for keys in found if len(keys) > 1), None):
        raise ReadError("unsupported", f"{uri} has several assets of one band, {_list(several)}; choose with --assets")
    return list(dict.fromkeys(key for keys in found for key in keys))


def _called(band: Band, assets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys of the assets of a band: by their keys, or else by the names of their bands, first those with one band."""
    if keys := [key for key in assets if band.is_called(key)]:
        return keys
    named = {key: bands_of(key, asset) for key, asset in assets.items()}
    called = [key for key, names in named.items() if any(band.is_called(name) for each in names for name in each)]
    return [key for key in called if len(named[key]) == 1] or called


def _is_raster(asset: Mapping[str, Any]) -> bool:
    media_type = str(asset.get("type") or "").lower()
    is_named = str(asset["href"]).lower().partition("?")[0].endswith(RASTER_SUFFIXES)
    return media_type.startswith(RASTER_TYPES) or (not media_type and is_named)


def _list(keys: Any) -> str:
    return ", ".join(keys) or "none"


def _claims(
    record: ItemRecord, assets: Mapping[str, Mapping[str, Any]], inspected: Sequence[_Inspected], uri: str
) -> list[Claim]:
    """What an item and its files say about Sentinel-2's offset. Raises ReadError."""
    try:
        claims = sentinel2.claims_of_item(record["properties"], assets.values())
        for name in (record["id"], *(asset["href"] for asset in assets.values())):
            claims += sentinel2.claims_of_name(name)
        for each in inspected:
            claims += sentinel2.claims_of_file(each.metadata)
    except DecodeError as error:
        raise ReadError(error.error_type, f"{uri}: {error.message}") from error
    return list(dict.fromkeys(claims))


SOURCE = Source(
    "stac",
    (),
    scene.read,
    shards=shards,
    reads_header=True,
    payload=Scene,
    columns=pa.schema([*scene.COLUMNS, *ITEM_COLUMNS]),
    own_title="a STAC item",
    selects=("bbox", "datetime", "assets"),
    planned_columns=scene.planned_columns,
    fault_payload=scene.faulty,
)
