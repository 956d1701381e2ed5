"""Settings, checked once, early. Inside the package code trusts them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from pipeline import storage
from pipeline.errors import SettingRefused

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class Transform:
    """How pixels get their size and their scale: torchvision's evaluation transform.

    The short side is resized to `resize` pixels with antialiasing, the centre `crop` × `crop` pixels are cut out; this
    happens on uint8 where the image is decoded. `(pixel / 255 - mean) / std` follows on the network's device.

    squash: both sides are resized to `resize`, whatever their proportion.
    """

    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"  # nearest, bilinear, bicubic, lanczos
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    squash: bool = False


def flag(help: str, default: Any, **more: Any) -> Any:
    """A field that is also a command-line flag. metavar, choices: as argparse takes them."""
    return field(default=default, metadata={"help": help, **more})


def check_choices(settings: Any) -> None:
    """Raise SettingRefused where a field of a dataclass is none of the `choices` that its flag has."""
    for each in fields(settings):
        choices, value = each.metadata.get("choices"), getattr(settings, each.name)
        if choices and value not in choices:
            raise SettingRefused(f"--{each.name.replace('_', '-')} is {value!r}: it is one of {', '.join(choices)}")


@dataclass(frozen=True)
class RunConfig:
    """What to read, where to write, and how the work is spread. What the network is, its predictor says."""

    input: Sequence[str] = flag(
        "archive: folders, globs, files or {0000..0099} ranges; local or s3://, gs://, az://", (), metavar="URI"
    )
    output: str = flag("output directory; run the same command again to go on after any stop", "", metavar="URI")
    keep: Sequence[str] = flag(
        "columns of the shards to keep, comma-separated; name:new_name renames", (), metavar="COL,…"
    )
    image_column: str | None = flag("Parquet column with the image bytes (default: found)", None, metavar="COL")
    uri_column: str | None = flag("Parquet or CSV column with image URIs (default: found)", None, metavar="COL")
    limit: int | None = flag("only the first N images of the archive", None, metavar="N")
    max_pixels: int = flag("largest image in pixels, against decompression bombs", 200_000_000, metavar="N")
    exif_rotate: bool = flag("turn images upright by their EXIF orientation", True)
    decoder: str = flag(
        "fast; exact: Pillow's and torchvision's pixels to the bit; gpu: JPEGs are decoded where the network runs",
        "fast",
        choices=("fast", "exact", "gpu"),
    )
    batch_size: int | None = flag("images a batch (default: by the hardware)", None, metavar="N")
    rows_per_part: int | None = flag(
        "rows a Parquet part, of 512 MiB at most (default: by the archive's size)", None, metavar="N"
    )
    actors: str = flag("model actors: auto, N or MIN:MAX", "auto", metavar="auto|N|MIN:MAX")
    gpus_per_actor: str = flag("GPUs an actor, a fraction shares one: auto or a number", "auto", metavar="auto|F")
    max_error_rate: float = flag("largest share of bad images before the job ends with 3", 0.05, metavar="F")
    overwrite: bool = flag("remove an earlier run's output first", False)
    update: bool = flag("add to an output what is new in the archive, replaced, or could not be read", False)
    cluster: str | None = flag(
        "machines that the job runs on, for its cost: 8xg6.2xlarge, 4xg6.2xlarge+2xc7i.4xlarge", None, metavar="SHAPE"
    )
    prices: str | None = flag("machines and prices (default: pipeline/prices.yaml)", None, metavar="FILE.yaml")
    dry_run: bool = flag("show the plan and the settings, do no work", False)

    def __post_init__(self) -> None:
        names = [self.input] if isinstance(self.input, str) else list(self.input)
        object.__setattr__(self, "input", tuple(names))
        if not names or not all(names):
            raise SettingRefused("--input is missing: name a folder, a glob or files of images")
        if not self.output:
            raise SettingRefused("--output is missing: name the directory to write to")
        object.__setattr__(self, "output", storage.normalize(self.output))
        keep = [self.keep] if isinstance(self.keep, str) else list(self.keep)
        object.__setattr__(self, "keep", tuple(name for names in keep for name in names.split(",") if name))
        for name, least in {"limit": 1, "max_pixels": 1, "batch_size": 1, "rows_per_part": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingRefused(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")
        check_choices(self)
        if not 0 <= self.max_error_rate <= 1:
            raise SettingRefused(f"--max-error-rate is {self.max_error_rate}: it is a share between 0 and 1")
        if self.update and (self.overwrite or self.limit is not None):
            raise SettingRefused("--update goes on with an output as it is: it does not go with --overwrite or --limit")
        self.actor_range()
        self.gpu_share()

    def actor_range(self) -> tuple[int, int] | None:
        """(least, most) actors, None for auto."""
        if self.actors == "auto":
            return None
        least, _, most = self.actors.partition(":")
        try:
            found = int(least), int(most or least)
        except ValueError:
            found = (0, 0)
        if not 1 <= found[0] <= found[1]:
            raise SettingRefused(f"--actors is {self.actors!r}: it is auto, a number from 1, or MIN:MAX")
        return found

    def gpu_share(self) -> float | None:
        """GPUs an actor, None for auto, 0 for the CPU."""
        if self.gpus_per_actor == "auto":
            return None
        try:
            share = float(self.gpus_per_actor)
        except ValueError:
            share = -1.0
        if not (0 <= share <= 1 or (share > 1 and share.is_integer())):
            raise SettingRefused(
                f"--gpus-per-actor is {self.gpus_per_actor!r}: it is auto, a fraction, or a whole number"
            )
        return share

    def keep_names(self) -> dict[str, str]:
        """Column of the shard → column of the result."""
        return kept_as(self.keep)

    def result_settings(self) -> dict[str, Any]:
        """The settings that change which rows come out or what is in them; a resumed run must have the same."""
        return {
            "input": [storage.redact(uri if "://" in uri else storage.normalize(uri)) for uri in self.input],
            "keep": list(self.keep),
            "image_column": self.image_column,
            "uri_column": self.uri_column,
            "limit": self.limit,
            "max_pixels": self.max_pixels,
            "exif_rotate": self.exif_rotate,
            "decoder": self.decoder,
        }


def kept_as(keep: Iterable[str]) -> dict[str, str]:
    """Column of the shard → column of the result, of `COLUMN` and `COLUMN:NAME`."""
    return {name: alias or name for name, _, alias in (each.partition(":") for each in keep)}


def fingerprint(settings: dict[str, Any]) -> str:
    """16 hex digits that change with any of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
