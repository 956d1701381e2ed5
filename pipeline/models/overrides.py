"""Overrides: the user's changes to a network's transform. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from pipeline.errors import SettingRefused
from pipeline.images.transform import Transform

MAX_SIDE = 4096
"""Largest side in pixels of a resized image. The pixels of one batch must fit in memory."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Overrides:
    """Values that replace those of a network's own transform. None and () leave the network's own value.

    mean, std: one number for all channels, or one for each channel; pixels are from 0 to 1.
    Raises SettingRefused if a value is not valid.
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, side in (("resize", self.resize), ("crop", self.crop)):
            if side is not None and not 1 <= side <= MAX_SIDE:
                raise SettingRefused(f"--{name} is {side}: it must be a number of pixels from 1 to {MAX_SIDE}")
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise SettingRefused(
                f"--interpolation is {self.interpolation!r}: it must be one of {', '.join(INTERPOLATIONS)}"
            )
        if not all(0 <= value <= 1 for value in self.mean):
            raise SettingRefused(
                f"--mean is {_text(self.mean)}: it must be numbers from 0 to 1; divide a mean of pixels from 0 to 255 "
                "by 255"
            )
        if not all(0 < value <= 1 for value in self.std):
            raise SettingRefused(
                f"--std is {_text(self.std)}: it must be numbers greater than 0 and at most 1; divide one of pixels "
                "from 0 to 255 by 255"
            )

    @property
    def are_complete(self) -> bool:
        """Whether nothing of the network's own transform is left."""
        return all(getattr(self, field.name) not in (None, ()) for field in fields(self))

    def apply(self, transform: Transform) -> Transform:
        """Replace the given values. Raises SettingRefused if the crop becomes larger than the resized image."""
        changes = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = replace(transform, **{name: value for name, value in changes.items() if value not in (None, ())})
        if (self.resize or self.crop) and changed.crop > changed.resize > 0:
            raise SettingRefused(
                f"the crop of {changed.crop} pixels is larger than the resized image of {changed.resize}: set --resize "
                f"to {changed.crop} or more, or --crop to {changed.resize} or less"
            )
        return changed

    def for_channels(self, transform: Transform, channels: int, model: str) -> Transform:
        """Give every channel of the network its mean and standard deviation.

        A network of one channel takes the average of three values. Raises SettingRefused for another number of values.
        """
        mean = _for_channels("mean", transform.mean, channels, model)
        return replace(transform, mean=mean, std=_for_channels("std", transform.std, channels, model))


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


def _for_channels(name: str, values: tuple[float, ...], channels: int, model: str) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    if channels == 1:
        return (sum(values) / len(values),)
    raise SettingRefused(
        f"--{name} is {_text(values)}, which are {len(values)} numbers, but {model} takes {channels} channels: give "
        f"1 number or {channels}"
    )


def _text(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)
