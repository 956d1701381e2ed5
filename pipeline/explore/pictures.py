"""Small pictures of some images of an output, read from the archive and cut as the network saw them."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline import sources
from pipeline.coverage import Ranges, from_rows
from pipeline.errors import ImageError, NightshiftError
from pipeline.explore.table import Output
from pipeline.images.decode import decode
from pipeline.images.transform import Transform
from pipeline.images.values import Values
from pipeline.planning import plan as plans
from pipeline.sources import ReadOptions, Record

SIDE = 128
QUALITY = 80


def pictures(output: Output, image_ids: Iterable[str]) -> dict[str, bytes]:
    """JPEGs of SIDE × SIDE pixels by image_id. An image that can no longer be read is absent."""
    plan = plans.load(output.uri)
    if plan is None:
        return {}
    made: dict[str, bytes] = {}
    for shard, rows in _places(output, image_ids).items():
        try:
            for record in _records(output, plan, shard, from_rows(sorted(rows))):
                if record.data is not None and record.row in rows:
                    made[rows[record.row]] = _jpeg(output, record.data)
        except (ImageError, NightshiftError, OSError, ValueError):  # the archive was moved, or is not RGB
            continue
    return made


def _places(output: Output, image_ids: Iterable[str]) -> dict[int, dict[int, str]]:
    """Shard → row → image_id."""
    wanted = pa.array(list(image_ids), pa.string())
    places: dict[int, dict[int, str]] = {}
    for batch in output.batches(["shard", "row", "image_id"]):
        for row in batch.filter(pc.is_in(batch.column(2), wanted)).to_pylist():
            places.setdefault(row["shard"], {})[row["row"]] = row["image_id"]
    return places


def _records(output: Output, plan: plans.Plan, shard: int, rows: Ranges) -> Iterator[Record]:
    config = output.settings
    options = ReadOptions((), config.get("image_column"), any_suffix=bool(config.get("any_suffix")))
    items = sources.read(plan.load(shard), rows, options)
    return (item for item in items if isinstance(item, Record))


def _jpeg(output: Output, data: bytes | np.ndarray) -> bytes:
    """Raises ImageError for pixels that are not 8-bit RGB."""
    buffer = io.BytesIO()
    _image(output.settings, data).convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _image(settings: Any, data: bytes | np.ndarray) -> Image.Image:
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).resize((SIDE, SIDE))
    given = Transform(**{name: value for name, value in settings["transform"].items() if name not in ("mean", "std")})
    transform = replace(given, resize=max(SIDE, round(SIDE * given.resize / given.crop)), crop=SIDE)
    scale = settings.get("scale")
    values = Values(tuple(settings.get("bands") or ()), scale and (scale[0], scale[1]), settings.get("nodata_fill"))
    exif_rotate = bool(settings.get("exif_rotate", True))
    pixels = decode(
        data, transform, max_pixels=settings["max_pixels"], exif_rotate=exif_rotate, exact=False, values=values
    ).pixels
    return Image.fromarray(pixels)
