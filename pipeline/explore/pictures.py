"""Small pictures of some images of an output, read from the archive and cut as the network saw them."""

import contextlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline import sources
from pipeline.coverage import Ranges, from_rows
from pipeline.errors import ImageError, NightshiftError
from pipeline.explore.table import Output, open_output
from pipeline.images.decode import decode
from pipeline.images.transform import Transform
from pipeline.images.values import Values
from pipeline.images.windows import to_pixels
from pipeline.planning import plan as plans
from pipeline.sources import ReadOptions, Record
from pipeline.storage import uris

SIDE = 128
QUALITY = 80
RGB_BANDS = 3
NO_PICTURE = (ImageError, NightshiftError, OSError, ValueError, TypeError, KeyError)
"""The archive was moved, or the image is damaged, or not RGB."""

Places = Mapping[int, Mapping[int, str]]
"""Shard → row → image_id."""


def pictures(output: Output, image_ids: Iterable[str]) -> dict[str, bytes]:
    """JPEGs of SIDE × SIDE pixels by image_id. An image that can no longer be read is absent."""
    plan = plans.load(output.uri)
    return {} if plan is None else pictures_at(output, plan, _places(output, image_ids))


def pictures_at(output: Output, plan: plans.Plan, places: Places, side: int = SIDE) -> dict[str, bytes]:
    """JPEGs of side × side pixels by image_id, of images whose places are known. As `pictures`."""
    if output.settings.get("vectors"):
        with contextlib.suppress(*NO_PICTURE):
            return _of_original(output, plan, places, side)
    if "transform" not in output.settings:
        return {}
    made: dict[str, bytes] = {}
    for shard, rows in places.items():
        try:
            for record in _records(output, plan, shard, from_rows(sorted(rows))):
                if record.data is not None and record.row in rows:
                    with contextlib.suppress(*NO_PICTURE):
                        made[rows[record.row]] = _jpeg(output, record.data, side)
        except NO_PICTURE:
            continue
    return made


def _of_original(output: Output, plan: plans.Plan, places: Places, side: int) -> dict[str, bytes]:
    """The pictures of an output that was computed from the vectors of another one, whose parts are its shards."""
    original, original_plan, firsts = _opened(output.settings["input"][0])
    of_original: dict[int, dict[int, str]] = {}
    for shard, rows in places.items():
        first = firsts[plan.load(shard).uri]
        table = original.take(first + np.array(sorted(rows), np.int64), ["shard", "row", "image_id"])
        for each in table.to_pylist():
            of_original.setdefault(each["shard"], {})[each["row"]] = each["image_id"]
    return pictures_at(original, original_plan, of_original, side) if original_plan else {}


@lru_cache(maxsize=2)
def _opened(uri: str) -> tuple[Output, plans.Plan | None, dict[str, int]]:
    """A finished output, its plan, and the position of the first row of each part by its URI."""
    output = open_output(uri)
    starts = itertools.accumulate((part.rows for part in output.parts), initial=0)
    firsts = {uris.join(output.uri, part.path): start for part, start in zip(output.parts, starts, strict=False)}
    return output, plans.load(output.uri), firsts


def _places(output: Output, image_ids: Iterable[str]) -> dict[int, dict[int, str]]:
    wanted = pa.array(list(image_ids), pa.string())
    places: dict[int, dict[int, str]] = {}
    for batch in output.batches(["shard", "row", "image_id"]):
        for row in batch.filter(pc.is_in(batch.column(2), wanted)).to_pylist():
            places.setdefault(row["shard"], {})[row["row"]] = row["image_id"]
    return places


def _records(output: Output, plan: plans.Plan, shard: int, rows: Ranges) -> Iterator[Record]:
    config = output.settings
    options = ReadOptions(
        image_column=config.get("image_column"),
        any_suffix=bool(config.get("any_suffix")),
        bands=tuple(config.get("bands") or ()),
        network_bands=RGB_BANDS,
    )
    items = sources.read(plan.load(shard), rows, options)
    return (item for item in items if isinstance(item, Record))


def _jpeg(output: Output, data: bytes | np.ndarray, side: int) -> bytes:
    """Raises ImageError for pixels that are not 8-bit RGB."""
    buffer = io.BytesIO()
    _image(output.settings, data, side).convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _image(settings: Any, data: bytes | np.ndarray, side: int) -> Image.Image:
    scale = settings.get("scale")
    values = Values(tuple(settings.get("bands") or ()), scale and (scale[0], scale[1]), settings.get("nodata_fill"))
    if isinstance(data, np.ma.MaskedArray):
        return Image.fromarray(to_pixels(data, _transform(settings, side), values))
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).resize((side, side))
    exif_rotate = bool(settings.get("exif_rotate", True))
    pixels = decode(
        data,
        _transform(settings, side),
        max_pixels=settings["max_pixels"],
        exif_rotate=exif_rotate,
        exact=False,
        values=values,
    ).pixels
    return Image.fromarray(pixels)


def _transform(settings: Any, side: int) -> Transform:
    """The run's transform with a crop of another size."""
    given = Transform(**{name: value for name, value in settings["transform"].items() if name not in ("mean", "std")})
    return replace(given, resize=max(side, round(side * given.resize / given.crop)), crop=side)
