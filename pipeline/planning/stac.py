"""Reads STAC items: an ItemCollection, one item, a static catalog, NDJSON or stac-geoparquet. Runs on the driver.

The items are read as a stream. What planning needs of each goes to a temporary file, and only a place in that file
stays in memory, because a listing must be sorted.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipeline.errors import InputRefused, ReadError, message_line
from pipeline.geo.items import TimeRange, parse_time, times_of, touches
from pipeline.geo.tiles import Bounds
from pipeline.sources import parquet
from pipeline.sources.records import storage_fault
from pipeline.sources.scene import Scene
from pipeline.sources.shard import Shard
from pipeline.sources.stac import ASSET_KEYS, CLAIMS, Item
from pipeline.storage import access, credentials, uris
from pipeline.storage.base import ObjectInfo
from pipeline.storage.parquet import open_parquet
from pipeline.threads import ordered_map

JSON_SUFFIXES = (".json", ".geojson")
LINE_SUFFIXES = (".ndjson", ".jsonl")
MAX_WHOLE_BYTES = 16 << 20
"""A larger JSON file can only be an ItemCollection, and is read item by item."""
BATCH_ITEMS = 1000
THREADS = 8
REMEDY = "give an ItemCollection, an item, a catalog.json, NDJSON of items or stac-geoparquet"


@dataclass(frozen=True, slots=True)
class ItemSelection:
    """The items of --bbox and --datetime; None for all."""

    box: Bounds | None = None
    times: TimeRange | None = None

    def contains(self, item: Mapping[str, Any]) -> bool:
        """Raises ValueError for an item whose place or time is not valid."""
        if self.box is not None and not touches(self.box, item.get("geometry"), item.get("bbox")):
            return False
        if self.times is None:
            return True
        times = times_of(item.get("properties") or {})
        return times is not None and self.times.touches(*times)


def is_stac(name: str, *, has_scenes: bool = True) -> bool:
    """Whether an input is read as STAC: by its suffix; a Parquet file by its columns, if there are scenes at all."""
    lower = name.lower()
    if uris.is_local(name) and os.path.isdir(name):
        return False
    if lower.endswith(JSON_SUFFIXES + LINE_SUFFIXES):
        return True
    if not (has_scenes and lower.endswith(".parquet")) or uris.is_glob(name):
        return False
    try:
        columns = set(parquet.shard_rows(name)[1].names)
    except (OSError, *parquet.BAD_BYTES):
        return False
    return {"id", "assets", "geometry"} <= columns and bool({"stac_version", "stac_extensions"} & columns)


def items_of(name: str, selection: ItemSelection) -> Iterator[Item]:
    """The selected items of an input, sorted by URI. Raises InputRefused and OSError."""
    spool = _Spool()
    for uri, item, base in _items(name, spool):
        if isinstance(item, ReadError):
            spool.add(uri, {"fault": (item.error_type, item.message)})
            continue
        try:
            if selection.contains(item):
                spool.add(uri, _record(item, base))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            spool.add(uri, {"fault": ("corrupt", f"{uri} is no valid STAC item: {message_line(error)}")})
    yield from spool.items()


class _Spool:
    """Items in a temporary file. notices: for the user."""

    def __init__(self) -> None:
        self.file: BinaryIO = tempfile.TemporaryFile(prefix="nightshift-")  # noqa: SIM115
        self.places: dict[str, tuple[str, int, int]] = {}
        self.notices: dict[str, None] = {}
        self.end = 0

    def add(self, uri: str, record: Mapping[str, Any]) -> None:
        if uri in self.places:
            self.notices["an item that occurs again with the same id is read once"] = None
            return
        data = json.dumps(record, separators=(",", ":"), sort_keys=True).encode()
        self.file.write(data)
        self.places[uri] = hashlib.sha256(data).hexdigest()[:16], self.end, len(data)
        self.end += len(data)

    def items(self) -> Iterator[Item]:
        self.file.flush()
        notices = tuple(self.notices)
        for uri in sorted(self.places):
            etag, start, length = self.places[uri]
            yield Item(uri, 0, etag, "stac", notices, self.file, start, length)
            notices = ()


Found = tuple[str, Mapping[str, Any] | ReadError, str]
"""URI, item, and the URI that relative hrefs start from."""


def _items(name: str, spool: _Spool) -> Iterator[Found]:
    try:
        infos = list(access.list_glob(name)) if uris.is_glob(name) else [access.head(name)]
    except FileNotFoundError as error:
        raise InputRefused(f"--input {name} does not exist") from error
    for info in infos:
        lower = info.uri.lower()
        if lower.endswith(LINE_SUFFIXES):
            yield from _contained(info.uri, _lines(info.uri))
        elif lower.endswith(".parquet"):
            yield from _contained(info.uri, _rows(info.uri))
        else:
            yield from _json(info, spool)


def _contained(container: str, items: Iterable[Any]) -> Iterator[Found]:
    """The items of a file that holds many."""
    for item in items:
        _check_item(container, item)
        collection = item.get("collection")
        name = f"{collection}/{item['id']}" if collection else item["id"]
        yield f"{container}#{name}", item, _self_of(item) or container


def _self_of(item: Mapping[str, Any]) -> str:
    """The absolute URI of an item, "" without one."""
    links = item.get("links")
    for link in links if isinstance(links, list) else ():
        if isinstance(link, dict) and link.get("rel") == "self" and "://" in str(link.get("href")):
            return str(link["href"])
    return ""


def _check_item(uri: str, item: Any) -> None:
    """Raise InputRefused for JSON that is no STAC item."""
    kind = item.get("type") if isinstance(item, dict) else type(item).__name__
    if kind != "Feature" or not isinstance(item.get("assets"), dict) or not isinstance(item.get("id"), str):
        raise InputRefused(f"--input {uri} is no STAC: it has a {kind} without id or assets; {REMEDY}")


def _lines(uri: str) -> Iterator[Any]:
    with access.open_read(uri) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _parsed(line, f"{uri}, line {number},")


def _rows(uri: str) -> Iterator[Any]:
    """The items of a stac-geoparquet file."""
    import pyarrow as pa
    from stac_geoparquet.arrow import stac_table_to_items

    with access.open_read(uri) as file:
        parquet_file = open_parquet(file)
        schema = parquet_file.schema_arrow
        for batch in parquet_file.iter_batches(batch_size=BATCH_ITEMS, use_threads=False):
            yield from stac_table_to_items(pa.Table.from_batches([batch], schema))


def _parsed(data: bytes, subject: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputRefused(f"--input {subject} is no JSON: {message_line(error)}") from error


def _json(info: ObjectInfo, spool: _Spool) -> Iterator[Found]:
    if info.size_bytes > MAX_WHOLE_BYTES:
        yield from _contained(info.uri, _features(info.uri, spool))
        return
    content = _parsed(access.read(info.uri), info.uri)
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "FeatureCollection" and isinstance(content.get("features"), list):
        _look_for_next(content.get("links") or (), spool)
        yield from _contained(info.uri, content["features"])
    elif kind in ("Catalog", "Collection") and "stac_version" in content:
        yield from _catalog(info.uri)
    else:
        _check_item(info.uri, content)
        yield info.uri, content, info.uri


def _look_for_next(links: Iterable[Mapping[str, Any]], spool: _Spool) -> None:
    if any(isinstance(link, dict) and link.get("rel") == "next" for link in links):
        spool.notices["the ItemCollection has a link to a next page, which is not followed"] = None


def _features(uri: str, spool: _Spool) -> Iterator[Any]:
    """The features of a large FeatureCollection, one by one."""
    import ijson

    try:
        with access.open_read(uri) as file:
            kind = next(ijson.items(file, "type"), None)
            if kind != "FeatureCollection":
                raise InputRefused(f"--input {uri} is no STAC: its type is {kind}; {REMEDY}")
            file.seek(0)
            yield from ijson.items(file, "features.item", use_float=True)
            file.seek(0)
            _look_for_next(ijson.items(file, "links.item"), spool)
    except ijson.JSONError as error:
        raise InputRefused(f"--input {uri} is no JSON: {message_line(error)}") from error


def _catalog(uri: str) -> Iterator[Found]:
    """The items of a static catalog, and of all catalogs below it. Each catalog and item is read once."""
    import pystac

    class Io(pystac.StacIO):
        """Reads from every store, and writes nothing."""

        def read_text(self, source: Any, *_: Any, **__: Any) -> str:
            return access.read(str(source)).decode()

        def write_text(self, *_: Any, **__: Any) -> None:
            raise PermissionError("a catalog is only read")

    io, catalogs, seen = Io(), [uri], {uri}
    while catalogs:
        here = catalogs.pop()
        try:
            catalog = io.read_stac_object(here)
        except (OSError, ValueError, KeyError, TypeError, pystac.STACError, pystac.STACTypeError) as error:
            raise InputRefused(f"--input {uri}: the catalog {here} cannot be read: {message_line(error)}") from error
        catalog.set_self_href(here)
        items: list[str] = []
        for link in catalog.links:
            if link.rel not in ("child", "item") or (href := link.get_absolute_href()) is None or href in seen:
                continue
            seen.add(href)
            (catalogs if link.rel == "child" else items).append(href)
        yield from ordered_map(_item_of_catalog, items, THREADS, 4 * THREADS)


def _item_of_catalog(href: str) -> Found:
    try:
        item = _parsed(access.read(href), href)
        _check_item(href, item)
    except OSError as error:
        return href, storage_fault(href, error), href
    except InputRefused as error:
        return href, ReadError("corrupt", str(error)), href
    return href, item, href


def _record(item: Mapping[str, Any], base: str) -> dict[str, Any]:
    """What planning needs of an item. Raises ValueError."""
    import numpy as np

    properties = item.get("properties") or {}
    columns: dict[str, Any] = {"item_id": item["id"]}
    if properties.get("datetime"):
        columns["datetime"] = parse_time(str(properties["datetime"])).isoformat()
    cover = properties.get("eo:cloud_cover")
    if cover is not None:
        columns["eo:cloud_cover"] = float(np.float32(cover))
    assets = {key: _asset(asset, base) for key, asset in item["assets"].items() if (asset or {}).get("href")}
    claims = {name: properties[name] for name in CLAIMS if properties.get(name) is not None}
    return {"id": item["id"], "item": columns, "properties": claims, "assets": assets}


def _asset(asset: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The asset with an absolute URI, without credentials, which this process remembers. Raises ValueError."""
    from pystac.utils import make_absolute_href

    kept = {name: asset[name] for name in ASSET_KEYS if asset.get(name) is not None}
    for name in ("eo:bands", "bands", "raster:bands"):
        bands = kept.get(name, [])
        if not isinstance(bands, list | tuple) or not all(isinstance(band, dict) for band in bands):
            raise ValueError(f"{name} of an asset is no list of objects")
        for band in bands:
            _check_values(band)
    _check_values(kept)
    roles = kept.get("roles", [])
    if not isinstance(roles, list | tuple) or not all(isinstance(role, str) for role in roles):
        raise ValueError(f"the roles of an asset are {roles!r}, no list of names")
    href = str(asset["href"])
    full = uris.normalize(href if "://" in href else make_absolute_href(href, base, start_is_dir=False))
    kept["href"] = credentials.hide_credentials(full)
    return {**kept, "signed": True} if kept["href"] != full else kept


