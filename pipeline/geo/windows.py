"""Windows of a raster: where they begin and end, and how they are cut into runs. No I/O."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

EDGES = ("pad", "drop", "shift")
RESAMPLINGS = ("auto", "nearest", "bilinear", "cubic", "average")
MAX_ROUNDING = 0.05
"""Share of a window's side that its edges may be off, because they lie between two pixels of the scene."""
MAX_WINDOWS = 2048
"""Windows of one shard, so that a cluster shares a large scene."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a scene is cut into windows.

    size: side of a window in pixels, as the network gets it. stride: distance of two windows in the same pixels.
    edge: what becomes of the part of a scene after its last whole window. pad: one window more, which the scene fills
    in part. drop: nothing. shift: one window more, which ends with the scene.
    resolution: metres per pixel; None for the scene's own pixels.
    max_nodata: a window with a larger share of pixels without data is empty.
    resampling: nearest, bilinear, cubic or average; auto: bilinear to finer pixels, average to coarser ones.
    """

    size: int
    stride: int
    edge: str = "pad"
    resolution: float | None = None
    max_nodata: float = 0.9
    resampling: str = "auto"


@dataclass(frozen=True, slots=True)
class Span:
    """One axis of a window. start, length: pixels of the scene, at full resolution. pixels: as they are read."""

    start: int
    length: int
    pixels: int


@dataclass(frozen=True, slots=True)
class Axis:
    """The windows along one side of a scene.

    length: of the side, in the scene's own pixels. factor: of these, the number that becomes one pixel of a window.
    """

    length: int
    size: int
    stride: int
    edge: str
    factor: float = 1.0

    @property
    def pixels(self) -> int:
        """Length of the side in pixels of the windows."""
        return max(1, round(self.length / self.factor))

    @property
    def count(self) -> int:
        """Number of windows."""
        whole = max(0, (self.pixels - self.size) // self.stride + 1)
        if self.edge == "drop" or (whole and (whole - 1) * self.stride + self.size >= self.pixels):
            return whole
        if self.edge == "shift":
            return whole + 1
        with_rest = max(0, math.ceil((self.pixels - self.size) / self.stride)) + 1
        return min(with_rest, math.ceil(self.pixels / self.stride))  # a wide stride may step over the rest

    def span(self, index: int) -> Span:
        """The part of the scene inside of window `index`."""
        first = index * self.stride
        if self.edge == "shift":
            first = max(0, min(first, self.pixels - self.size))
        pixels = min(self.size, self.pixels - first)
        start = min(round(first * self.factor), self.length - 1)
        stop = self.length if first + pixels == self.pixels else round((first + pixels) * self.factor)
        return Span(start, max(1, stop - start), pixels)

    @property
    def rounding(self) -> float:
        """Bound of the share of a window's side by which it is longer or shorter, as it covers whole pixels."""
        sides = self.size * self.factor, self.stride * self.factor
        is_exact = all(math.isclose(side, round(side), rel_tol=1e-6) for side in sides)
        return 0.0 if is_exact else 1 / sides[0]

    def aligned(self, block: int) -> int:
        """The number of windows after which a window begins again where a block of the file does; 1 if that is late."""
        if self.factor != 1:
            return 1
        windows = math.lcm(self.stride, block) // self.stride
        return windows if windows <= MAX_WINDOWS // 4 else 1


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of windows: columns and rows of windows, from `first` to before `stop`. Numbered row by row."""

    first_column: int
    stop_column: int
    first_row: int
    stop_row: int

    @property
    def count(self) -> int:
        return (self.stop_column - self.first_column) * (self.stop_row - self.first_row)

    def place(self, number: int) -> tuple[int, int]:
        """Column and row of a window, by its number in this part."""
        row, column = divmod(number, self.stop_column - self.first_column)
        return self.first_column + column, self.first_row + row


NO_WINDOWS = Part(0, 0, 0, 0)


def parts(across: Axis, down: Axis, block: tuple[int, int], max_columns: int) -> Iterator[Part]:
    """Cut the windows of a scene into parts of about MAX_WINDOWS, up to four times as many to end between two blocks.

    block: height and width. max_columns: windows side by side of which a reader can hold the blocks in memory.
    """
    wide = _step(across.count, across.aligned(block[1]), max_columns)
    aligned = down.aligned(block[0])
    limit = max(MAX_WINDOWS // wide, aligned if aligned * wide <= 4 * MAX_WINDOWS else 1)
    high = _step(down.count, aligned, limit)
    for row in range(0, down.count, high):
        for column in range(0, across.count, wide):
            yield Part(column, min(column + wide, across.count), row, min(row + high, down.count))


def _step(count: int, aligned: int, limit: int) -> int:
    """Windows per part along one side: at most `limit`, a multiple of `aligned` if the limit allows one."""
    if count <= limit:
        return max(1, count)
    return max(1, limit // aligned * aligned if limit >= aligned else limit)
