"""Metres per pixel of the windows of one part."""

import pyarrow as pa


def metres_per_pixel(rows: pa.Table) -> float | None:
    """The side of a pixel in metres of the map. rows: results with the columns `crs` and `transform`.

    None unless it is one number: if the pixels of two scenes differ, or are not square to 0.1 %, or are in degrees.
    """
    if not {"crs", "transform"} <= set(rows.column_names):
        return None
    if not len(rows) or rows["crs"].null_count or rows["transform"].null_count:
        return None
    pairs = zip(rows["crs"].to_pylist(), rows["transform"].to_pylist(), strict=True)
    pixels = {(crs, a, b, d, e) for crs, (a, b, _, d, e, _) in pairs}
    from pipeline.geo.footprints import pixel_metres, projection_of  # of the extra [geo]

    if any(projection_of(crs).is_geographic for crs, *_ in pixels):
        return None
    sides = [side for crs, a, b, d, e in pixels for side in pixel_metres((a, b, 0, d, e, 0), crs, 1, 1)]
    return round(sides[0], 6) if max(sides) - min(sides) <= 1e-3 * sides[0] else None
