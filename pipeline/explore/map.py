"""`nightshift map`: the results of a scene's windows as a raster in the scene's own CRS, a cloud-optimized GeoTIFF."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputRefused, OutputRefused, SettingRefused
from pipeline.explore import votes
from pipeline.explore.colors import Color, chosen_colors, class_colors
from pipeline.explore.scenes import WINDOW_COLUMNS, Grid, choose
from pipeline.explore.table import Output, open_output
from pipeline.explore.target import SIDECAR, check_target, need_geo, replaced
from pipeline.explore.votes import Block, Classes, WindowValues
from pipeline.sources.scene import Scene
from pipeline.storage import uris
from pipeline.version import __version__

SHOWN = ("class", "score", "embedding")
MAX_PALETTE_ID = 65_534
"""A GeoTIFF has a table of colours for numbers of 8 and 16 bits; the largest number is no data."""
COMPONENTS = 3
PCA_ROWS = 4096
STRETCH_ROWS = 100_000
STRETCH = (2.0, 98.0)
"""Percentiles of a component that become dark and bright."""
SUFFIXES = (".tif", ".tiff")


@dataclass(frozen=True)
class MapResult:
    """A map that was written.

    shown: class, score or embedding. pixels: number of those with data. model: name of the network, "" if it has none.
    is_finished: the run has ended. classes, colors, class_pixels: of maps of classes, by label_id. explained: shares of
    the variance of the three components.
    """

    grid: Grid
    shown: str
    pixels: int
    model: str
    is_finished: bool
    classes: Classes = field(default_factory=Classes)
    colors: Mapping[int, Color] = field(default_factory=dict)
    class_pixels: Mapping[int, int] = field(default_factory=dict)
    explained: tuple[float, ...] = ()

    def describe(self) -> str:
        """One line: the file, its size, and how much of it has data."""
        total = self.grid.width * self.grid.height
        state = "" if self.is_finished else "; the run has not finished, so pixels may be missing"
        return (
            f"{self.shown} of {self.grid.scene.uri}, {self.grid.width:,} × {self.grid.height:,} pixels, "
            f"{self.pixels / total:.1%} with data{state}"
        )


def write_map(
    output: str,
    to: Path | None,
    scene: str | None = None,
    show: str = "class",
    *,
    png: Path | None = None,
    colors: Mapping[str, Color] | None = None,
    overwrite: bool = False,
) -> MapResult:
    """Write the map of one scene of an output, as a cloud-optimized GeoTIFF, as a picture over the scene, or both.

    to: the GeoTIFF. scene: URI of the scene, or the end of it; None for the only one. show: `class` (label_id, with
    colours), `score` (float32), or `embedding` (the first three principal components as red, green, blue and alpha).
    Pixels without a result have no data. png: the picture. colors: of all classes, by name. Raises SettingRefused,
    InputRefused and OutputRefused.
    """
    if show not in SHOWN:
        raise SettingRefused(f"--show is {show!r}: it must be one of {', '.join(SHOWN)}")
    if colors is not None and show != "class":
        raise SettingRefused(f"--colors gives classes their colours, and --show {show} has no classes: leave it out")
    need_geo("nightshift map", "rasterio", *["sklearn"] * (show == "embedding"), *["matplotlib"] * (png is not None))
    targets = [path for path in (to, png) if path]
    if not targets:
        raise SettingRefused("give --to MAP.tif, --png PICTURE.png, or both")
    for path, flag, suffixes in ((to, "--to", SUFFIXES), (png, "--png", (".png",))):
        if path:
            check_target(path, flag, suffixes, overwrite)
    opened = open_output(output)
    if "tile_z" in opened.columns and "window_col" not in opened.columns:
        raise InputRefused(
            f"{opened.uri} has tiles, and a map is drawn on the grid of a scene: write their footprints with "
            "`nightshift export`"
        )
    opened.require([*WINDOW_COLUMNS, *COLUMNS_SHOWN[show]])
    grid = Grid.of(choose(opened, scene))
    if to and to.exists() and uris.is_local(grid.scene.uri) and to.samefile(grid.scene.uri):
        raise SettingRefused(f"--to {to} is the scene itself; choose another file")
    write = WRITERS[show] if colors is None else partial(_write_class, given=colors)
    with replaced(*targets) as folder:
        return _write(opened, grid, write, to, png, folder)


def _write(output: Output, grid: Grid, write: "Writer", to: Path | None, png: Path | None, folder: Path) -> MapResult:
    """Write the files into a folder. A map that only the picture needs gets a name of its own."""
    raster = to or Path("map-of-picture.tif")
    result = write(output, grid, raster, folder)
    if png:
        from pipeline.explore.quicklook import write_quicklook

        write_quicklook(result, folder / raster.name, folder / png.name)
    return result


COLUMNS_SHOWN = {"class": ["label_id"], "score": ["label_id", "score"], "embedding": ["embedding"]}


def _write_class(
    output: Output, grid: Grid, to: Path, folder: Path, given: Mapping[str, Color] | None = None
) -> MapResult:
    """given: the colours of all classes, by name; by default those of `class_colors`."""
    from pipeline.explore import cog

    with WindowValues(grid, 2) as values:
        classes = votes.read_classes(output, values)
        labels = classes.by_frequency()
        dtype, nodata = _class_type(classes.max_id)
        counts: dict[int, int] = dict.fromkeys(labels, 0)

        def pixels(block: Block) -> tuple[NDArray[Any], int]:
            winner, _ = votes.elect(values, block)
            found, number = np.unique(winner[winner >= 0], return_counts=True)
            for label, count in zip(found.tolist(), number.tolist(), strict=True):
                counts[label] += count
            return np.where(winner >= 0, winner, nodata).astype(dtype)[None], int(number.sum())

        names = {label: classes.names[label] for label in labels}
        colors = class_colors(labels) if given is None else chosen_colors(names, given)
        colormap = {label: (*color, 255) for label, color in colors.items()} if classes.max_id <= MAX_PALETTE_ID else {}
        raster = cog.Raster(
            dtype,
            ("class (label_id)",),
            nodata,
            tags={f"CLASS_{label}": name for label, name in sorted(names.items())},
            colormap=colormap,
            resampling="MODE",
        )
        total = cog.write(raster, grid, folder / to.name, pixels, _provenance(output, grid))
    if classes.max_id <= MAX_PALETTE_ID:
        cog.write_names(folder / (to.name + SIDECAR), names)
    return MapResult(grid, "class", total, _model(output), output.is_finished, classes, colors, counts)


def _class_type(max_id: int) -> tuple[str, int]:
    """The number type of a map of classes, and its value for no data, which is no label_id."""
    if max_id < 255:
        return "uint8", 255
    return ("uint16", MAX_PALETTE_ID + 1) if max_id <= MAX_PALETTE_ID else ("int32", -1)


def _model(output: Output) -> str:
    return str(output.settings.get("model", ""))


def _provenance(output: Output, grid: Grid) -> dict[str, str]:
    """Where a map comes from, as metadata of its file."""
    tiling = grid.scene.tiling
    return {
        "TIFFTAG_SOFTWARE": f"nightshift {__version__}",
        "SCENE": grid.scene.uri,
        "OUTPUT": uris.redact(output.uri),
        "MODEL": _model(output),
        "FINGERPRINT": str(output.record.get("fingerprint", "")),
        "WINDOW_SIZE": str(tiling.size),
        "WINDOW_STRIDE": str(tiling.stride),
    }


def _write_score(output: Output, grid: Grid, to: Path, folder: Path) -> MapResult:
    from pipeline.explore import cog

    with WindowValues(grid, 2) as values:
        classes = votes.read_classes(output, values)

        def pixels(block: Block) -> tuple[NDArray[Any], int]:
            winner, score = votes.elect(values, block)
            return score[None], int((winner >= 0).sum())

        raster = cog.Raster("float32", ("score",), float("nan"))
        total = cog.write(raster, grid, folder / to.name, pixels, _provenance(output, grid))
    return MapResult(grid, "score", total, _model(output), output.is_finished, classes)


def _write_embedding(output: Output, grid: Grid, to: Path, folder: Path) -> MapResult:
    from pipeline.explore import cog

    pca = _fitted(output, grid.scene)
    with WindowValues(grid, COMPONENTS) as values:
        low, high = _project(output, grid.scene, pca, values)

        def pixels(block: Block) -> tuple[NDArray[Any], int]:
            mean = votes.mean(values, block)
            has_data = np.asarray(np.isfinite(mean).all(axis=2))
            scaled = (np.nan_to_num(mean) - low) / (high - low) * 255
            color = np.where(has_data[..., None], scaled.clip(0, 255).round(), 0)
            rgba = np.concatenate([color, np.where(has_data, 255, 0)[..., None]], axis=2).astype(np.uint8)
            return rgba.transpose(2, 0, 1), int(has_data.sum())

        shares = tuple(float(share) for share in pca.explained_variance_ratio_)
        names = tuple(f"principal component {i + 1} ({share:.1%} of variance)" for i, share in enumerate(shares))
        raster = cog.Raster("uint8", (*names, "alpha"), None, roles=("red", "green", "blue", "alpha"))
        total = cog.write(raster, grid, folder / to.name, pixels, _provenance(output, grid))
    return MapResult(grid, "embedding", total, _model(output), output.is_finished, explained=shares)


Writer = Callable[[Output, Grid, Path, Path], MapResult]
WRITERS: Mapping[str, Writer] = {
    "class": _write_class,
    "score": _write_score,
    "embedding": _write_embedding,
}


def vectors(batch: Any, name: str = "embedding") -> NDArray[np.float32]:
    """A column of vectors as float32 [rows, width]."""
    column = batch[name]
    width = column.type.list_size
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(-1, width)


def _finite(batch: Any) -> tuple[Any, NDArray[np.float32]]:
    """The rows of a batch whose vectors are finite, and these vectors. The others have no place on the map."""
    import pyarrow as pa

    all_vectors = vectors(batch)
    is_finite = np.isfinite(all_vectors).all(axis=1)
    return batch.filter(pa.array(is_finite)), all_vectors[is_finite]


def _fitted(output: Output, scene: Scene) -> Any:
    """The principal components of the scene's embeddings, fitted on PCA_ROWS rows at a time."""
    import pyarrow as pa
    from sklearn.decomposition import IncrementalPCA

    type_ = output.schema.field("embedding").type
    if not pa.types.is_fixed_size_list(type_) or type_.list_size < COMPONENTS:
        raise OutputRefused(
            f"{output.uri}: a map of embeddings needs vectors of {COMPONENTS} numbers or more, not {type_}"
        )
    pca, rows = IncrementalPCA(COMPONENTS), []
    count = 0
    for batch in output.batches(["embedding"], PCA_ROWS, equal={"scene": scene.uri}):
        finite = _finite(batch)[1]
        rows.append(finite)
        count += len(finite)
        if sum(map(len, rows)) >= PCA_ROWS:
            pca.partial_fit(np.concatenate(rows))
            rows = []
    if count < COMPONENTS:
        raise OutputRefused(
            f"{scene.uri} has {count} rows with finite vectors so far; principal components need {COMPONENTS} or more"
        )
    if rows and (last := np.concatenate(rows)).shape[0] >= COMPONENTS:  # scikit-learn refuses fewer
        pca.partial_fit(last)
    return pca


def _project(output: Output, scene: Scene, pca: Any, values: WindowValues) -> tuple[Any, Any]:
    """Store the components of each window. Returns the values of each component that become dark and bright."""
    sample: list[NDArray[np.float32]] = []
    random = np.random.default_rng(0)
    share = min(1.0, STRETCH_ROWS / max(1, values.grid.down.windows * values.grid.across.windows))
    for batch in output.batches([*WINDOW_COLUMNS, "embedding"], PCA_ROWS, equal={"scene": scene.uri}):
        rows, finite = _finite(batch)
        if not len(finite):
            continue
        projected = pca.transform(finite).astype(np.float32)
        values.put(rows, projected)
        sample.append(projected[random.random(len(projected)) < share])
    both = np.concatenate(sample)
    low, high = np.percentile(both if len(both) else projected, STRETCH, axis=0)
    return low, np.where(high > low, high, low + 1)
