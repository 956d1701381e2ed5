"""Settings of a run. They are checked once, when they are made; all other code trusts them."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pipeline.errors import SettingRefused
from pipeline.geo.items import TimeRange
from pipeline.geo.tiles import MAX_ZOOM, Bounds, Selection
from pipeline.geo.windows import EDGES, RESAMPLINGS, Tiling
from pipeline.storage import uris

ZOOM = re.compile(r"[0-9]{1,2}")
PERCENTILE = "percentile:"
"""Starts a --scale that is measured. The range is appended when it is known: `percentile:2:98=0.0:3000.0`."""
MAX_TILE_SIZE = 4096
MIN_RESOLUTION, MAX_RESOLUTION = 0.001, 1e7
MAX_BAND_DIGITS = 6


def flag(help: str, default: Any, **more: Any) -> Any:
    """A dataclass field that is also a command-line flag.

    more: `metavar` and `choices` of argparse; `fingerprint=False` if the setting does not change results.
    """
    return field(default=default, metadata={"help": help, **more})


def check_choices(settings: Any) -> None:
    """Raise SettingRefused if a field of a dataclass has neither its default nor one of the `choices` of its flag."""
    for each in fields(settings):
        choices, value = each.metadata.get("choices"), getattr(settings, each.name)
        if choices and value != each.default and value not in choices:
            raise SettingRefused(
                f"--{each.name.replace('_', '-')} is {value!r}: it must be one of {', '.join(choices)}"
            )


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run except for those of its network, which the predictor has.

    Every field is a command-line flag; `python jobs/embed.py --help` describes them. `input` and `keep` also take one
    string. Raises SettingRefused if a value is not valid.
    """

    input: Sequence[str] = flag(
        "archive: folders, globs, files or {0000..0099} ranges; local or s3://, gs://, az://", (), metavar="URI"
    )
    output: str = flag("output directory; the same command continues the run after any stop", "", metavar="URI")
    keep: Sequence[str] = flag(
        "columns or sidecars to copy to the results, comma-separated; name:new_name renames", (), metavar="COL,…"
    )
    image_column: str | None = flag("Parquet column with the image bytes (default: detected)", None, metavar="COL")
    uri_column: str | None = flag("Parquet or CSV column with image URIs (default: detected)", None, metavar="COL")
    any_suffix: bool = flag("read files and members of any name if their first bytes are those of an image", False)
    zoom: str | None = flag("zooms to read from tile archives", None, metavar="14|12:14")
    bbox: str | None = flag(
        "tiles of tile archives, and STAC items, that touch a box in degrees; W > E crosses the antimeridian",
        None,
        metavar="W,S,E,N",
    )
    datetime: str | None = flag("STAC items of a time or range, RFC 3339; .. is an open end", None, metavar="START/END")
    assets: str | None = flag(
        "assets or bands of STAC items (default: those of the input specification)", None, metavar="red,nir"
    )
    limit: int | None = flag("only the first N images of the archive", None, metavar="N")
    max_pixels: int = flag("largest image in pixels; guards against decompression bombs", 200_000_000, metavar="N")
    exif_rotate: bool = flag("rotate images upright by their EXIF orientation", True)
    decoder: str = flag(
        "fast; exact: exactly the pixels of Pillow and torchvision; gpu: decode JPEGs on the GPU of the network",
        "fast",
        choices=("fast", "exact", "gpu"),
    )
    bands: str | None = flag(
        "bands that the network gets: numbers from 1, or names if the file has them (default: all of them)",
        None,
        metavar="1,2,3",
    )
    scale: str | None = flag(
        "range of values that becomes black to white, for all pixels of more than 8 bits",
        None,
        metavar="MIN:MAX|percentile:2:98",
    )
    nodata_fill: float | None = flag(
        "value of pixels without data (default: the middle of the scale)", None, metavar="VALUE"
    )
    harmonize: str = flag(
        "Sentinel-2: subtract the offset of products since baseline 04.00: auto by their metadata, on from all, off",
        "auto",
        choices=("auto", "on", "off"),
    )
    any_values: bool = flag("run although sampled values are far from those of the input specification", False)
    tile_size: int | None = flag(
        "read rasters (.tif, .jp2, .vrt) as scenes, in windows of N × N pixels", None, metavar="N"
    )
    tile_stride: int | None = flag(
        "distance of two windows in pixels (default: windows side by side)", None, metavar="N"
    )
    edge: str = flag(
        "last windows of a scene: pad fills them up, drop leaves them out, shift moves them inside",
        "pad",
        choices=EDGES,
    )
    resolution: float | None = flag(
        "metres per pixel of the windows (default: the pixels of each scene)", None, metavar="METRES"
    )
    resampling: str = flag(
        "of windows to another resolution; auto: bilinear to finer pixels, average to coarser ones",
        "auto",
        choices=RESAMPLINGS,
    )
    max_nodata: float = flag(
        "windows with a larger share of pixels without data, or without any, are counted as empty, not written",
        0.9,
        metavar="F",
    )
    geoparquet: str = flag(
        "of results with footprints: 1.1, which every reader knows, or 2.0, with Parquet's own type GEOMETRY",
        "1.1",
        choices=("1.1", "2.0"),
    )
    phash: bool = flag("add a column phash, a perceptual hash of 64 bits, that nightshift duplicates compares", False)
    quality: bool = flag("add columns of brightness, contrast and sharpness, for `analyze`", False)
    batch_size: int | None = flag("images per batch (default: depends on the hardware)", None, metavar="N")
    rows_per_part: int | None = flag(
        "least rows of a Parquet part, which holds whole batches, of 512 MiB at most (default: by the archive's size)",
        None,
        metavar="N",
    )
    actors: str = flag("model actors: auto, N or MIN:MAX", "auto", metavar="auto|N|MIN:MAX")
    gpus_per_actor: str = flag("GPUs per actor: auto or a number; a fraction shares one GPU", "auto", metavar="auto|F")
    max_error_rate: float = flag("the job ends with 3 if a larger share of the images is bad", 0.05, metavar="F")
    overwrite: bool = flag("remove an earlier run's output first", False)
    update: bool = flag("add images that are new, were replaced or could not be read", False)
    cluster: str | None = flag(
        "machines of the run, for its cost: 8xg6.2xlarge, 4xg6.2xlarge+2xc7i.4xlarge", None, metavar="SHAPE"
    )
    prices: str | None = flag(
        "machines and prices (default: pipeline/estimates/prices.yaml)", None, metavar="FILE.yaml"
    )
    dry_run: bool = flag("print the plan and the settings, do no work", False)
    vectors: bool = field(default=False)
    """The input is an output of `embed`: its vectors are read, and no images. Set by `classify --from`."""

    def __post_init__(self) -> None:
        names = [self.input] if isinstance(self.input, str) else list(self.input)
        object.__setattr__(self, "input", tuple(names))
        if not names or not all(names):
            raise SettingRefused("--input is missing: name a folder, a glob or files of images")
        if not self.output:
            raise SettingRefused("--output is missing: name the directory to write to")
        checks = [("--input", uri, uris.check_uri(uri)) for uri in names]
        for name, uri, problem in [*checks, ("--output", self.output, uris.check_output(self.output))]:
            if problem:
                raise SettingRefused(f"{name} {uris.redact(uri)} {problem}")
        object.__setattr__(self, "output", uris.normalize(self.output))
        keep = [self.keep] if isinstance(self.keep, str) else list(self.keep)
        columns = tuple(name for names in keep if names for name in names.split(","))
        if not all(name.partition(":")[0] for name in columns):
            raise SettingRefused(f"--keep is {','.join(keep)!r}: it names an empty column; write COL or COL,COL")
        object.__setattr__(self, "keep", columns)
        for name in ("limit", "max_pixels", "batch_size", "rows_per_part", "tile_size", "tile_stride"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingRefused(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
        check_choices(self)
        if not 0 <= self.max_error_rate <= 1:
            raise SettingRefused(f"--max-error-rate is {self.max_error_rate}: it must be between 0 and 1")
        if self.vectors and len(names) != 1:
            raise SettingRefused(f"--from takes one output; {len(names)} were given")
        if self.update and (self.overwrite or self.limit is not None):
            raise SettingRefused(
                "--update extends an earlier run of the whole archive: leave out --overwrite and --limit"
            )
        self._check_tiling()
        self.actor_range()
        self.gpu_share()
        self.band_names()
        self.tile_selection()
        self.time_range()
        self.asset_names()
        low, high = self.scale_range() or (-math.inf, math.inf)
        if self.nodata_fill is not None and not low <= self.nodata_fill <= high:
            raise SettingRefused(f"--nodata-fill is {self.nodata_fill:g}: it must be a number within --scale")

    def _check_tiling(self) -> None:
        given = {"tile_stride": self.tile_stride, "resolution": self.resolution}
        defaults = {"edge": "pad", "max_nodata": 0.9, "resampling": "auto"}
        names = [name for name, value in given.items() if value is not None]
        names += [name for name, value in defaults.items() if getattr(self, name) != value]
        if names and self.tile_size is None:
            raise SettingRefused(f"--{names[0].replace('_', '-')} needs --tile-size, which reads rasters as scenes")
        if self.tile_size is not None and self.tile_size > MAX_TILE_SIZE:
            raise SettingRefused(f"--tile-size is {self.tile_size}: it can be at most {MAX_TILE_SIZE}")
        if self.resolution is not None and not MIN_RESOLUTION <= self.resolution <= MAX_RESOLUTION:
            raise SettingRefused(
                f"--resolution is {self.resolution:g}: it must be a number of metres from {MIN_RESOLUTION:g} to "
                f"{MAX_RESOLUTION:g}"
            )
        if not 0 <= self.max_nodata <= 1:
            raise SettingRefused(f"--max-nodata is {self.max_nodata:g}: it must be between 0 and 1")

    def tiling(self) -> Tiling | None:
        """How raster scenes are cut into windows; None if rasters are images."""
        if self.tile_size is None:
            return None
        stride = self.tile_stride or self.tile_size
        return Tiling(self.tile_size, stride, self.edge, self.resolution, self.max_nodata, self.resampling)

    def _tiling_settings(self) -> dict[str, Any]:
        tiling = self.tiling()
        settings = asdict(tiling) if tiling else {}
        if settings.get("resampling") == "auto":  # outputs from before this flag have no such setting
            del settings["resampling"]
        return {"tiling": settings} if settings else {}

    def actor_range(self) -> tuple[int, int] | None:
        """(min, max) number of actors, None for auto."""
        if self.actors == "auto":
            return None
        first, _, second = self.actors.partition(":")
        try:
            min_actors, max_actors = int(first), int(second or first)
        except ValueError:
            min_actors = max_actors = 0
        if not 1 <= min_actors <= max_actors:
            raise SettingRefused(f"--actors is {self.actors!r}: it must be auto, a number from 1, or MIN:MAX")
        return min_actors, max_actors

    def gpu_share(self) -> float | None:
        """GPUs per actor, None for auto, 0 for the CPU."""
        if self.gpus_per_actor == "auto":
            return None
        try:
            share = float(self.gpus_per_actor)
        except ValueError:
            share = -1.0
        if not (0 <= share <= 1 or (share > 1 and share.is_integer())):
            raise SettingRefused(
                f"--gpus-per-actor is {self.gpus_per_actor!r}: it must be auto, a number from 0 to 1, or a whole number"
            )
        return share

    def band_names(self) -> tuple[str, ...]:
        """Numbers or names of the bands that the network gets, () for all of them."""
        names = tuple(name.strip() for name in self.bands.split(",")) if self.bands is not None else ()
        for name in names:
            is_number = name.isdecimal() and (len(name) > MAX_BAND_DIGITS or int(name) < 1)
            if not name or is_number:
                shown = self.bands if len(self.bands or "") < 100 else name[:20] + "…"
                raise SettingRefused(f"--bands is {shown!r}: it must be numbers from 1 or names, as in 3,2,1")
        return names

    def scale_range(self) -> tuple[float, float] | None:
        """The values that become black and white, None if they are not set, or not measured yet."""
        if self.scale is None:
            return None
        text = self.scale
        if self.scale_percentiles():
            _, is_measured, text = self.scale.partition("=")
            if not is_measured:
                return None
        pair = _pair(text)
        if pair is None:
            raise SettingRefused(
                f"--scale is {self.scale!r}: it must be MIN:MAX, two numbers, as in 0:3000, or percentile:LOW:HIGH, as "
                "in percentile:2:98"
            )
        return pair

    def scale_percentiles(self) -> tuple[float, float] | None:
        """The percentiles of a sample that the range of values is measured from, None if they are not set."""
        if self.scale is None or not self.scale.startswith(PERCENTILE):
            return None
        pair = _pair(self.scale.removeprefix(PERCENTILE).partition("=")[0])
        if pair is None or not 0 <= pair[0] < pair[1] <= 100:
            raise SettingRefused(
                f"--scale is {self.scale!r}: it must be two percentiles from 0 to 100, as in percentile:2:98"
            )
        return pair

    def with_measured_scale(self, low: float, high: float) -> "RunConfig":
        """These settings with the range that the percentiles of --scale stand for."""
        percentiles = (self.scale or "").partition("=")[0]
        return replace(self, scale=f"{percentiles}={low!r}:{high!r}")

    def value_settings(self) -> dict[str, Any]:
        """The settings of bands and values that are set, as JSON."""
        bands, scale, percentiles = self.band_names(), self.scale_range(), self.scale_percentiles()
        given = {
            "bands": list(bands) or None,
            "scale": scale and list(scale),
            "scale_percentiles": percentiles and list(percentiles),
            "nodata_fill": self.nodata_fill,
            "harmonize": None if self.harmonize == "auto" else self.harmonize,
        }
        return {name: value for name, value in given.items() if value is not None}

    def tile_selection(self) -> Selection:
        """The tiles that --zoom and --bbox select, all tiles by default."""
        min_zoom, max_zoom = self._zooms()
        return Selection(min_zoom, max_zoom, self._box())

    def _zooms(self) -> tuple[int, int]:
        if self.zoom is None:
            return 0, MAX_ZOOM
        first, has_end, second = self.zoom.partition(":")
        ends = first, second if has_end else first
        low, high = map(int, ends) if all(ZOOM.fullmatch(end) for end in ends) else (-1, -1)
        if not 0 <= low <= high <= MAX_ZOOM:
            raise SettingRefused(
                f"--zoom is {self.zoom!r}: it must be a zoom from 0 to {MAX_ZOOM}, or MIN:MAX, as in 12:14"
            )
        return low, high

    def _box(self) -> Bounds | None:
        return None if self.bbox is None else parse_box(self.bbox)

    def time_range(self) -> TimeRange | None:
        """The times that --datetime selects, None for all of them."""
        if self.datetime is None:
            return None
        try:
            return TimeRange.parse(self.datetime)
        except ValueError as error:
            raise SettingRefused(
                f"--datetime is {self.datetime!r}: {error}; it must be a time or START/END of RFC 3339, as in "
                "2024-06-01T00:00:00Z/2024-07-01T00:00:00Z, and .. is an open end"
            ) from error

    def asset_names(self) -> tuple[str, ...]:
        """The assets of --assets, () for none."""
        names = tuple(name.strip() for name in self.assets.split(",")) if self.assets is not None else ()
        if not all(names) or len(set(names)) < len(names):
            raise SettingRefused(f"--assets is {self.assets!r}: it must be different names, as in red,nir")
        return names

    def tile_settings(self) -> dict[str, Any]:
        """The settings of tiles that are set, as JSON."""
        zooms, box = self._zooms(), self._box()
        given = {
            "zoom": self.zoom and list(zooms),
            "bbox": box and list(box),
            "datetime": self.datetime,
            "assets": list(self.asset_names()) or None,
        }
        return {name: value for name, value in given.items() if value is not None}

    def keep_names(self) -> dict[str, str]:
        """Column of the shard → column of the result."""
        return parse_keep(self.keep)

    def result_settings(self) -> dict[str, Any]:
        """The settings that change results, as JSON, without credentials. A resumed run must have the same."""
        return {
            "input": [uris.redact(uri if "://" in uri else uris.normalize(uri)) for uri in self.input],
            "keep": list(self.keep),
            "image_column": self.image_column,
            "uri_column": self.uri_column,
            "limit": self.limit,
            "max_pixels": self.max_pixels,
            "exif_rotate": self.exif_rotate,
            "decoder": self.decoder,
            **self._tiling_settings(),
            **self.value_settings(),  # absent by default: outputs of earlier versions have none of them
            **self.tile_settings(),
            **({"vectors": True} if self.vectors else {}),
            **({"geoparquet": self.geoparquet} if self.geoparquet != "1.1" else {}),
            **({"phash": True} if self.phash else {}),
            **({"quality": True} if self.quality else {}),
            **({"any_suffix": True} if self.any_suffix else {}),  # outputs from before this flag have no such setting
        }


def _number(text: str) -> float:
    """A number. Raises ValueError, also for 1_000, which Python's own literals may have."""
    if "_" in text:
        raise ValueError(f"{text!r} is no number")
    return float(text)


def _pair(text: str) -> tuple[float, float] | None:
    """Two finite numbers LOW:HIGH, None for any other text."""
    first, _, second = text.partition(":")
    try:
        low, high = _number(first), _number(second)
    except ValueError:
        return None
    return (low, high) if low < high and math.isfinite(high - low) else None


def parse_box(text: str) -> Bounds:
    """The box of --bbox. Raises SettingRefused."""
    try:
        west, south, east, north = map(_number, text.split(","))
    except ValueError:
        west = south = east = north = math.nan
    are_longitudes = all(-180 <= value <= 180 for value in (west, east))
    if not (are_longitudes and west != east and -90 <= south < north <= 90):
        raise SettingRefused(
            f"--bbox is {text!r}: it must be W,S,E,N in degrees, longitudes from -180 to 180 and latitudes "
            "from -90 to 90 with S < N, as in -118.4,36.5,-118.2,36.7; W > E crosses the antimeridian"
        )
    return west, south, east, north


def parse_keep(keep: Iterable[str]) -> dict[str, str]:
    """Parse `COLUMN` and `COLUMN:NAME`. Returns column of the shard → column of the result."""
    return {name: alias or name for name, _, alias in (each.partition(":") for each in keep)}
