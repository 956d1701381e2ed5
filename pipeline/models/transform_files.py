"""The transform of weights that a file states: `--transform`, metadata of a .safetensors file, or timm's config.json.

Imports no torch. `--transform FILE.yaml` and `"transform"` in the metadata have the same keys; all may be absent:

    resize: 256              # short side in pixels
    crop: 224                # side of the centre crop
    interpolation: bilinear  # nearest, bilinear, bicubic, lanczos
    squash: false            # true: resize both sides to `resize` and ignore the aspect ratio
    range: [0, 1]            # black and white before mean and std; [0, 255] for a mean of 123.675, [-1, 1] as in Keras
    mean: [0.485, 0.456, 0.406]
    std: [0.229, 0.224, 0.225]
    scale: [0, 3000]         # numbers that were black and white in training, as for --scale; absent for 8-bit images
"""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline.errors import SettingRefused, WeightsRefused, message_line
from pipeline.images.transform import IMAGENET_MEAN, IMAGENET_STD, Transform
from pipeline.models.overrides import NAMES, Overrides
from pipeline.storage import access, strict_yaml, uris

SUFFIXES = (".yaml", ".yml", ".json")
KEYS = (*NAMES, "range", "scale")
METADATA_KEY = "nightshift"
"""Key of a .safetensors file's metadata: JSON with `transform`, and others."""
CONFIG = "config.json"
BESIDE_CONFIG = ("model.safetensors", "pytorch_model.bin")
"""Names of the files of weights of Hugging Face, which have a CONFIG beside them."""
TIMM_CROP_PCT = 0.875


@dataclass(frozen=True)
class Stated:
    """What weights state about themselves. transform: its `source` names the file. labels: class names, or none."""

    transform: Overrides = Overrides()  # noqa: RUF009
    labels: tuple[str, ...] = ()


def load(name: str) -> Overrides:
    """Read `--transform`. Raises SettingRefused."""
    source = f"--transform {uris.redact(name)}"
    if not uris.redact(name).lower().endswith(SUFFIXES):
        raise SettingRefused(f"{source} must be a file that ends in {', '.join(SUFFIXES)}")
    try:
        content = strict_yaml.load(access.read(uris.normalize(name)))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingRefused(f"{source} cannot be read: {message_line(error)}") from error
    if not isinstance(content, dict):
        raise SettingRefused(f"{source} must have one key per line, such as `resize: 256`")
    return overrides_of(content, source)


def overrides_of(content: Mapping[Any, Any], source: str) -> Overrides:
    """The values of a mapping with KEYS. source: the file, for messages. Raises SettingRefused."""
    return _Reader(content, source).overrides()


def of_metadata(metadata: Mapping[str, str], weights: str) -> Overrides:
    """The transform in a .safetensors file's metadata; no values without one. Raises WeightsRefused."""
    text = metadata.get(METADATA_KEY)
    if text is None:
        return Overrides()
    source = f"metadata of --weights {weights}"
    try:
        record = json.loads(text)
        content = record.get("transform") if isinstance(record, dict) else record
    except ValueError as error:
        raise WeightsRefused(f"{source}: its entry {METADATA_KEY!r} is not JSON: {error}") from error
    if content is None:
        return Overrides()
    if not isinstance(content, dict):
        raise WeightsRefused(f"{source}: transform is {content!r}: it must be an object such as {{'resize': 256}}")
    try:
        return overrides_of(content, source)
    except SettingRefused as error:
        raise WeightsRefused(
            f"{error}; write the file again, with a transform of the keys {', '.join(KEYS)}"
        ) from error