def _check_values(values: Mapping[str, Any]) -> None:
    """Raise ValueError for names and values of no data, of an asset or a band, that are of another type."""
    for name in ("name", "common_name", "eo:common_name", "type"):
        if not isinstance(values.get(name) or "", str):
            raise ValueError(f"{name} of an asset or band is {values[name]!r}, no text")
    nodata = values.get("nodata")
    is_number = isinstance(nodata, int | float) and not isinstance(nodata, bool)
    if nodata is not None and not is_number and str(nodata).lower() not in ("nan", "inf", "-inf"):
        raise ValueError(f"nodata of an asset or band is {nodata!r}, no number")


def keys_with_credentials(planned: Iterable[Shard], names: Iterable[str]) -> dict[int, tuple[str, ...]]:
    """Read the items again and return the URIs with credentials, by shard, for the shards whose plan has them without.

    Raises InputRefused if an item has no longer such URIs.
    """
    hidden: dict[int, tuple[str, ...]] = {
        shard.index: tuple(file.uri for file in shard.payload.files)
        for shard in planned
        if isinstance(shard.payload, Scene) and shard.payload.hides_credentials
    }
    if not hidden:
        return {}
    for name in names:
        for _ in items_of(name, ItemSelection()):
            pass
    keys = {index: tuple(credentials.with_credentials(files)) for index, files in hidden.items()}
    for index, files in hidden.items():
        if not keys[index]:
            raise InputRefused(f"the items have changed since they were planned: {files[0]} has no signature any more")
    return keys
