"""A picture of a map over its scene, north up, with a legend. Needs the extra [geo]."""

import math
import pathlib
from dataclasses import replace
from typing import Any

import numpy as np
import rasterio
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.path import Path
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray
from pyproj import Geod

from pipeline.errors import InputRefused, ReadError
from pipeline.explore.colors import PALETTE, Color
from pipeline.explore.map import MapResult
from pipeline.explore.scenes import IDENTITY, Affine
from pipeline.geo import footprints
from pipeline.geo.windows import Span, Tiling
from pipeline.sources.gdal import Reader
from pipeline.sources.scene import Scene

MAX_SIDE = 1400
"""Pixels of the longer side of the scene in the picture."""
MAX_LISTED = len(PALETTE)
"""Classes in the legend: as many as the palette has colours. The others are grey."""
OPACITY = {"class": 0.65, "score": 0.8, "embedding": 0.8}
"""Of the map over the scene."""
DARKEST = 0.5
"""Grey of the scene's darkest pixels. A darker one would change the colours of the map over it."""
GREY = (0.6, 0.6, 0.6)
INK = "#222222"
DPI = 150
SIDE_INCHES = 7.5
CACHE_BYTES = 64 << 20
STRETCH = (2.0, 98.0)
"""Percentiles of a band that become black and white."""
BAR_SHARE = 0.22
"""Longest scale bar, as a share of the picture's width."""

Picture = NDArray[np.float32]
"""[height, width, 4]: red, green, blue and opacity from 0 to 1."""


