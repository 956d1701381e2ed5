"""VectorClassifier: heads on the vectors of another output. No image is read and no network runs."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import SettingRefused
from pipeline.images.pixels import PixelFormat
from pipeline.images.transform import Transform
from pipeline.predictors.base import Allotment, Columns, Predictor
from pipeline.predictors.heads import HeadColumns
from pipeline.storage import uris

BATCH_BYTES = 32 << 20
MAX_BATCH_SIZE = 16_384


@dataclass
class VectorClassifier(Predictor):
    """The columns of Classifier with heads, from vectors.

    head: files of heads. space, dim: of the vectors; dim None if the output has none. source: the output that has them,
    for messages.
    """

    head: Sequence[str]
    space: EmbeddingSpace
    source: str = ""
    top_k: int = 5
    dim: int | None = None
    _columns: HeadColumns | None = field(default=None, init=False, repr=False, compare=False)

    transform = Transform(resize=1, crop=1)  # a vector is an image of one pixel
    images_are_alike: ClassVar[bool] = True
    runs_in_readers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise SettingRefused(f"--top-k is {self.top_k}: it must be at least 1")

    def prepare(self) -> None:
        """Read the heads. Raises WeightsRefused, also if they were fitted on other vectors."""
        from pipeline.models.heads import load_heads

        made = HeadColumns(load_heads(self.head), self.top_k)
        given = f"--from {uris.redact(self.source)}"
        made.check(self.space, given)
        dim = made.heads[0].head.dim
        made.check_width(dim if self.dim is None else self.dim, given)
        self._columns = made
        self.columns = made.schema
        self.pixel_format = PixelFormat("float32", dim)
        self.best_batch_size = max(1, min(MAX_BATCH_SIZE, BATCH_BYTES // (4 * dim)))

    def settings(self) -> dict[str, object]:
        assert self._columns is not None
        return {
            "predictor": type(self).__qualname__,
            "model": "head " + ", ".join(self._columns.settings()),
            "heads": self._columns.settings(),
            "top_k": self.top_k,
            "vectors_of": self.space.id,
        }

    def load(self, allotment: Allotment) -> None:
        import torch

        torch.set_num_threads(allotment.cores or torch.get_num_threads())

    def describe(self) -> str:
        return "cpu, float32"

    def predict(self, pixels: np.ndarray) -> Columns:
        """float32 [N, 1, 1, dim] → N values per column."""
        import torch

        assert self._columns is not None
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
            return self._columns.results(torch.from_numpy(pixels.reshape(len(pixels), -1)))