def of_config(text: bytes, weights: str) -> Stated:
    """The transform and class names in timm's config.json. Nothing if the file is not timm's.

    Raises WeightsRefused if it is no JSON, or states what is not supported.
    """
    source = f"{CONFIG} beside --weights {weights}"
    try:
        record = json.loads(text)
    except ValueError as error:
        raise WeightsRefused(f"{source} is not JSON: {error}; remove or repair it") from error
    if not isinstance(record, dict):
        return Stated()
    config = record.get("pretrained_cfg", record)
    if not isinstance(config, dict) or "input_size" not in config:
        return Stated()
    try:
        transform = transform_of_timm(config)
    except (SettingRefused, TypeError, ValueError) as error:
        raise WeightsRefused(f"{source}: {error}; state the transform with --transform FILE.yaml") from error
    names = record.get("label_names") or config.get("label_names") or ()
    labels = tuple(map(str, names)) if isinstance(names, list | tuple) else ()
    values = {name: getattr(transform, name) for name in NAMES}
    return Stated(Overrides(**values, source=source), labels)


def transform_of_timm(config: Mapping[str, Any]) -> Transform:
    """The transform of a pretrained_cfg of timm, as `timm.data.resolve_data_config` resolves it.

    Raises SettingRefused if images are not square or are cropped in another way.
    """
    _, height, width = config.get("input_size") or (3, 224, 224)
    if height != width:
        raise SettingRefused(f"it takes images of {height} × {width} pixels, but only square images are supported")
    crop_mode = config.get("crop_mode") or "center"
    if crop_mode not in ("center", "squash"):
        raise SettingRefused(f"it needs crop_mode {crop_mode!r}, but only center and squash are supported")
    interpolation = config.get("interpolation") or "bicubic"
    return Transform(
        resize=math.floor(height / (config.get("crop_pct") or TIMM_CROP_PCT)),
        crop=height,
        interpolation="bilinear" if interpolation == "random" else interpolation,
        mean=tuple(config.get("mean") or IMAGENET_MEAN),
        std=tuple(config.get("std") or IMAGENET_STD),
        squash=crop_mode == "squash",
    )


class _Reader:
    """Checks the content of a file. Raises SettingRefused with the file, the key, the value and the remedy."""

    def __init__(self, content: Mapping[Any, Any], source: str) -> None:
        self.content, self.source = content, source
        for key in content:
            if key not in KEYS:
                close = difflib.get_close_matches(str(key), KEYS, 1)
                hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(KEYS)}"
                raise SettingRefused(f"{source}: the key {key!r} is unknown; {hint}")

    def overrides(self) -> Overrides:
        low, high = self._pair("range") or (0.0, 1.0)
        if "range" in self.content and not {"mean", "std"} <= self.content.keys():
            raise self._refused("range", "which needs mean and std beside it, in its own units")
        mean, std = self._numbers("mean"), self._numbers("std")
        return Overrides(
            resize=self._side("resize"),
            crop=self._side("crop"),
            interpolation=self.content.get("interpolation"),
            mean=tuple((value - low) / (high - low) for value in mean),
            std=tuple(value / (high - low) for value in std),
            squash=self._squash(),
            scale=self._pair("scale"),
            source=self.source,
        )

    def _refused(self, key: str, requirement: str) -> SettingRefused:
        return SettingRefused(f"{self.source}: {key} is {self.content[key]!r}, {requirement}")

    def _side(self, key: str) -> int | None:
        value = self.content.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self._refused(key, "but it must be a whole number of pixels")
        return value

    def _numbers(self, key: str) -> tuple[float, ...]:
        value = self.content.get(key)
        if value is None:
            return ()
        values = value if isinstance(value, list | tuple) else [value]
        if not values or not all(map(_is_number, values)):
            raise self._refused(key, "but it must be one number, or a list with one for each channel")
        return tuple(map(float, values))

    def _pair(self, key: str) -> tuple[float, float] | None:
        value = self.content.get(key)
        if value is None:
            return None
        is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))
        if not is_pair or value[0] >= value[1]:
            raise self._refused(key, "but it must be two numbers, the lower one first, as in [0, 255]")
        return float(value[0]), float(value[1])

    def _squash(self) -> bool | None:
        value = self.content.get("squash")
        if value is not None and not isinstance(value, bool):
            raise self._refused("squash", "but it must be true or false")
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
