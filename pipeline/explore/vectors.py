"""The vectors of an output: their space, the network that computed them, and blocks of numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import schema
from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import InputRefused, OutputRefused
from pipeline.explore.table import Output

COLUMN = "embedding"
MIN_LENGTH = 1e-12

Vectors = NDArray[np.float32]


def space_of(output: Output) -> EmbeddingSpace:
    """The space of an output's vectors. Raises OutputRefused if no network computed them."""
    recorded = output.record.get("embedding_space")
    space = EmbeddingSpace.from_json(recorded) if recorded else EmbeddingSpace.of(output.settings)
    if space is None:
        raise OutputRefused(f"{output.uri} has no embeddings of a network: give the output of `nightshift embed`")
    return space


def network_of(output: Output) -> dict[str, Any]:
    """The flags that give the output's network, weights and input specification again."""
    provenance: Mapping[str, Any] = output.record.get("provenance", {})
    model, weights, uri = provenance["model"], provenance["weights"], provenance.get("weights_uri")
    flags = {"model": model}
    if specification := provenance.get("input_spec"):
        flags["input_spec"] = specification
    if weights == "random":
        return {**flags, "weights": weights, "seed": provenance["seed"]}
    is_own = weights == model or weights.startswith("timm:")
    is_official = "_Weights." in weights and str(uri).startswith("http")
    return {**flags, "weights": "DEFAULT" if is_own else weights if is_official else uri or weights}


def vector_type(output: Output) -> pa.FixedSizeListType:
    """Arrow type of the output's vectors. Raises OutputRefused without such a column, InputRefused for another type."""
    output.require(["image_id", COLUMN])
    type_ = output.schema.field(COLUMN).type
    if not schema.is_vector(type_):
        raise InputRefused(f"{output.uri}: the column {COLUMN} is {type_}, not vectors of one length")
    return type_


def dim_of(output: Output) -> int:
    """Width of the output's vectors. Raises as `vector_type` does."""
    return int(vector_type(output).list_size)


def as_vectors(column: pa.Array | pa.ChunkedArray, dim: int) -> Vectors:
    """float32 [N, dim] of a column of vectors, as a writable copy."""
    return np.array(view_vectors(column, dim), np.float32)  # writable, as torch wants


def view_vectors(column: pa.Array | pa.ChunkedArray, dim: int) -> Vectors:
    """float32 [N, dim] of a column of vectors, without a copy if it is one chunk of float32. It may be read-only."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return np.asarray(flat, np.float32)


def scaled(vectors: Vectors) -> Vectors:
    """Scale each vector to length 1, as torch.nn.functional.normalize does."""
    return scale_in_place(vectors.copy())


def scale_in_place(vectors: Vectors) -> Vectors:
    """Scale each vector to length 1, without a further array of their size."""
    vectors /= lengths(vectors)[:, None]
    return vectors


def lengths(vectors: Vectors) -> Vectors:
    """Length of each vector, at least MIN_LENGTH, float32 [N]."""
    return np.asarray(np.maximum(np.sqrt(np.einsum("nd,nd->n", vectors, vectors)), MIN_LENGTH), np.float32)
