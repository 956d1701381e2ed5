"""Several files of one scene, such as a file per band, put on one grid: that of the finest file. No I/O."""

import math
from collections.abc import Sequence
from dataclasses import replace

from pipeline.errors import ReadError
from pipeline.sources.scene import RasterFile, Scene

MAX_SHIFT = 0.05
"""Of a file against the grid, in pixels of the grid."""


def stack(scenes: Sequence[Scene], name: str) -> Scene:
    """One scene of the files of several. name: its URI.

    The grid is that of the file with the smallest pixels. Raises ReadError (unsupported) if a file has another CRS, if
    its first pixel does not begin where that of the grid does, or if it does not cover the grid.
    """
    if len(scenes) == 1:
        return replace(scenes[0], name=name)
    for scene in scenes:
        if scene.transform is None or scene.crs is None:
            raise ReadError("unsupported", f"{name}: {scene.uri} has no CRS or no transform, so it cannot be aligned")
    grid = min(scenes, key=_pixel_area)
    files = tuple(_aligned(file, scene, grid, name) for scene in scenes for file in scene.files)
    return replace(grid, files=files, name=name)


def _pixel_area(scene: Scene) -> float:
    assert scene.transform is not None
    a, b, _, d, e, _ = scene.transform
    return abs(a * e - b * d)


def _aligned(file: RasterFile, scene: Scene, grid: Scene, name: str) -> RasterFile:
    """The file with its factor to the grid. Raises ReadError (unsupported)."""
    if scene.crs != grid.crs:
        raise _unaligned(name, file, grid, f"its CRS is {scene.crs}, not {grid.crs}")
    origin = _place(scene, grid, 0, 0)
    end_x, skew_y = _place(scene, grid, scene.width, 0)
    skew_x, end_y = _place(scene, grid, 0, scene.height)
    factor = _whole((end_x - origin[0]) / scene.width), _whole((end_y - origin[1]) / scene.height)
    shift = max(map(abs, (*origin, skew_x - origin[0], skew_y - origin[1])))
    drift = max(abs(end_x - scene.width * factor[0]), abs(end_y - scene.height * factor[1]))
    if min(factor) <= 0 or max(shift, drift) > MAX_SHIFT:
        raise _unaligned(name, file, grid, f"its pixels are shifted by {max(shift, drift):.3g} pixels")
    missing = max(grid.width - end_x, grid.height - end_y)
    beyond = max((end_x - grid.width) / factor[0], (end_y - grid.height) / factor[1])
    if missing > MAX_SHIFT or beyond >= 1:
        size = f"{scene.width} × {scene.height}"
        raise _unaligned(name, file, grid, f"its {size} pixels cover another area")
    return replace(file, factor=factor)


def _place(scene: Scene, grid: Scene, column: float, row: float) -> tuple[float, float]:
    """Where a corner of a scene's pixel is, in pixels of the grid."""
    assert scene.transform is not None
    assert grid.transform is not None
    a, b, c, d, e, f = scene.transform
    x, y = a * column + b * row + c, d * column + e * row + f
    a, b, c, d, e, f = grid.transform
    determinant = a * e - b * d
    return (e * (x - c) - b * (y - f)) / determinant, (a * (y - f) - d * (x - c)) / determinant


def _whole(factor: float) -> float:
    """The factor, as a whole number if it is one but for rounding."""
    return float(round(factor)) if round(factor) and math.isclose(factor, round(factor), rel_tol=1e-6) else factor


def _unaligned(name: str, file: RasterFile, grid: Scene, reason: str) -> ReadError:
    return ReadError(
        "unsupported",
        f"{name}: {file.uri} is not on the grid of {grid.files[0].uri}: {reason}; put both on one grid with gdalwarp",
    )
