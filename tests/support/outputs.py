"""Small outputs of embeddings, written by the project's own sink and without a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline import schema
from pipeline.config import RunConfig
from pipeline.embedding_space import EmbeddingSpace
from pipeline.inference.quantize import to_int8
from pipeline.output import directory
from pipeline.output import ledger as ledgers
from pipeline.output.run_record import RunRecord
from pipeline.planning.archive import Archive
from pipeline.predictors.base import Allotment, Predictor
from pipeline.stages.load import Loader
from pipeline.stages.predict import Predict
from pipeline.stages.write import Sink
from pipeline.storage import access

SETTINGS: dict[str, Any] = {
    "input": ["/photos"],
    "max_pixels": 200_000_000,
    "exif_rotate": True,
    "decoder": "fast",
    "predictor": "Embedder",
    "model": "tiny:network",
    "weights": "random, seed 0",
    "precision": "float32",
    "embedding_dtype": "float32",
    "transform": {
        "resize": 32, "crop": 32, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3, "squash": False,
    },
}  # fmt: skip
PROVENANCE = {"model": "tiny:network", "weights": "random", "weights_uri": None, "seed": 0}


def write_output(
    folder: Path,
    image_ids: Sequence[str],
    vectors: np.ndarray,
    *,
    errors: Sequence[str] = (),
    kept: Mapping[str, Sequence[Any]] | None = None,
    settings: Mapping[str, Any] = SETTINGS,
    rows_per_part: int = 7,
    dtype: pa.DataType | None = None,
    shard: int = 0,
) -> Path:
    """Write a finished output: one row per image_id with its vector and kept texts or integers, then the errors.

    Called again with another shard, it adds the rows in an attempt of their own, as `--update` does.
    """
    columns = pa.schema([("embedding", schema.vector(dtype or pa.float32(), vectors.shape[1]))])
    scales = [{} for _ in vectors]
    if dtype == pa.int8():
        numbers, factors = to_int8(torch.from_numpy(vectors))
        vectors, scales = numbers.numpy(), [{schema.EMBEDDING_SCALE: float(factor)} for factor in factors]
        columns = columns.append(pa.field(schema.EMBEDDING_SCALE, pa.float32()))
    keep = {name: _type_of(values) for name, values in (kept or {}).items()}
    space = EmbeddingSpace.of(settings)
    record = {"layout": 2, "settings": dict(settings), "provenance": PROVENANCE, "config": {}}
    record |= {"embedding_space": space.to_json()} if space else {}
    access.write(f"{folder}/_run.json", json.dumps(record).encode())
    sink = Sink(str(folder), ledgers.begin(str(folder)).attempt, schema.result(columns, keep), "{}")
    rows = [
        {
            "image_id": image_id,
            "source": image_id.partition("#")[0],
            "shard": shard,
            "row": row,
            "width": 64,
            "height": 48,
        }
        | {
            "embedding": vectors[row].tolist(),
            **scales[row],
            **{name: values[row] for name, values in (kept or {}).items()},
        }
        for row, image_id in enumerate(image_ids)
    ]
    rows += [
        {"image_id": image_id, "source": image_id, "shard": shard, "row": len(image_ids) + number}
        | {"stage": "decode", "error_type": "truncated", "message": f"{image_id} ends early"}
        for number, image_id in enumerate(errors)
    ]
    for start in range(0, len(rows), rows_per_part):
        table = pa.Table.from_pylist(rows[start : start + rows_per_part], schema=schema.predicted(columns, keep))
        sink(table)
    directory.finish(str(folder))
    return folder


def _type_of(values: Sequence[Any]) -> pa.DataType:
    return pa.int64() if any(isinstance(value, int) for value in values) else pa.string()


def run_here(config: RunConfig, predictor: Predictor) -> str:
    """A whole run of the project's own stages in this process, without Ray. Returns the output."""
    predictor.prepare()
    archive = Archive(config)
    Path(config.output).mkdir(parents=True, exist_ok=True)
    record = RunRecord.of(config, predictor)
    plan, _ = directory.prepare(config, record, archive)
    loader = Loader.of(config, predictor, archive.options(), rows_per_table=16, keep=plan.keep)
    keep = loader.kept
    ledger = ledgers.begin(config.output)
    sink = Sink(config.output, ledger.attempt, schema.result(predictor.columns, keep), record.footer)
    predict = Predict(predictor, keep, Allotment(batch_size=16, gpu_share=0))
    for index, todo in plan.remaining(ledger.coverage):
        for table in loader.load(plan.load(index), todo):
            sink(predict(table))
    directory.finish(config.output)
    return config.output