def write_quicklook(result: MapResult, raster: pathlib.Path, png: pathlib.Path) -> None:
    """Draw a map over its scene, which is read at the picture's size alone.

    raster: the map. Raises InputRefused if the scene cannot be read or has changed since it was planned.
    """
    scene = result.grid.scene
    figure = Figure(dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = _axes(figure, scene)
    _draw(axes, scene, backdrop(scene), scene.transform or IDENTITY, (scene.width, scene.height), "bilinear")
    picture = _map_picture(result, raster)
    _draw(axes, scene, picture, result.grid.transform, (result.grid.width, result.grid.height), "nearest")
    _frame(axes, scene)
    if scene.crs is not None and scene.transform is not None:
        _scale_bar(axes, scene)
    _title(axes, result)
    _legend(axes, result)
    figure.savefig(png, format="png", bbox_inches="tight", pad_inches=0.15)


def backdrop(scene: Scene) -> Picture:
    """The scene in grey, so that the colours of the map can be told apart, decimated to MAX_SIDE.

    Pixels without data are transparent.
    """
    scale = min(1.0, MAX_SIDE / max(scene.width, scene.height))
    width, height = max(1, round(scene.width * scale)), max(1, round(scene.height * scale))
    small = replace(scene, tiling=Tiling(max(width, height), max(width, height)))
    try:
        reader = Reader(small, _natural_bands(scene), CACHE_BYTES)
        try:
            array = reader.read(Span(0, scene.width, width), Span(0, scene.height, height))
        finally:
            reader.close()
    except (OSError, ReadError) as error:
        raise InputRefused(f"{scene.uri} cannot be drawn: {error}; leave out --png to write the map alone") from error
    array = array[:height, :width]
    missing = np.ma.getmaskarray(array).all(axis=2)
    bands = np.stack([_stretched(array[..., band]) for band in range(array.shape[2])], axis=2)
    rgb = np.repeat(bands, 3, axis=2) if bands.shape[2] == 1 else bands
    grey = DARKEST + (1 - DARKEST) * (rgb @ np.array([0.299, 0.587, 0.114], np.float32))
    return np.dstack([grey, grey, grey, ~missing]).astype(np.float32)


def _natural_bands(scene: Scene) -> list[int]:
    """Indices of red, green and blue if the file names them, else of the first three bands, or of the first."""
    roles = [band.role for band in scene.bands]
    if {"red", "green", "blue"} <= set(roles):
        return [roles.index(role) for role in ("red", "green", "blue")]
    others = [index for index, role in enumerate(roles) if role != "alpha"]
    return others[:3] if len(others) >= 3 else others[:1] or [0]


def _stretched(band: Any) -> NDArray[np.float32]:
    """A band from 0 to 1, between its percentiles STRETCH."""
    values = np.ma.getdata(band).astype(np.float32)
    known = values[~np.ma.getmaskarray(band) & np.isfinite(values)]
    low, high = np.percentile(known, STRETCH) if len(known) else (0, 1)
    return np.nan_to_num((values - low) / max(high - low, 1e-12)).clip(0, 1)


def _map_picture(result: MapResult, raster: pathlib.Path) -> Picture:
    """The colours of a map, decimated to MAX_SIDE."""
    with rasterio.open(raster) as file:
        scale = min(1.0, MAX_SIDE / max(file.width, file.height))
        shape = max(1, round(file.height * scale)), max(1, round(file.width * scale))
        data = file.read(out_shape=(file.count, *shape))
        valid = file.dataset_mask(out_shape=shape) > 0
    if result.shown == "embedding":
        rgb = data[:3].transpose(1, 2, 0) / 255
    elif result.shown == "score":
        rgb = _viridis()(np.nan_to_num(data[0]))[..., :3]
    else:
        rgb = _class_colors(result, data[0])
    return np.dstack([rgb, valid * OPACITY[result.shown]]).astype(np.float32)


def _viridis() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"]


def _class_colors(result: MapResult, labels: NDArray[Any]) -> NDArray[np.float64]:
    listed = _listed(result)
    rgb = np.full((*labels.shape, 3), GREY)
    for label in listed:
        rgb[labels == label] = _fraction(result.colors[label])
    return rgb


def _listed(result: MapResult) -> list[int]:
    """The label_ids of the legend: those of most pixels, largest first."""
    shown = [label for label in result.classes.by_frequency() if result.class_pixels.get(label)]
    return sorted(shown[:MAX_LISTED], key=lambda label: (-result.class_pixels[label], label))


def _matrix(transform: Affine) -> Affine2D:
    """From pixels to the map's coordinates, relative to the first corner."""
    a, b, _, d, e, _ = transform
    return Affine2D.from_values(a, d, b, e, 0, 0)


def _bounds(scene: Scene) -> tuple[float, float, float, float]:
    """Left, bottom, right and top of a scene in the coordinates of its CRS, relative to its first corner."""
    corners = np.array([(0, 0), (scene.width, 0), (0, scene.height), (scene.width, scene.height)], np.float64)
    points = _matrix(scene.transform or IDENTITY).transform(corners)
    return (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())


def _axes(figure: Figure, scene: Scene) -> Axes:
    """Axes in the shape of the scene on the ground, whose longer side is SIDE_INCHES."""
    left, bottom, right, top = _bounds(scene)
    ratio = (top - bottom) * _stretch_of_degrees(scene) / (right - left)
    width, height = (SIDE_INCHES, SIDE_INCHES * ratio) if ratio <= 1 else (SIDE_INCHES / ratio, SIDE_INCHES)
    figure.set_size_inches(max(width, 1.5), max(height, 1.5))
    return figure.add_axes((0, 0, 1, 1))


def _stretch_of_degrees(scene: Scene) -> float:
    """Height of a unit of the map relative to its width: more than 1 for degrees away from the equator."""
    if scene.crs is None or scene.transform is None or not footprints.projection_of(scene.crs).is_geographic:
        return 1.0
    _, _, _, d, e, f = scene.transform
    latitude = f + d * scene.width / 2 + e * scene.height / 2
    return 1 / max(0.05, math.cos(math.radians(min(89.0, abs(latitude)))))


def _draw(axes: Axes, scene: Scene, picture: Picture, transform: Affine, size: tuple[int, int], how: str) -> None:
    """Draw an image whose `size` (width, height) pixels lie where a transform puts them."""
    width, height = size
    image = axes.imshow(picture, extent=(0, width, height, 0), interpolation=how, origin="upper", aspect="auto")
    image.set_transform(_matrix(transform) + axes.transData)
    outline = Affine2D().scale(scene.width, scene.height) + _matrix(scene.transform or IDENTITY) + axes.transData
    image.set_clip_path(Path.unit_rectangle(), outline)  # the last pixels of a map may go beyond the scene


def _frame(axes: Axes, scene: Scene) -> None:
    """Set the limits, which imshow has changed, and hide the ticks, because the coordinates are relative."""
    left, bottom, right, top = _bounds(scene)
    axes.set_xlim(left, right)
    axes.set_ylim((top, bottom) if scene.transform is None else (bottom, top))
    axes.set_aspect(_stretch_of_degrees(scene), adjustable="box")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#888888")
        spine.set_linewidth(0.6)


def _scale_bar(axes: Axes, scene: Scene) -> None:
    """A bar of a round length on the ground, measured at the scene's centre, and an arrow to the north."""
    metres = _metres_across(axes, scene)
    if metres is None:
        return
    length = _round_length(metres * BAR_SHARE)
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    left, right, y = 0.03, 0.03 + length / metres, 0.035
    for color, width in (("white", 6.0), (INK, 3.0)):
        axes.plot([left, right], [y, y], color=color, linewidth=width, transform=axes.transAxes, solid_capstyle="butt")
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "boxstyle": "round,pad=0.2"}
    axes.text(left, y + 0.02, text, transform=axes.transAxes, fontsize=8, color=INK, va="bottom", bbox=box)
    axes.annotate(
        "N",
        xy=(0.965, 0.975),
        xytext=(0.965, 0.90),
        xycoords="axes fraction",
        ha="center",
        va="center",
        fontsize=9,
        color=INK,
        bbox=box,
        arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.2},
    )


