"""A finished output of any number of drawn vectors, written by the sink of a run, and a head for it.

Some of its rows are copies.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline import schema
from pipeline.embedding_space import EmbeddingSpace
from pipeline.models.heads import Head
from pipeline.output import directory
from pipeline.output import ledger as ledgers
from pipeline.stages.write import Sink
from pipeline.storage import access

ROWS_PER_PART = 50_000
CENTRES, SPREAD = 1000, 1.0
COPY_NOISE = 0.1
"""Length of a copy's difference, as a share of its vector's: a cosine of 0.995."""
COPY_SHARE = 0.02
TRANSFORM = {
    "resize": 256, "crop": 224, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3, "squash": False,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "input": ["/photos"], "max_pixels": 200_000_000, "exif_rotate": True, "decoder": "fast", "predictor": "Embedder",
    "model": "resnet18", "weights": "sha256:drawn", "precision": "float32", "transform": TRANSFORM,
}  # fmt: skip
PROVENANCE = {"model": "resnet18", "weights": "drawn", "weights_uri": None, "seed": 0}


def write(folder: Path, rows: int, dim: int, dtype: pa.DataType | None = None) -> list[tuple[int, int]]:
    """Write an output of clustered vectors, [rows, dim] of float32 or `dtype`.

    Returns the rows of each copy and its original.
    """
    record = {"layout": 2, "settings": SETTINGS, "provenance": PROVENANCE, "config": {}}
    access.write(f"{folder}/_run.json", json.dumps({**record, "embedding_space": _space().to_json()}).encode())
    columns = pa.schema([("embedding", schema.vector(dtype or pa.float32(), dim))])
    sink = Sink(str(folder), ledgers.begin(str(folder)).attempt, schema.result(columns, {}), "{}")
    copies: list[tuple[int, int]] = []
    for first, vectors, of_part in _parts(rows, dim):
        sink(_table(first, vectors, columns))
        copies += of_part
    directory.finish(str(folder))
    return copies


def write_head(file: Path, dim: int, classes: int) -> None:
    """Write a linear head of random weights that fits these outputs."""
    random = torch.Generator().manual_seed(0)
    tensors = {"weight": torch.randn(classes, dim, generator=random), "bias": torch.zeros(classes)}
    Head("linear", tensors, tuple(f"class {number}" for number in range(classes)), _space()).save(str(file))


def _space() -> EmbeddingSpace:
    space = EmbeddingSpace.of(SETTINGS)
    assert space is not None
    return space


def _parts(rows: int, dim: int) -> Iterator[tuple[int, np.ndarray, list[tuple[int, int]]]]:
    """First row, vectors, and copies within the part."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, dim), np.float32)
    for first in range(0, rows, ROWS_PER_PART):
        count = min(ROWS_PER_PART, rows - first)
        vectors = centres[rng.integers(CENTRES, size=count)]
        vectors += np.float32(SPREAD) * rng.standard_normal((count, dim), np.float32)
        copied = int(count * COPY_SHARE)
        chosen = rng.permutation(count)[: 2 * copied]
        originals, copies = chosen[:copied], chosen[copied:]
        lengths = np.linalg.norm(vectors[originals], axis=1, keepdims=True)
        noise = rng.standard_normal((copied, dim), np.float32)
        noise *= np.float32(COPY_NOISE) * lengths / np.linalg.norm(noise, axis=1, keepdims=True)
        vectors[copies] = vectors[originals] + noise
        pairs = zip((originals + first).tolist(), (copies + first).tolist(), strict=True)
        yield first, vectors, [(min(pair), max(pair)) for pair in pairs]


def _table(first: int, vectors: np.ndarray, columns: pa.Schema) -> pa.Table:
    count, types = len(vectors), schema.predicted(columns, {})
    numbers = pa.array(vectors.reshape(-1).astype(columns.field(0).type.value_type.to_pandas_dtype(), copy=False))
    names = pa.array([f"/photos/{row:09d}.jpg" for row in range(first, first + count)])
    given = {
        "image_id": names,
        "source": names,
        "shard": pa.array(np.zeros(count, np.int32)),
        "row": pa.array(np.arange(first, first + count)),
        "width": pa.array(np.full(count, 500, np.int32)),
        "height": pa.array(np.full(count, 375, np.int32)),
        "embedding": pa.FixedSizeListArray.from_arrays(numbers, type=columns.field(0).type),
    }
    return pa.table({each.name: given.get(each.name, pa.nulls(count, each.type)) for each in types}, schema=types)
