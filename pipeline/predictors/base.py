"""Predictor: the base class of everything that turns pixels into result columns. Allotment: its resources.

Importing this imports neither torch nor Ray. A predictor imports torch in `prepare` or `load`.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import DecodeError, SettingRefused
from pipeline.images.pixels import RGB8, Encoded, PixelFormat
from pipeline.images.transform import Transform

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.input_spec import InputSpec

Columns = Mapping[str, np.ndarray | pa.Array]

MOVED_TO_ALLOTMENT = {"threads": "cores", "batch_size": "batch_size", "images": "images", "gpu_share": "gpu_share"}
"""Attributes of predictors before version 0.1 → fields of Allotment."""
"""Result columns by name, with one value per image."""


@dataclass(frozen=True, slots=True)
class Allotment:
    """Resources that a run gives to the predictor of one model actor.

    cores: CPU threads to compute with; None for all cores of the machine.
    batch_size: largest number of images in one call of `predict`.
    gpu_share: GPUs; may be a fraction, and 0 for the CPU. None: a whole GPU if there is one.
    images: approximate number of images that the actor will get; None if unknown.
    """

    cores: int | None = None
    batch_size: int = 64
    gpu_share: float | None = None
    images: int | None = None


class Predictor:
    """Base class of predictors. Subclasses define `columns` and `predict`; everything else is optional.

    transform: the size that images are decoded to. columns: Arrow schema of the result columns.
    pixel_format: number type and bands of the pixels that `predict` takes. Image files of another kind are refused if a
    conversion would lose something.
    max_concurrency: number of calls of `predict` at the same time in one actor, each on its own thread.
    takes_tiles: `predict` also accepts square images of at most half the crop's side, and enlarges them.
    takes_encoded: `decode` turns JPEGs into pixels that `predict` accepts. Used with --decoder gpu.
    best_batch_size: images per batch without --batch-size; None for what suits a network on the hardware.
    runs_in_readers: `predict` costs less than to move its pixels, so the tasks that read call it, without actors.
    images_are_alike: all images take the same memory. If one does not fit, another process uses the memory.

    specification: the bands and numbers that the network takes, by name; None if only `pixel_format` says it.
    trained_scale: range of `--scale` that the weights were trained with, if they say so; other ranges are refused.

    Needs `join` with `takes_tiles` or `takes_encoded`, and if a source gives arrays of several shapes.
    """

    transform: Transform = Transform()
    columns: pa.Schema = pa.schema([])
    pixel_format: PixelFormat = RGB8
    max_concurrency: ClassVar[int] = 1
    images_are_alike: ClassVar[bool] = False
    runs_in_readers: ClassVar[bool] = False
    takes_tiles: bool = False
    takes_encoded: bool = False
    specification: "InputSpec | None" = None
    trained_scale: tuple[float, float] | None = None
    best_batch_size: int | None = None

    def __getattr__(self, name: str) -> Any:
        """Called for missing attributes only."""
        if name in MOVED_TO_ALLOTMENT:
            raise SettingRefused(
                f"{type(self).__qualname__}.{name} does not exist: write load(self, allotment) and keep "
                f"allotment.{MOVED_TO_ALLOTMENT[name]}"
            )
        raise AttributeError(f"{type(self).__qualname__!r} object has no attribute {name!r}")

    def check(self) -> None:
        """Refuse settings that are known to be wrong without slow work or imports. Called on the driver, first."""

    def prepare(self) -> None:
        """Check the settings. Called once on the driver, before any work. Raise the errors of `pipeline.errors`."""

    def settings(self) -> dict[str, object]:
        """Settings that change results, as JSON, for the run's fingerprint.

        Raises SettingRefused if there are no columns, or if a dataclass field is not JSON.
        """
        name = type(self).__qualname__
        if not len(self.columns):
            raise SettingRefused(
                f"{name} has no columns: define them, like columns = pa.schema([('score', pa.float32())])"
            )
        columns = {column.name: str(column.type) for column in self.columns}
        pixels = {} if self.pixel_format == RGB8 else {"pixels": str(self.pixel_format)}
        transform = asdict(self.transform)
        return {"predictor": name, "columns": columns, "transform": transform, **pixels, **field_values(self)}

    def provenance(self) -> dict[str, object]:
        """Description of the predictor, as JSON, for `_run.json` and the footer of each part."""
        return self.settings()

    def check_space(self, space: EmbeddingSpace | None) -> None:
        """Refuse the space of the run's vectors if the predictor's head was fitted on others. Called on the driver."""

    def load(self, allotment: Allotment) -> None:
        """Load the network, for example. Called once in each actor, before the first batch."""

    def describe(self) -> str:
        """Device, number format and other details of this process, for the report."""
        return ""

    def limit_batch(self, batch_size: int) -> None:
        """Free memory, and prepare for batches of at most this many images.

        Called with a smaller size after a batch did not fit the memory. Called with a larger size again if a single
        image was the cause.
        """

    def lost(self) -> bool:
        """Whether this process's GPU has failed, so that all further calls would fail. Called after an error."""
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return True
        return False

    def decode(self, jpegs: Sequence[Encoded]) -> tuple[Any, dict[int, DecodeError]]:
        """Decode JPEGs: the pixels of the good ones in order, for `predict`, and the errors of the others by index."""
        raise NotImplementedError(f"{type(self).__qualname__} has no decode()")

    def join(self, pixels: "Sequence[np.ndarray | Tensor]") -> Any:
        """Join arrays of several shapes, and results of `decode`, into one batch for `predict`, in order."""
        raise NotImplementedError(
            f"{type(self).__qualname__} has no join(), but a batch holds images of several shapes"
        )

    def gpu_memory_bytes(self) -> int | None:
        """GPU memory that torch has reserved in this process; None without a GPU."""
        torch = sys.modules.get("torch")
        return int(torch.cuda.memory_reserved()) if torch and torch.cuda.is_initialized() else None

    def predict(self, pixels: np.ndarray) -> Columns:
        """[N, H, W, bands] of `pixel_format` → N values per column. H = W = transform.crop for image files.

        An exception makes the batch run again in halves, down to the images that cause it. They become error rows.
        A NightshiftError ends the run instead.
        """
        raise NotImplementedError(f"{type(self).__qualname__} has no predict()")


def field_values(predictor: Predictor) -> dict[str, object]:
    """Dataclass fields that change results: all but private fields and `flag(…, fingerprint=False)`.

    Raises SettingRefused for a value that is not JSON.
    """
    fields: tuple[Any, ...] = dataclasses.fields(predictor) if dataclasses.is_dataclass(predictor) else ()
    names = [each.name for each in fields if each.metadata.get("fingerprint", True) and not each.name.startswith("_")]
    values = {name: getattr(predictor, name) for name in names}
    for name, value in values.items():
        try:
            json.dumps(value)
        except TypeError as error:
            kind = f"{type(predictor).__qualname__}.{name}"
            raise SettingRefused(
                f"{kind} is {value!r}, which is not JSON: override settings() to describe it"
            ) from error
    return values
