"""Classifier: the most probable classes of each image."""

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.config import flag
from pipeline.errors import SettingRefused
from pipeline.predictors.base import Columns
from pipeline.predictors.network import NetworkPredictor

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.spec import ModelSpec


@dataclass
class Classifier(NetworkPredictor):
    """Columns label, label_id and score of the best class; top_labels, top_label_ids and top_scores of the top_k best.

    embeddings: add the column `embedding`, as Embedder does. Scores are probabilities: softmax over the logits, in
    float32. label_id: int32, the index of the network's output.
    """

    labels: str | None = flag(
        "class names: text, JSON or CSV (default: the weights' own)", None, metavar="FILE", fingerprint=False
    )
    top_k: int = flag("number of classes to keep per image", 5, metavar="N")
    embeddings: bool = flag("write the embedding too, in the same pass", False)

    needs_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise SettingRefused(f"--top-k is {self.top_k}: it must be at least 1")

    def settings(self) -> dict[str, object]:
        labels = hashlib.sha256(json.dumps(self.spec.labels).encode()).hexdigest()[:16]
        return {**super().settings(), "labels": labels}

    def _label_file(self) -> str | None:
        return self.labels

    def _columns(self, spec: "ModelSpec") -> pa.Schema:
        best = [("label", pa.string()), ("label_id", pa.int32()), ("score", pa.float32())]
        top = [
            ("top_labels", pa.list_(pa.string())),
            ("top_label_ids", pa.list_(pa.int32())),
            ("top_scores", pa.list_(pa.float32())),
        ]
        return pa.schema([*best, *top, *([self._embedding_field(spec)] if self.embeddings else [])])

    def _results(self, features: "Tensor", logits: "Tensor | None") -> Columns:
        from pipeline.inference.cuda_stream import to_host

        assert logits is not None
        top = logits.softmax(1).topk(min(self.top_k, self.spec.num_classes))
        scores, ids = to_host(top.values), to_host(top.indices.int())
        names = pa.array(self.spec.labels, pa.string()).take(pa.array(ids.reshape(-1)))
        offsets = pa.array(np.arange(0, ids.size + 1, ids.shape[1], dtype=np.int32))
        columns: dict[str, np.ndarray | pa.Array] = {
            "label": names.take(offsets[:-1]),
            "label_id": np.ascontiguousarray(ids[:, 0]),
            "score": np.ascontiguousarray(scores[:, 0]),
            "top_labels": pa.ListArray.from_arrays(offsets, names),
            "top_label_ids": pa.ListArray.from_arrays(offsets, pa.array(ids.reshape(-1))),
            "top_scores": pa.ListArray.from_arrays(offsets, pa.array(scores.reshape(-1))),
        }
        return {**columns, "embedding": self._embedding(features)} if self.embeddings else columns
