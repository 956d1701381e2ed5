"""Numbers of a few images, drawn before a run: the range of --scale percentile, and whether an --input-spec fits them.

The draw is seeded and depends on the plan alone, so it is the same in every attempt. Imports neither Ray nor torch.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline import sources
from pipeline.config import RunConfig
from pipeline.coverage import Ranges, normalize
from pipeline.errors import DecodeError, ReadError, SettingRefused
from pipeline.geo.bands import FILLED
from pipeline.geo.sentinel2 import OFFSET
from pipeline.images.decode import Numbers, read_numbers
from pipeline.models.input_spec import InputSpec
from pipeline.planning.plan import Plan
from pipeline.predictors.base import Predictor
from pipeline.sources import SOURCES, ReadOptions, Record
from pipeline.sources.scene import Scene, chosen_bands, is_named
from pipeline.sources.shard import Shard
from pipeline.stages.load import Loader

MAX_IMAGES = 64
MAX_SHARDS = 16
MAX_ROW = 512
"""Rows of a shard to draw from: those after it cost a long read of a tar."""
MAX_PIXELS = 4_096
"""Pixels of one image that are kept."""
MIN_REACH = 0.05
"""The 99th percentile of the band with the highest values must reach this share of the expected range."""
MAX_BELOW_OFFSET = 0.5
"""Share of a band's numbers that may be at most Sentinel-2's offset if it is subtracted."""


@dataclass(frozen=True, slots=True)
class Sample:
    """numbers: of each image that can be read. reasons: why an offset was subtracted from them, or none, with counts.
    unread: messages of the others that the network does not take.
    """

    numbers: list[Numbers]
    reasons: Counter[str]
    unread: Counter[str]

    @property
    def images(self) -> int:
        return len(self.numbers) + self.unread.total()


def is_needed(config: RunConfig, predictor: Predictor) -> bool:
    """Whether a new run looks at the values of its images before it begins."""
    is_unmeasured = config.scale_percentiles() is not None and config.scale_range() is None
    return is_unmeasured or predictor.specification is not None


def settle(config: RunConfig, predictor: Predictor, options: ReadOptions, plan: Plan) -> tuple[RunConfig, list[str]]:
    """Measure the range of --scale percentile, and compare the values with the input specification.

    Returns the settings with that range, and sentences for the user. Raises SettingRefused with figures.
    """
    sample = draw(plan, Loader.of(config, predictor, options, rows_per_table=MAX_IMAGES))
    notes = []
    specification = predictor.specification
    if specification:
        notes += describe(sample, specification, config)
        if not config.any_values and specification.expected and specification.pixels != "uint8":
            check(sample, specification)
    percentiles = config.scale_percentiles()
    if percentiles and config.scale_range() is None:
        low, high = measure(sample, percentiles)
        config = config.with_measured_scale(low, high)
        notes.append(
            f"--scale percentile:{percentiles[0]:g}:{percentiles[1]:g} is {low:g} to {high:g}, measured on "
            f"{sample.images} images drawn from the archive"
        )
    return config, notes


def draw(plan: Plan, loader: Loader) -> Sample:
    """Read at most MAX_IMAGES images of a plan."""
    numbers: list[Numbers] = []
    reasons: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    for shard, record in _records(plan, loader.options):
        try:
            if isinstance(record.data, np.ma.MaskedArray) and isinstance(shard.payload, Scene):
                numbers.append(_window_numbers(record.data, shard.payload, loader, reasons))
            elif record.data is not None:
                numbers.append(_numbers(record.data, record.image_id, loader, reasons))
            elif isinstance(record.error, ReadError) and isinstance(shard.payload, Scene):
                unread[record.error.message] += record.error.error_type == "unsupported"
        except DecodeError as error:
            unread[error.message] += error.error_type == "unsupported"
    return Sample(numbers, reasons, +unread)


def _numbers(data: bytes | np.ndarray, image_id: str, loader: Loader, reasons: Counter[str]) -> Numbers:
    """The numbers of one image. Counts the reason for its offset."""
    if isinstance(data, np.ndarray):  # a source that decodes gives the network's numbers
        rows = data.reshape(-1, data.shape[2])
        return Numbers(rows[:: max(1, len(rows) // MAX_PIXELS)].astype(np.float64), False, "an array", True)

    def offset_of(metadata: Mapping[str, str]) -> float:
        claim = loader.offset_claim(image_id, metadata)
        reasons[claim.reason] += 1
        return claim.offset

    return read_numbers(
        data,
        loader.values,
        max_pixels=loader.max_pixels,
        max_rows=MAX_PIXELS,
        offset_of=offset_of if loader.harmonize else None,
    )


def _window_numbers(window: np.ma.MaskedArray, scene: Scene, loader: Loader, reasons: Counter[str]) -> Numbers:
    """The numbers of a window of a scene, whose source has subtracted the offset."""
    numbers = window.data.astype(np.float64)
    numbers[np.ma.getmaskarray(window)] = np.nan
    numbers = numbers.reshape(-1, window.shape[2])
    for place, band in enumerate(chosen_bands(scene, loader.options)):
        if band == FILLED:
            numbers[:, place] = np.nan
    if loader.harmonize:
        reasons[scene.reason] += 1
    rows = numbers[:: max(1, len(numbers) // MAX_PIXELS)]
    return Numbers(rows, scene.bands[0].dtype == "uint8", scene.uri, is_named(scene), scene.offset)


def _records(plan: Plan, options: ReadOptions) -> Iterator[tuple[Shard, Record]]:
    generator = np.random.default_rng(0)
    indices = np.flatnonzero(plan.shard_rows)
    chosen = np.sort(generator.choice(indices, min(MAX_SHARDS, len(indices)), replace=False))
    each = -(-MAX_IMAGES // max(len(chosen), 1))
    for index in chosen.tolist():
        shard = plan.load(index)
        for item in sources.read(shard, _rows(shard, each, generator), options):
            if isinstance(item, Record):
                yield shard, item


def _rows(shard: Shard, count: int, generator: np.random.Generator) -> Ranges:
    """Some rows of a shard: drawn if any row can be read by itself, and the first ones otherwise."""
    can_jump = SOURCES[shard.kind].is_loose or isinstance(shard.payload, Scene)
    if shard.rows is None or not can_jump:
        return ((0, count if shard.rows is None else min(count, shard.rows)),)
    rows = min(shard.rows, MAX_ROW)
    drawn = generator.choice(rows, min(count, rows), replace=False)
    return normalize([(row, row + 1) for row in np.sort(drawn).tolist()])


def measure(sample: Sample, percentiles: tuple[float, float]) -> tuple[float, float]:
    """The two percentiles of the numbers of more than 8 bits, over all bands. Raises SettingRefused without a range."""
    arrays = [each.array for each in sample.numbers if not each.is_8_bit]
    values = np.concatenate([array[np.isfinite(array)] for array in arrays]) if arrays else np.empty(0)
    if not len(values):
        raise SettingRefused(
            f"--scale percentile: none of {sample.images} images drawn from the archive has numbers of more than 8 bits"
            f"{_first(sample)}; leave out --scale, or give MIN:MAX"
        )
    low, high = (float(value) for value in np.percentile(values, percentiles))
    if not low < high:
        raise SettingRefused(
            f"--scale percentile: both percentiles of {sample.images} images drawn from the archive are {low:g}; give "
            "--scale MIN:MAX"
        )
    return low, high


def check(sample: Sample, specification: InputSpec) -> None:
    """Raise SettingRefused, with figures, if the scaled values are far from what the specification expects."""
    if not sample.numbers:
        if sample.unread:
            raise SettingRefused(
                f"none of {sample.images} images drawn from the archive can be read for --input-spec "
                f"{specification.name}{_first(sample)}"
            )
        return
    assert specification.expected
    scaled = specification.scaled(np.concatenate([each.array for each in sample.numbers]))
    figures = _figures(scaled, specification)
    if fault := _fault(scaled, specification.expected) or _fault_of_offset(sample, specification):
        raise SettingRefused(
            f"{fault} in {len(sample.numbers)} images drawn from the archive; --input-spec {specification.name} "
            f"expects {_range(specification.expected)} after its divisor, and the minimum, median and maximum are "
            f"{figures}; check offset and divisor in a copy of the specification, and --harmonize; --any-values runs "
            "nevertheless"
        )


def _fault(scaled: np.ndarray, expected: tuple[float, float]) -> str:
    """A clause that says how the values are far from the expected ones, "" if they are not."""
    low, high = expected
    finite = np.where(np.isfinite(scaled), scaled, np.nan)
    present = ~np.isnan(finite).all(axis=0)
    if not present.any():
        return "there is no value"
    medians, tops = np.nanmedian(finite[:, present], axis=0), np.nanpercentile(finite[:, present], 99, axis=0)
    outside = int(((medians < low) | (medians > high)).sum())
    if outside:
        return f"the median of {outside} of {len(medians)} bands lies outside of the expected values"
    if tops.max() < low + MIN_REACH * (high - low):
        return f"99 % of the values are below {tops.max():.3g}, so they use a small part of the expected values"
    return ""


def _fault_of_offset(sample: Sample, specification: InputSpec) -> str:
    """A clause if an offset was subtracted from numbers that do not seem to contain it, otherwise ""."""
    cut = [each.array for each in sample.numbers if each.offset]
    for name, column in zip(specification.band_names, np.concatenate(cut).T if cut else (), strict=False):
        values = column[np.isfinite(column)]
        share = float((values <= 0).mean()) if len(values) else 0.0
        if share > MAX_BELOW_OFFSET:
            return f"{share:.0%} of {name} are at most the offset of {OFFSET:g} that --harmonize subtracts,"
    return ""


def describe(sample: Sample, specification: InputSpec, config: RunConfig) -> list[str]:
    """Sentences about what is done with the numbers: the bands of files without names, the offset, unread images."""
    notes = []
    unnamed = next((each for each in sample.numbers if not each.has_names), None)
    if unnamed and not config.band_names():
        pairs = ", ".join(f"{place} is {name}" for place, name in enumerate(specification.band_names, 1))
        notes.append(f"{unnamed.description} does not name its bands, so they are taken in this order: {pairs}")
    if specification.harmonize and sample.numbers:
        cut = sum(each.offset != 0 for each in sample.numbers)
        reasons = ", ".join(f"{count} by {reason}" for reason, count in sample.reasons.most_common(3))
        notes.append(
            f"--harmonize {config.harmonize}: Sentinel-2's offset of {OFFSET:g} is subtracted from {cut} of "
            f"{len(sample.numbers)} images drawn from the archive ({reasons})"
        )
    if sample.unread and sample.numbers:
        notes.append(f"{sample.unread.total()} of {sample.images} images drawn from the archive fail{_first(sample)}")
    return notes


def _figures(scaled: np.ndarray, specification: InputSpec) -> str:
    parts = []
    for name, column in zip(specification.band_names, scaled.T, strict=True):
        values = column[np.isfinite(column)]
        if len(values):
            parts.append(f"{name} {values.min():.4g} {np.median(values):.4g} {values.max():.4g}")
    return ", ".join(parts)


def _first(sample: Sample) -> str:
    return f": {sample.unread.most_common(1)[0][0]}" if sample.unread else ""


def _range(expected: tuple[float, float]) -> str:
    return f"{expected[0]:g} to {expected[1]:g}"
