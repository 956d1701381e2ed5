"""Classifier: the most probable classes of each image."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

from pipeline.config import flag
from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import SettingRefused
from pipeline.predictors.base import Allotment, Columns
from pipeline.predictors.heads import HeadColumns, class_columns, class_fields
from pipeline.predictors.network import NetworkPredictor

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.models.heads import NamedHead
    from pipeline.models.spec import ModelSpec


@dataclass
class Classifier(NetworkPredictor):
    """Columns label, label_id and score of the best class; top_labels, top_label_ids and top_scores of the top_k best.

    embeddings: add the column `embedding`, as Embedder does. Scores are probabilities: softmax over the logits, in
    float32. label_id: int32, the index of the network's output.
    head: files of `nightshift fit`, whose classes replace the network's own. With several, the columns of each begin
    with its name. The network must be the one that the heads were fitted on.
    """

    labels: str | None = flag(
        "class names: text, JSON or CSV (default: the weights' own)", None, metavar="FILE", fingerprint=False
    )
    top_k: int = flag("number of classes to keep per image", 5, metavar="N")
    embeddings: bool = flag("write the embedding too, in the same pass", False)

    head: Sequence[str] = flag(
        "classes of your own, from fit; several heads write one group of columns each",
        (),
        metavar="FILE",
        fingerprint=False,
    )
    _heads: HeadColumns | None = field(default=None, init=False, repr=False, compare=False)
    _loaded: HeadColumns | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.head = (self.head,) if isinstance(self.head, str) else tuple(self.head)
        if self.head and self.labels:
            raise SettingRefused("--labels names the network's own classes: leave it out with --head")
        if self.top_k < 1:
            raise SettingRefused(f"--top-k is {self.top_k}: it must be at least 1")

    @property
    def needs_head(self) -> bool:
        return not self.head

    @property
    def heads(self) -> "tuple[NamedHead, ...]":
        """The heads, once `prepare` has read them; () without `head`."""
        return self._heads.heads if self._heads else ()

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_loaded": None}

    def prepare(self) -> None:
        """Read the heads, then do what NetworkPredictor does. Raises SettingRefused and WeightsRefused."""
        if self.head:
            from pipeline.models.heads import load_heads

            self._heads = HeadColumns(load_heads(self.head), self.top_k)
        super().prepare()
        if self._heads:
            self._heads.check_width(self.spec.embedding_dim, "this run")

    def check_space(self, space: EmbeddingSpace | None) -> None:
        if self._heads:
            self._heads.check(space, "this run")

    def load(self, allotment: Allotment) -> None:
        super().load(allotment)
        self._loaded = self._heads and self._heads.to(self.session.device)

    def settings(self) -> dict[str, object]:
        if self._heads:
            return {**super().settings(), "heads": self._heads.settings()}
        labels = hashlib.sha256(json.dumps(self.spec.labels).encode()).hexdigest()[:16]
        return {**super().settings(), "labels": labels}

    def _label_file(self) -> str | None:
        return self.labels

    def _columns(self, spec: "ModelSpec") -> pa.Schema:
        classes = list(self._heads.schema) if self._heads else class_fields()
        return pa.schema([*classes, *(self._embedding_fields(spec) if self.embeddings else [])])

    def _results(self, features: "Tensor", logits: "Tensor | None") -> Columns:
        if self._loaded:
            columns = self._loaded.results(features)
        else:
            assert logits is not None
            columns = class_columns(logits.softmax(1), self.spec.labels, self.top_k)
        return {**columns, **self._embedding(features)} if self.embeddings else columns
