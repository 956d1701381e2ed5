"""Embedder: one vector per image."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.predictors.base import Columns
from pipeline.predictors.network import NetworkPredictor

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.spec import ModelSpec


@dataclass
class Embedder(NetworkPredictor):
    """Column `embedding`: the input of the network's classifier, [embedding_dim] of embedding_dtype per image.

    With int8 also `embedding_scale`, by which it must be multiplied.
    """

    def _columns(self, spec: "ModelSpec") -> pa.Schema:
        return pa.schema(self._embedding_fields(spec))

    def _results(self, features: "Tensor", logits: "Tensor | None") -> Columns:
        return self._embedding(features)
