"""Overrides: changes to a network's transform, by flags or files; where each value comes from. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from pipeline.errors import SettingRefused
from pipeline.images.transform import Transform

MAX_SIDE = 4096
"""Largest side in pixels of a resized image. The pixels of one batch must fit in memory."""

MIN_STD = 1e-6
"""Of pixels from 0 to 1. Smaller ones are mistakes, and make numbers that a network cannot use."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
NAMES = tuple(field.name for field in fields(Transform))
STATED = tuple(name for name in NAMES if name != "squash")
"""The values that a complete transform states. Most networks keep the aspect ratio, so its absence says so."""
FLAGS = "flags"


@dataclass(frozen=True)
class Overrides:
    """Values that replace those of a network's own transform. None and () leave the network's own value.

    mean, std: one number for all channels, or one for each channel; pixels are from 0 to 1.
    scale: range of the numbers that training turned into black to white, as `--scale` does; None for 8-bit images.
    source: the file that states the values, for messages and `_run.json`; "" for flags.
    Raises SettingRefused if a value is not valid.
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    squash: bool | None = None
    scale: tuple[float, float] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for name, side in (("resize", self.resize), ("crop", self.crop)):
            if side is not None and not 1 <= side <= MAX_SIDE:
                raise self._refused(name, f"{side}: it must be a number of pixels from 1 to {MAX_SIDE}")
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise self._refused(
                "interpolation", f"{self.interpolation!r}: it must be one of {', '.join(INTERPOLATIONS)}"
            )
        in_bytes = ", or state `range: [0, 255]`" if self.source else ""
        if not all(0 <= value <= 1 for value in self.mean):
            raise self._refused(
                "mean",
                f"{_text(self.mean)}: it must be numbers from 0 to 1; divide a mean of pixels from 0 to 255 by 255"
                + in_bytes,
            )
        if not all(MIN_STD <= value <= 1 for value in self.std):
            raise self._refused(
                "std",
                f"{_text(self.std)}: it must be numbers from {MIN_STD:g} to 1; divide one of pixels from 0 to "
                f"255 by 255{in_bytes}",
            )

    def _refused(self, name: str, fault: str) -> SettingRefused:
        return SettingRefused(f"{self.source}: {name} is {fault}" if self.source else f"--{name} is {fault}")

    @property
    def given(self) -> dict[str, Any]:
        """The values of the transform that are given, by name."""
        values = {name: getattr(self, name) for name in NAMES}
        return {name: value for name, value in values.items() if value not in (None, ())}


@dataclass(frozen=True)
class Layers:
    """Overrides of one transform. Each one overrides those before it."""

    overrides: tuple[Overrides, ...]

    @property
    def crop(self) -> int | None:
        return next((each.crop for each in reversed(self.overrides) if each.crop), None)

    @property
    def scale(self) -> tuple[float, float] | None:
        return next((each.scale for each in reversed(self.overrides) if each.scale), None)

    def missing(self) -> list[str]:
        """The values that no layer states."""
        return [name for name in STATED if not any(name in each.given for each in self.overrides)]

    def origins(self, default: str) -> dict[str, str]:
        """Where each value of the transform comes from: a file, FLAGS, or else `default`."""
        origins = dict.fromkeys(NAMES, default)
        for each in self.overrides:
            origins |= dict.fromkeys(each.given, each.source or FLAGS)
        return origins

    def apply(self, transform: Transform) -> Transform:
        """Replace the given values. Raises SettingRefused if the crop becomes larger than the resized image."""
        given = {name: value for each in self.overrides for name, value in each.given.items()}
        changed = replace(transform, **given)
        if given.keys() & {"resize", "crop"} and changed.crop > changed.resize > 0:
            raise SettingRefused(
                f"the crop of {changed.crop} pixels is larger than the resized image of {changed.resize}: set --resize "
                f"to {changed.crop} or more, or --crop to {changed.resize} or less"
            )
        return changed


def for_channels(transform: Transform, channels: int, model: str, origins: Mapping[str, str]) -> Transform:
    """Give every channel of the network its mean and standard deviation.

    A network of one channel takes the average of three values. Raises SettingRefused for another number of values.
    """
    mean = _for_channels("mean", transform.mean, channels, model, origins)
    return replace(transform, mean=mean, std=_for_channels("std", transform.std, channels, model, origins))


def numbers(name: str, given: str | float | Sequence[str | float]) -> tuple[float, ...]:
    """Parse `0.5,0.5,0.5`, a number or a sequence of numbers. name: of the flag. Raises SettingRefused."""
    texts = [given] if isinstance(given, str | float | int) else given
    try:
        return tuple(float(part) for text in texts for part in str(text).split(","))
    except ValueError as error:
        raise SettingRefused(
            f"--{name} is {','.join(map(str, texts))!r}: it must be one number, or one for each channel separated by "
            "commas, such as 0.5,0.5,0.5"
        ) from error


def as_flags(transform: Transform) -> str:
    """The flags that give a transform: --resize 256 --crop 224 …"""
    return (
        f"--resize {transform.resize} --crop {transform.crop} --interpolation {transform.interpolation} "
        f"--mean {_text(transform.mean)} --std {_text(transform.std)}"
    )


def _for_channels(
    name: str, values: tuple[float, ...], channels: int, model: str, origins: Mapping[str, str]
) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    if channels == 1:
        return (sum(values) / len(values),)
    origin = origins[name]
    subject = f"--{name}" if origin == FLAGS else f"{name} of {origin}"
    raise SettingRefused(
        f"{subject} is {_text(values)}, which are {len(values)} numbers, but {model} takes {channels} channels: give "
        f"1 number or {channels}"
    )


def _text(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
