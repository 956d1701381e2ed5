"""Sentinel-2's radiometric offset: whether the numbers of a product contain it.

Before processing baseline 04.00 reflectance is DN / 10000. Since then it is (DN - 1000) / 10000, so that it can be
negative, and DN 0 still means no data. Weights that were trained before expect numbers without the offset. Some
providers have subtracted it already. Source: https://sentiwiki.copernicus.eu/web/s2-products.

`claims_of_…` read what a name, a file or an item says; `harmonize` decides. Pure functions without I/O.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from pipeline.errors import DecodeError

MODES = ("auto", "on", "off")
OFFSET = 1000.0
FIRST_BASELINE = 4.0
"""The first processing baseline with the offset."""
LAST_BASELINE = 90.0
"""N9999 is the baseline of products that users have processed, which says nothing."""
QUANTIFICATION = 10_000.0

PRODUCT = re.compile(r"S2[A-D]_MSIL(?:1C|2A)_\d{8}T\d{6}_N(\d{2})(\d{2})_R\d{3}")
"""The name of a product or of its folder, with its baseline."""
ADD_OFFSETS = ("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET")
BASELINES = ("s2:processing_baseline", "sentinel:processing_baseline", "processing:version")
APPLIED = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement about the numbers of a product.

    offset: to subtract from its DN, 0 or OFFSET. reason: what says so, for messages. is_direct: it speaks of the offset
    itself; a baseline only implies it, because the provider may have subtracted it.
    """

    offset: float
    reason: str
    is_direct: bool = False


def harmonize(mode: str, claims: Sequence[Claim], subject: str) -> Claim:
    """The offset to subtract from the DN of a product, and why.

    mode: "auto" follows the claims; "on" subtracts OFFSET, and "off" nothing, whatever they say. subject: the product,
    for messages. Raises DecodeError (unsupported) if the claims contradict each other, or if there are none.
    """
    if mode != "auto":
        return Claim(OFFSET if mode == "on" else 0.0, f"--harmonize {mode}", is_direct=True)
    decisive = [claim for claim in claims if claim.is_direct] or list(claims)
    remedy = "set --harmonize on to subtract it, or --harmonize off if the numbers do not contain it"
    if not decisive:
        raise DecodeError(
            "unsupported",
            f"nothing says whether the numbers of {subject} contain Sentinel-2's offset of {OFFSET:g}; {remedy}",
        )
    if len({claim.offset for claim in decisive}) > 1:
        statements = " but ".join(f"{claim.reason} ({claim.offset:g})" for claim in decisive)
        raise DecodeError(
            "unsupported", f"{subject} contradicts itself about Sentinel-2's offset: {statements}; {remedy}"
        )
    return decisive[0]


def claims_of_name(name: str) -> list[Claim]:
    """The baselines in the names of products, `S2A_MSIL2A_20220126T…_N0400_R…`, within a path or URI."""
    return [claim for parts in PRODUCT.findall(name) for claim in _of_baseline(".".join(parts), "its name")]


def claims_of_file(metadata: Mapping[str, str]) -> list[Claim]:
    """The metadata of a GeoTIFF that GDAL wrote. A key of a band ends in its number, as in `OFFSET:0`."""
    claims = _of_baseline(metadata.get("PROCESSING_BASELINE"), "its metadata")
    offsets = [_number(value) for key, value in metadata.items() if key.partition(":")[0].startswith(ADD_OFFSETS)]
    claims += _of_offsets(offsets, "ADD_OFFSET in its metadata")
    for key, value in metadata.items():
        name, _, band = key.partition(":")
        if name == "OFFSET" and (scale := _number(metadata.get(f"SCALE:{band}"))) not in (None, 0.0, 1.0):
            claims += _of_scaled(_number(value), scale, "the scale and offset of its bands")
    return _distinct(claims)


def claims_of_product(xml: bytes | str) -> list[Claim]:
    """The product metadata, MTD_MSIL1C.xml or MTD_MSIL2A.xml. Raises DecodeError (corrupt) if it is no XML."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise DecodeError("corrupt", f"the metadata of a Sentinel-2 product is no XML: {error}") from error
    baselines: list[Claim] = []
    offsets: list[float | None] = []
    for element in root.iter():
        tag = element.tag.rpartition("}")[2]
        if tag == "PROCESSING_BASELINE":
            baselines += _of_baseline(element.text, "the product metadata")
        elif tag in ADD_OFFSETS:
            offsets.append(_number(element.text))
    if baselines and not offsets:  # the metadata lists every offset that there is
        offsets = [0.0]
    baselines = [Claim(claim.offset, claim.reason, is_direct=True) for claim in baselines]
    return _distinct([*baselines, *_of_offsets(offsets, "ADD_OFFSET in the product metadata")])


def claims_of_item(properties: Mapping[str, Any], assets: Iterable[Mapping[str, Any]] = ()) -> list[Claim]:
    """The properties of a STAC item, and those of its assets that hold reflectance.

    earthsearch:boa_offset_applied true means that the provider has subtracted the offset. `raster:bands` with scale
    0.0001 and offset -0.1 means that the numbers contain it.
    """
    claims = [claim for key in BASELINES for claim in _of_baseline(properties.get(key), key)]
    for key in APPLIED:
        if properties.get(key) is True:
            claims.append(Claim(0.0, f"{key} is true", is_direct=True))
        elif properties.get(key) is False and claims:
            claims.append(Claim(claims[0].offset, f"{key} is false, {claims[0].reason}", is_direct=True))
    for asset in assets:
        bands = [*asset.get("raster:bands", ()), *asset.get("bands", ()), asset]
        for band in bands:
            scale, offset = (_number(band.get(name, band.get(f"raster:{name}"))) for name in ("scale", "offset"))
            if scale not in (None, 0.0, 1.0):
                claims += _of_scaled(offset or 0.0, scale, "the scale and offset of its assets")
    return _distinct(claims)


def _of_baseline(text: Any, source: str) -> list[Claim]:
    baseline = _number(text)
    if baseline is None or not 0 <= baseline < LAST_BASELINE:
        return []
    offset = OFFSET if baseline >= FIRST_BASELINE else 0.0
    return [Claim(offset, f"processing baseline {baseline:05.2f} of {source}")]


def _of_offsets(offsets: Iterable[float | None], source: str) -> list[Claim]:
    known = {-offset for offset in offsets if offset is not None}
    return [Claim(_checked(offset, source), f"{source} is {-offset:g}", is_direct=True) for offset in sorted(known)]


def _of_scaled(offset: float | None, scale: float | None, source: str) -> list[Claim]:
    if offset is None or not scale or abs(scale * QUANTIFICATION - 1) > 5e-5:
        return []
    stored = _checked(round(-offset / scale, 3), source)
    return [Claim(stored, f"{source} are {scale:g} and {offset:g}", is_direct=True)]


def _checked(offset: float, source: str) -> float:
    if offset not in (0.0, OFFSET):
        raise DecodeError(
            "unsupported", f"{source} give an offset of {-offset:g}, and only 0 and {-OFFSET:g} are known; set "
            "--harmonize off, and the offset in a copy of the input specification"
        )  # fmt: skip
    return offset + 0.0


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _distinct(claims: Iterable[Claim]) -> list[Claim]:
    return list(dict.fromkeys(claims))