def _metres_across(axes: Axes, scene: Scene) -> float | None:
    """Length on the ground of a line across the middle of the picture; None if the CRS does not reach there."""
    assert scene.crs is not None
    assert scene.transform is not None
    _, _, c, _, _, f = scene.transform
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    middle = (bottom + top) / 2
    step = (right - left) / 100  # short, so that it does not cross half of the world
    centre = (left + right) / 2
    points = np.array([[c + centre, f + middle], [c + centre + step, f + middle]])
    degrees = footprints.projection_of(scene.crs).degrees(points)
    if degrees is None:
        return None
    _, _, metres = Geod(ellps="WGS84").inv(*degrees[0], *degrees[1])
    return float(metres) * 100 if metres > 0 else None


def _round_length(limit: float) -> float:
    """The largest of 1, 2, 5, 10, 20 … metres that is not longer than the limit."""
    power = 10.0 ** math.floor(math.log10(limit))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= limit * 1.0001)


def _title(axes: Axes, result: MapResult) -> None:
    scene, tiling = result.grid.scene, result.grid.scene.tiling
    unit = "pixels" if tiling.resolution is None else f"pixels of {tiling.resolution:g} m"
    model = f"{result.model} · " if result.model else ""
    axes.set_title(scene.uri.rpartition("/")[2], fontsize=11, fontweight="bold", loc="left", color=INK, pad=20)
    stride = f", every {tiling.stride}" if tiling.stride != tiling.size else ""
    text = f"{model}windows of {tiling.size} {unit}{stride}"
    axes.text(0, 1.008, text, transform=axes.transAxes, fontsize=8, color="#555555", va="bottom")


def _legend(axes: Axes, result: MapResult) -> None:
    if result.shown == "score":
        _score_bar(axes)
        return
    if result.shown == "embedding":
        names = ("first", "second", "third")
        colors = ("#D62728", "#2CA02C", "#1F77B4")
        handles = [
            Patch(color=color, label=f"{name} component  {share:.0%}")
            for color, name, share in zip(colors, names, result.explained, strict=True)
        ]
        title = "share of variance"
    else:
        handles = _class_handles(result)
        title = "class, share of the map"
    legend = axes.legend(
        handles=handles,
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.015, 1.0),
        borderaxespad=0,
        frameon=False,
        fontsize=8.5,
        handlelength=1.4,
        handleheight=1.2,
        labelcolor=INK,
        alignment="left",
    )
    legend.get_title().set_fontsize(8.5)
    legend.get_title().set_color("#555555")


def _class_handles(result: MapResult) -> list[Patch]:
    total = result.grid.width * result.grid.height
    listed = _listed(result)
    handles = [
        Patch(
            color=_over_scene(_fraction(result.colors[label])),
            label=f"{_short(result.classes.names[label])}  {share:.1%}",
        )
        for label in listed
        for share in [result.class_pixels[label] / total]
    ]
    others = [label for label, pixels in result.class_pixels.items() if pixels and label not in listed]
    if others:
        share = sum(result.class_pixels[label] for label in others) / total
        handles.append(Patch(color=_over_scene(GREY), label=f"{len(others)} other classes  {share:.1%}"))
    if result.pixels < total:
        share = 1 - result.pixels / total
        handles.append(Patch(facecolor="white", edgecolor="#999999", label=f"no result  {share:.1%}"))
    return handles


def _fraction(color: Color) -> tuple[float, float, float]:
    red, green, blue = color
    return red / 255, green / 255, blue / 255


def _over_scene(color: tuple[float, float, float]) -> tuple[float, float, float]:
    """A colour of the legend as it looks over a part of the scene that is neither dark nor bright."""
    opacity, middle = OPACITY["class"], (1 + DARKEST) / 2
    red, green, blue = (part * opacity + middle * (1 - opacity) for part in color)
    return red, green, blue


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"{name[:31]}…"


def _score_bar(axes: Axes) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    side = axes.inset_axes((1.02, 0.25, 0.035, 0.75))
    bar = axes.figure.colorbar(ScalarMappable(Normalize(0, 1), _viridis()), cax=side)
    bar.outline.set_linewidth(0.4)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.ax.set_title("score", fontsize=8.5, color="#555555", loc="left")
