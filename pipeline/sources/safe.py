"""Sentinel-2 products in SAFE folders: the files of the bands are one scene.

https://sentiwiki.copernicus.eu/web/s2-products: L1C has GRANULE/*/IMG_DATA/*_B02.jp2, L2A has
GRANULE/*/IMG_DATA/R10m/*_B02_10m.jp2, and each band in several resolutions, of which the finest is read.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.errors import DecodeError, ReadError
from pipeline.geo import bands as band_names
from pipeline.geo import sentinel2
from pipeline.geo.bands import Band
from pipeline.geo.sentinel2 import Claim
from pipeline.sources import scene
from pipeline.sources.base import Compound, Contents, ReadOptions, Source
from pipeline.sources.records import storage_fault
from pipeline.sources.stack import stack
from pipeline.storage import access
from pipeline.storage.base import ObjectInfo
from pipeline.threads import ordered_map

FOLDER = re.compile(r"(.*?\.SAFE)/(.*)", re.DOTALL | re.IGNORECASE)
METADATA = re.compile(r"MTD_MSIL(1C|2A)\.xml")
BAND_FILE = re.compile(r"GRANULE/([^/]+)/IMG_DATA/(?:R\d\dm/)?[^/]*_(B\d\d|B8A)(?:_(\d\d)m)?\.jp2")
COMMON_NAMES = {
    **{"B01": "coastal", "B02": "blue", "B03": "green", "B04": "red", "B05": "rededge1", "B06": "rededge2"},
    **{"B07": "rededge3", "B08": "nir", "B8A": "nir08", "B09": "nir09", "B10": "cirrus", "B11": "swir16"},
    "B12": "swir22",
}
THREADS = 4


@dataclass(frozen=True, slots=True)
class Product(Compound):
    """A SAFE folder. uri: of its metadata, which may not exist. files: of its bands, and the metadata if it exists.

    The etag changes if that of any file does.
    """

    folder: str = ""
    files: tuple[ObjectInfo, ...] = ()


def grouped(objects: Iterable[ObjectInfo]) -> Iterator[ObjectInfo]:
    """Replace the objects of each SAFE folder by one Product. objects: sorted by URI."""
    folder, members = "", list[ObjectInfo]()
    for info in objects:
        matched = FOLDER.fullmatch(info.uri)
        here = matched[1] if matched else ""
        if members and here != folder:
            yield _product(folder, members)
            members = []
        folder = here
        if not matched:
            yield info
        else:
            members.append(info)
    if members:
        yield _product(folder, members)


def _product(folder: str, objects: Sequence[ObjectInfo]) -> Product:
    paths = {info.uri[len(folder) + 1 :]: info for info in objects}
    files = tuple(info for path, info in paths.items() if METADATA.fullmatch(path) or BAND_FILE.fullmatch(path))
    metadata = next((path for path in paths if METADATA.fullmatch(path)), "")
    level = "1C" if "_MSIL1C_" in folder else "2A"
    uri = f"{folder}/{metadata or f'MTD_MSIL{level}.xml'}"
    etag = hashlib.sha256("\n".join(f"{info.uri[len(folder) :]} {info.etag}" for info in files).encode()).hexdigest()
    return Product(uri, sum(info.size_bytes for info in files), etag[:16], "safe", (), folder, files)


def shards(info: ObjectInfo, options: ReadOptions) -> Iterator[Contents]:
    """The shards of a product. Raises ReadError."""
    assert isinstance(info, Product)
    try:
        claims = _claims(info, options)
        found = _scene(info, options)
    except OSError as error:
        raise storage_fault(info.folder, error) from error
    yield from scene.planned(found, claims, info.size_bytes, options)


def _claims(product: Product, options: ReadOptions) -> list[Claim]:
    """What the product says about its offset. Raises ReadError and OSError."""
    if not options.harmonize:
        return []
    claims = sentinel2.claims_of_name(product.folder)
    metadata = next((info for info in product.files if info.uri == product.uri), None)
    try:
        return claims if metadata is None else [*claims, *sentinel2.claims_of_product(access.read(metadata.uri))]
    except DecodeError as error:
        raise ReadError(error.error_type, f"{product.uri}: {error.message}") from error


def _scene(product: Product, options: ReadOptions) -> "scene.Scene":
    """The scene of the bands that the network may get. Raises ReadError and OSError."""
    assert options.tiling is not None
    tiling, files = options.tiling, _finest(product)
    names = [(name, COMMON_NAMES[name]) for name in files]
    chosen = _chosen(names, product.folder, options)
    infos = [files[names[place][0]] for place in chosen]
    headers = ordered_map(
        lambda info: scene.gdal().inspect(info, tiling, has_siblings=False)[0], infos, THREADS, THREADS
    )
    named = [_named(header, *names[place]) for place, header in zip(chosen, headers, strict=True)]
    return stack(named, product.folder)


def _named(header: "scene.Scene", name: str, common_name: str) -> "scene.Scene":
    """The scene of a file of one band, with its names."""
    (file,) = header.files
    if len(file.bands) != 1:
        raise ReadError("unsupported", f"{file.uri} has {len(file.bands)} bands instead of one")
    band = replace(file.bands[0], name=name, also=(common_name,))
    return replace(header, files=(replace(file, bands=(band,)),))


def _finest(product: Product) -> dict[str, ObjectInfo]:
    """The finest file of each band, by its name. Raises ReadError."""
    found: dict[str, tuple[int, ObjectInfo]] = {}
    granules = set()
    for info in product.files:
        if matched := BAND_FILE.fullmatch(info.uri[len(product.folder) + 1 :]):
            granule, name, metres = matched.groups()
            granules.add(granule)
            found[name] = min(found.get(name, (1000, info)), (int(metres or 0), info), key=lambda each: each[0])
    if not found:
        raise ReadError("unsupported", f"{product.folder} has no GRANULE/*/IMG_DATA/*.jp2, the bands of Sentinel-2")
    if len(granules) > 1:
        raise ReadError(
            "unsupported", f"{product.folder} has {len(granules)} granules; name the files of one of them with --input"
        )
    return {name: found[name][1] for name in COMMON_NAMES if name in found}


def _chosen(names: Sequence[Sequence[str]], folder: str, options: ReadOptions) -> list[int]:
    """The bands whose files are needed, in the order of the product. Raises ReadError (unsupported)."""
    everything = list(range(len(names)))
    if options.bands:
        called = [[place for place in everything if _is_called(name, names[place])] for name in options.bands]
        return sorted({place for places in called for place in places}) if all(called) else everything
    if not options.wanted:
        if options.network_bands not in (None, len(names)):
            raise ReadError(
                "unsupported",
                f"{folder} has {len(names)} bands, and the network takes {options.network_bands}; choose them with "
                f"--bands, as in --bands B04,B03,B02; its bands: {', '.join(name for name, _ in names)}",
            )
        return everything
    try:
        places = band_names.match(names, options.wanted, folder)
    except DecodeError as error:
        raise ReadError(error.error_type, error.message) from error
    return sorted(place for place in places if place != band_names.FILLED)


def _is_called(name: str, names: Sequence[str]) -> bool:
    return any(map(Band((name,)).is_called, names))


SOURCE = Source(
    "safe",
    (),
    scene.read,
    shards=shards,
    reads_header=True,
    payload=scene.Scene,
    columns=scene.COLUMNS,
    own_title="a Sentinel-2 product",
    planned_columns=scene.planned_columns,
    fault_payload=scene.faulty,
)
