"""Sentinel-2 products in SAFE folders, and STAC items of rasters, as small files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from affine import Affine
from scenes import write

METRES = {
    **dict.fromkeys(("B02", "B03", "B04", "B08"), 10),
    **dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12"), 20),
    **dict.fromkeys(("B01", "B09", "B10"), 60),
}
COMMON = {"B02": "blue", "B03": "green", "B04": "red", "B08": "nir"}
ORIGIN = (600_000, 5_500_000)


def grid(metres: float, shift: float = 0) -> Affine:
    return Affine(metres, 0, ORIGIN[0] + shift, 0, -metres, ORIGIN[1])


def band(name: str, side_metres: int = 1920, metres: int | None = None, *, offset: int = 0) -> np.ndarray:
    """Smooth numbers [1, height, width] of a band, which are a linear function of the place on the ground."""
    metres = metres or METRES[name]
    x = (np.arange(side_metres // metres) + 0.5) * metres
    number = 1 + list(METRES).index(name)
    return (100 * number + offset + 0.5 * x[None, :] + 0.25 * x[:, None])[None].astype(np.uint16)


def metadata(level: str, baseline: str, offset: int | None) -> str:
    tag = "RADIO_ADD_OFFSET" if level == "1C" else "BOA_ADD_OFFSET"
    offsets = "" if offset is None else "".join(f'<{tag} band_id="{i}">{offset}</{tag}>' for i in range(13))
    return f"<n1:Product xmlns:n1='x'><PROCESSING_BASELINE>{baseline}</PROCESSING_BASELINE>{offsets}</n1:Product>"


def write_safe(
    folder: Path, *, level: str = "1C", baseline: str = "02.04", stored_offset: int = 0, bands: Sequence[str] = ()
) -> Path:
    """A product of 1920 m with JPEG 2000 files as ESA names them. stored_offset: contained in its numbers."""
    code = f"N{baseline.replace('.', '')}"
    product = folder / f"S2A_MSIL{level}_20200101T100000_{code}_R022_T33UXP_20200101T110000.SAFE"
    images = product / "GRANULE" / f"L{level}_T33UXP_A1_20200101T100000" / "IMG_DATA"
    for name in bands or [name for name in METRES if level == "1C" or name != "B10"]:
        for metres in {METRES[name], 60} if level == "2A" else {METRES[name]}:
            place = images / f"R{metres}m" if level == "2A" else images
            suffix = f"_{metres}m" if level == "2A" else ""
            path = place / f"T33UXP_20200101T100000_{name}{suffix}.jp2"
            array = band(name, metres=metres, offset=stored_offset)
            write(path, array, grid(metres), "EPSG:32633", driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES")
    text = metadata(level, baseline, -stored_offset if stored_offset else None)
    (product / f"MTD_MSIL{level}.xml").write_text(text)
    (product / "GRANULE" / "QI_DATA").mkdir()
    (product / "GRANULE" / "QI_DATA" / "MSK_B02.jp2").write_bytes(b"no image")
    return product


def item(
    item_id: str, assets: Mapping[str, Any], *, time: str = "2024-06-01T10:00:00Z", west: float = 10.0, **more: Any
) -> dict[str, Any]:
    """A STAC item of one degree."""
    ring = [[west, 50], [west + 1, 50], [west + 1, 51], [west, 51], [west, 50]]
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": item_id,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": [west, 50, west + 1, 51],
        "properties": {"datetime": time, "eo:cloud_cover": 12.3, **more},
        "links": [],
        "assets": dict(assets),
    }


def asset(href: object, *names: str, **more: Any) -> dict[str, Any]:
    bands = [{"name": name, **({"common_name": COMMON[name]} if name in COMMON else {})} for name in names]
    return {"href": str(href), "type": "image/tiff; application=geotiff", "roles": ["data"], "eo:bands": bands, **more}


def collection(items: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps({"type": "FeatureCollection", "features": list(items)})
