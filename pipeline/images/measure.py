"""Measures of an image: values computed from its decoded pixels that become columns of the results."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image


class Measure(Protocol):
    """A function of the pixels of an image. Its values are rows of `columns`; they may be None."""

    @property
    def columns(self) -> pa.Schema: ...

    def __call__(self, pixels: Image.Image | np.ndarray) -> Mapping[str, Any]:
        """pixels: the whole upright image, 8-bit RGB, uint8 [H, W, 3]. Large images may have been reduced."""


def measured(measures: Sequence[Measure], pixels: Image.Image | np.ndarray) -> dict[str, Any]:
    """The values of all measures of an image, by column."""
    return {name: value for measure in measures for name, value in measure(pixels).items()}
