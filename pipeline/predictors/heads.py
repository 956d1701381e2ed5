"""The columns of heads: embedding → label, score and best classes, for one head or for several."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import WeightsRefused
from pipeline.predictors.base import Columns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.models.heads import NamedHead


@dataclass(frozen=True)
class HeadColumns:
    """Result columns of some heads. The columns of several heads begin with each one's name: `trees_label`.

    top_k: number of classes to keep per image.
    """

    heads: "tuple[NamedHead, ...]"
    top_k: int

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([field for each in self.heads for field in class_fields(self._prefix(each))])

    def settings(self) -> dict[str, str]:
        """The heads of a run, for its fingerprint: name → sha256 of the file."""
        return {each.name: each.sha256 for each in self.heads}

    def to(self, device: "torch.device") -> "HeadColumns":
        """The same, on a device."""
        heads = (type(each)(each.name, each.sha256, each.head.to(device)) for each in self.heads)
        return HeadColumns(tuple(heads), self.top_k)

    def results(self, features: "Tensor") -> Columns:
        """float32 [N, dim] → the columns. Of an image with several classes, `label` is the one of the highest score."""
        columns: dict[str, Any] = {}
        for each in self.heads:
            scores = each.head.scores(features)
            columns |= class_columns(scores, each.head.classes, self.top_k, self._prefix(each))
        return columns

    def check(self, space: EmbeddingSpace | None, given: str) -> None:
        """Raise WeightsRefused if a head was fitted on vectors of another space. given: what has that space."""
        from pipeline.models.head_flags import refuse_difference

        for each in self.heads:
            refuse_difference(each, space, given)

    def check_width(self, dim: int, given: str) -> None:
        """Raise WeightsRefused if the heads take vectors of another width. given: what has vectors of `dim` numbers."""
        for each in self.heads:
            if each.head.dim != dim:
                raise WeightsRefused(
                    f"--head {each.name} takes vectors of {each.head.dim} numbers, and those of {given} have {dim}: "
                    "fit a head to these vectors"
                )

    def _prefix(self, head: "NamedHead") -> str:
        return f"{head.name}_" if len(self.heads) > 1 else ""


def class_fields(prefix: str = "") -> list[pa.Field]:
    """Fields of the best class and of the top_k best."""
    fields = [
        ("label", pa.string()),
        ("label_id", pa.int32()),
        ("score", pa.float32()),
        ("top_labels", pa.list_(pa.string())),
        ("top_label_ids", pa.list_(pa.int32())),
        ("top_scores", pa.list_(pa.float32())),
    ]
    return [pa.field(f"{prefix}{name}", type_) for name, type_ in fields]


def class_columns(
    scores: "Tensor", names: tuple[str, ...], top_k: int, prefix: str = ""
) -> Mapping[str, np.ndarray | pa.Array]:
    """float32 [N, C] → the columns of `class_fields`."""
    from pipeline.inference.cuda_stream import to_host

    top = scores.topk(min(top_k, len(names)))
    best, ids = to_host(top.values), to_host(top.indices.int())
    labels = pa.array(names, pa.string()).take(pa.array(ids.reshape(-1)))
    offsets = pa.array(np.arange(0, ids.size + 1, ids.shape[1], dtype=np.int32))
    columns: dict[str, np.ndarray | pa.Array] = {
        "label": labels.take(offsets[:-1]),
        "label_id": np.ascontiguousarray(ids[:, 0]),
        "score": np.ascontiguousarray(best[:, 0]),
        "top_labels": pa.ListArray.from_arrays(offsets, labels),
        "top_label_ids": pa.ListArray.from_arrays(offsets, pa.array(ids.reshape(-1))),
        "top_scores": pa.ListArray.from_arrays(offsets, pa.array(best.reshape(-1))),
    }
    return {f"{prefix}{name}": column for name, column in columns.items()}
