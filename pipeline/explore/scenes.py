"""The scenes of an output, and the grid of a scene's map.

A map has one pixel per step from window to window: `stride` pixels as the network got them. Its first corner is the
scene's own, and its transform is the scene's, scaled. So map and scene lie exactly on each other. If windows leave gaps
(a stride that is larger than the window), pixels are the largest that fit into both, so that the gaps are pixels too.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputRefused, OutputRefused, SettingRefused
from pipeline.explore.table import Output
from pipeline.geo.windows import Axis
from pipeline.planning import plan as plans
from pipeline.sources.scene import Scene
from pipeline.storage import uris

MAX_NAMES = 20
SCENE_COLUMN = "scene"
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

Numbers = NDArray[np.int64]
Affine = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Line:
    """The windows along one axis of a scene, and the pixels of the map along it.

    pixel: its length, in pixels of the scene. edges: where pixels begin and end, [pixels + 1], the last at the end of
    the scene. starts, stops: of each window. first, stop: for each pixel the range of windows that cover its centre.
    """

    pixel: float
    edges: NDArray[np.float64]
    starts: Numbers
    stops: Numbers
    first: Numbers
    stop: Numbers

    @staticmethod
    def of(axis: Axis) -> "Line":
        step = axis.stride if axis.stride <= axis.size else math.gcd(axis.stride, axis.size)
        pixel = step * axis.factor
        pixels = max(1, math.ceil(axis.length / pixel - 1e-9))
        spans = [axis.span(index) for index in range(axis.count)]
        starts = np.array([span.start for span in spans], np.int64)
        stops = np.array([span.start + span.length for span in spans], np.int64)
        edges = np.minimum(np.arange(pixels + 1) * pixel, axis.length)
        centres = (edges[:-1] + edges[1:]) / 2
        first = np.searchsorted(stops, centres, side="right")
        return Line(pixel, edges, starts, stops, first, np.searchsorted(starts, centres, side="right"))

    @property
    def pixels(self) -> int:
        """Number of pixels of the map."""
        return len(self.edges) - 1

    @property
    def windows(self) -> int:
        return len(self.starts)

    @cached_property
    def overlap(self) -> int:
        """The largest number of windows over one pixel."""
        return int((self.stop - self.first).max(initial=0))

    def covering(self, pixels: slice, number: int) -> tuple[Numbers, NDArray[np.float64]]:
        """The window `number` of those over the centre of each pixel, and the share of the pixel that it covers.

        The share is 0 for a pixel with fewer windows.
        """
        windows = self.first[pixels] + number
        exists = windows < self.stop[pixels]
        windows = windows.clip(max=self.windows - 1)
        begin, end = self.edges[:-1][pixels], self.edges[1:][pixels]
        covered = np.minimum(end, self.stops[windows]) - np.maximum(begin, self.starts[windows])
        return windows, np.where(exists, covered / (end - begin), 0)

    def index(self, starts: Numbers, lengths: Numbers) -> Numbers:
        """The number of each window, by its start and length. Raises ValueError for one that is not of this axis."""
        found = np.searchsorted(self.starts, starts).clip(max=self.windows - 1)
        if not self.windows or (self.starts[found] != starts).any() or (self.stops[found] - starts != lengths).any():
            raise ValueError("a window is not one of the plan")
        return found


@dataclass(frozen=True)
class Grid:
    """A scene, its windows across and down, and the pixels of its map."""

    scene: Scene
    across: Line
    down: Line

    @staticmethod
    def of(scene: Scene) -> "Grid":
        grid = Grid(scene, Line.of(scene.across), Line.of(scene.down))
        if any((np.diff(line.starts) <= 0).any() for line in (grid.across, grid.down)):
            raise OutputRefused(f"{scene.uri}: its windows are less than a pixel apart, which makes no map")
        return grid

    @property
    def width(self) -> int:
        return self.across.pixels

    @property
    def height(self) -> int:
        return self.down.pixels

    @property
    def transform(self) -> Affine:
        """Of the map's pixels, in the order a to f. Without a transform, that of pixels of the scene."""
        a, b, c, d, e, f = self.scene.transform or IDENTITY
        return a * self.across.pixel, b * self.down.pixel, c, d * self.across.pixel, e * self.down.pixel, f

    def places(self, batch: Any) -> tuple[Numbers, Numbers]:
        """Row and column of each window of a batch with the columns of WINDOW_COLUMNS. Raises OutputRefused."""
        column, row, width, height = (batch[name].to_numpy(zero_copy_only=False) for name in WINDOW_COLUMNS)
        try:
            return self.down.index(row, height), self.across.index(column, width)
        except ValueError as error:
            raise OutputRefused(
                f"{self.scene.uri} has rows that are no windows of its plan; run jobs/verify.py on the output"
            ) from error


WINDOW_COLUMNS = ("window_col", "window_row", "window_width", "window_height")


def choose(output: Output, name: str | None) -> Scene:
    """The scene that `--scene` names: its URI, or the end of it after a slash. Without a name, the only scene.

    Raises InputRefused if the output has no scenes, and SettingRefused if none or several of them are meant.
    """
    scenes = {scene.uri: scene for scene in _scenes(output)}
    if not scenes:
        raise InputRefused(
            f"{output.uri} has no scenes: a map needs rows of raster scenes; run the job with --tile-size on GeoTIFFs"
        )
    if name is None:
        if len(scenes) > 1:
            raise SettingRefused(f"{output.uri} has {len(scenes)} scenes; choose one with --scene: {_listed(scenes)}")
        return next(iter(scenes.values()))
    wanted = uris.normalize(name)
    matches = [uri for uri in scenes if uri in (name, wanted)] or [uri for uri in scenes if uri.endswith(f"/{name}")]
    if len(matches) != 1:
        number = "several scenes" if matches else "no scene"
        raise SettingRefused(f"--scene {name} names {number} of {output.uri}: {_listed(matches or scenes)}")
    return scenes[matches[0]]


def _scenes(output: Output) -> Iterator[Scene]:
    """The scenes of the plan that were not replaced, once for each of their shards."""
    plan = _plan(output)
    for shard in plans.read_shards(plan):
        if isinstance(shard.payload, Scene) and plan.planned(shard.index):
            yield shard.payload


def _plan(output: Output) -> plans.Plan:
    """The plan that has the scenes: of `classify --from`, that of the output with the vectors."""
    if not output.settings.get("vectors"):
        if (plan := plans.load(output.uri)) is None:
            raise InputRefused(f"{output.uri} has no plan yet: run its job again")
        return plan
    (source,) = output.settings["input"]
    if (plan := plans.load(source)) is None:
        raise InputRefused(
            f"{output.uri} has the classes of the vectors in {source}, whose plan has the scenes, but there is no plan "
            "now: put that output back in its place"
        )
    return plan


def _listed(names: Any) -> str:
    shown = sorted(names)
    more = f" and {len(shown) - MAX_NAMES} more" if len(shown) > MAX_NAMES else ""
    return ", ".join(shown[:MAX_NAMES]) + more
