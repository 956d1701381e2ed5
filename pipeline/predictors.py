"""Pixels → result columns: Embedder and Classifier, and the base class of anyone's own predictor.

Importing this costs nothing: torch comes in when a predictor is prepared or loaded.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.config import Transform, check_choices, flag
from pipeline.errors import DecodeError, SettingRefused

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.decode import Encoded
    from pipeline.gpu_decode import JpegDecoder
    from pipeline.models import ModelSpec
    from pipeline.network import NetworkRunner

FIXED_BATCH_SIZE = 64

ANTIALIASED = ("bilinear", "bicubic")
"""Interpolations that torch has with antialiasing, on any device."""

_NOT_IN_RESULTS = {"threads", "batch_size", "images", "gpu_share", "max_concurrency", "compile"}
_RESOLVED = {"weights", "seed", "labels"}
"""Settings of a network that count by what they were resolved to: a moved file of weights is the same file."""

Columns = Mapping[str, np.ndarray | pa.Array]


class Predictor:
    """What a run does with its pixels. A predictor of one's own sets `columns` and writes `predict`.

    transform: the size that images are decoded to. columns: the result columns that it adds.
    threads, batch_size, images, gpu_share: what the run gives an actor: cores, images at once, about how many in all,
    and GPUs, of which it may have a fraction or none; None before that.
    max_concurrency: batches that an actor may bring to `predict` at once, each on a thread of its own.
    takes_tiles: `predict` also takes square images of at most half the crop's side, and enlarges them itself.
    takes_encoded: `decode` turns JPEGs into pixels that `predict` takes; with --decoder gpu it is given them.
    With either of them `join` makes one batch of images of several sizes.
    images_are_alike: each takes as much memory as any other, so that one which does not fit is not itself to blame.
    """

    transform: Transform = Transform()
    columns: pa.Schema = pa.schema([])
    threads: int | None = None
    batch_size: int | None = None
    images: int | None = None
    gpu_share: float | None = None
    max_concurrency: ClassVar[int] = 1
    images_are_alike: ClassVar[bool] = False
    takes_tiles: bool = False
    takes_encoded: bool = False

    def prepare(self) -> None:
        """Once, on the driver, before any work: check the settings. Raise the errors of `pipeline.errors`."""

    def settings(self) -> dict[str, object]:
        """What makes results differ, as JSON, for the run's fingerprint: here class, columns, transform and fields."""
        name = type(self).__qualname__
        if not len(self.columns):
            raise SettingRefused(f"{name} adds no columns: give it columns = pa.schema([('score', pa.float32())])")
        columns = {column.name: str(column.type) for column in self.columns}
        return {"predictor": name, "columns": columns, "transform": asdict(self.transform), **_field_values(self)}

    def provenance(self) -> dict[str, object]:
        """What `_run.json` and the footer of every part say of it, as JSON."""
        return self.settings()

    def load(self) -> None:
        """Once, in each actor, before the first batch."""

    def describe(self) -> str:
        """How `predict` runs in this process, for the report: device, number format and the like."""
        return ""

    def limit_batch(self, batch_size: int) -> None:
        """Batches have at most this many images from here on: fewer, since one did not fit the memory, or again more.
        Free what can be freed."""

    def lost(self) -> bool:
        """Whether this process's GPU answers no more, as torch knows it: asked after an error, which then was its."""
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return True
        return False

    def decode(self, jpegs: "Sequence[Encoded]") -> tuple[Any, dict[int, DecodeError]]:
        """JPEGs → what `predict` takes of those that are images, in order, and the errors of the others by place."""
        raise NotImplementedError(f"{type(self).__qualname__} has no decode()")

    def join(self, pixels: "Sequence[np.ndarray | Tensor]") -> Any:
        """Images of several sizes, and what `decode` returned → one batch of all, in order, that `predict` takes."""
        raise NotImplementedError(f"{type(self).__qualname__} has no join()")

    def gpu_memory_bytes(self) -> int | None:
        """What this process holds of its GPU's memory, as torch knows it; None without a GPU."""
        torch = sys.modules.get("torch")
        return int(torch.cuda.memory_reserved()) if torch and torch.cuda.is_initialized() else None

    def predict(self, pixels: np.ndarray) -> Columns:
        """uint8 [N, crop, crop, 3] RGB, with `takes_tiles` also smaller → N values of each column."""
        raise NotImplementedError(f"{type(self).__qualname__} has no predict()")


def _field_values(predictor: Predictor) -> dict[str, object]:
    """The dataclass fields of a predictor that change results."""
    fields: tuple[Any, ...] = dataclasses.fields(predictor) if dataclasses.is_dataclass(predictor) else ()
    unused = _NOT_IN_RESULTS | (_RESOLVED if isinstance(predictor, NetworkPredictor) else set())
    names = [each.name for each in fields if each.name not in unused and not each.name.startswith("_")]
    values = {name: getattr(predictor, name) for name in names}
    for name, value in values.items():
        try:
            json.dumps(value)
        except TypeError as error:
            kind = f"{type(predictor).__qualname__}.{name}"
            raise SettingRefused(
                f"{kind} = {value!r} is no JSON value: override settings() to say what it is"
            ) from error
    return values


@dataclass
class NetworkPredictor(Predictor):
    """What Embedder and Classifier share: one network, its weights, and how it runs.

    precision auto: bfloat16 where the hardware computes in it (float16 on a GPU that does not), float32 elsewhere.
    compile auto: compiled where so much work is left that it pays.
    """

    model: str = flag("torchvision name, timm:<name>, or package.module:function", "resnet50", metavar="NAME")
    weights: str = flag("DEFAULT, a torchvision enum name, a path or URI, or random", "DEFAULT", metavar="WEIGHTS")
    precision: str = flag("number format of the network", "auto", choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = flag("torch.compile: slow to start, then faster", "auto", choices=("auto", "on", "off"))
    embedding_dtype: str = flag("number format of the embedding column", "float32", choices=("float32", "float16"))
    seed: int = flag("seed of random weights", 0, metavar="N")
    threads: int | None = None
    _spec: "ModelSpec | None" = field(default=None, init=False, repr=False, compare=False)
    _runner: "NetworkRunner | None" = field(default=None, init=False, repr=False, compare=False)
    _jpeg_decoder: "JpegDecoder | None" = field(default=None, init=False, repr=False, compare=False)

    images_are_alike: ClassVar[bool] = True
    max_concurrency: ClassVar[int] = 2  # one computes while another's pixels come and its results go
    needs_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choices(self)

    def __getstate__(self) -> dict[str, Any]:
        """Settings and ModelSpec travel to the actors; a loaded network stays where it is."""
        return {**self.__dict__, "_runner": None, "_jpeg_decoder": None}

    @property
    def spec(self) -> "ModelSpec":
        """The network as `prepare` found it."""
        if self._spec is None:
            self.prepare()
        assert self._spec is not None
        return self._spec

    def prepare(self) -> None:
        """Resolve the network and fetch its weights. Raises SettingRefused and WeightsRefused."""
        from pipeline.models import resolve

        self._spec = resolve(
            self.model, self.weights, labels=self._label_file(), seed=self.seed, need_head=self.needs_head
        )
        self.transform = self._spec.transform
        pads = self.transform.resize < self.transform.crop
        self.takes_tiles = self.transform.interpolation == "bilinear" and not pads
        self.takes_encoded = self.transform.interpolation in ANTIALIASED and not pads
        self.columns = self._columns(self._spec)

    def settings(self) -> dict[str, object]:
        spec = self.spec
        return {
            "predictor": type(self).__qualname__,
            **_field_values(self),
            "weights": f"sha256:{spec.sha256}" if spec.sha256 else f"random, seed {spec.seed}",
            "transform": asdict(spec.transform),
        }

    def provenance(self) -> dict[str, object]:
        spec = self.spec
        return {
            **self.settings(),
            "weights": spec.weights,
            "weights_uri": spec.weights_uri and storage.redact(spec.weights_uri),
            "weights_sha256": spec.sha256,
            "seed": spec.seed,
            "embedding_dim": spec.embedding_dim,
            "num_classes": spec.num_classes,
        }

    def load(self) -> None:
        """Build the network on this process's GPU, or on the CPU. Raises WeightsRefused and SettingRefused."""
        from pipeline.network import NetworkRunner

        batch_size = self.batch_size or FIXED_BATCH_SIZE
        self._runner = NetworkRunner(
            self.spec,
            self.precision,
            self.compile,
            batch_size,
            threads=self.threads,
            images=self.images,
            lanes=1 if self.gpu_share is None else self.max_concurrency,
            gpu_share=self.gpu_share,
        )

    @property
    def runner(self) -> "NetworkRunner":
        """The network, loaded."""
        if self._runner is None:
            self.load()
        assert self._runner is not None
        return self._runner

    def decode(self, jpegs: "Sequence[Encoded]") -> "tuple[Tensor, dict[int, DecodeError]]":
        """JPEGs → uint8 [M, crop, crop, 3] on the network's device. Raises SettingRefused where that decodes none."""
        from pipeline.gpu_decode import JpegDecoder

        if self._jpeg_decoder is None:
            self._jpeg_decoder = JpegDecoder(self.transform, self.runner.device)
        return self._jpeg_decoder(jpegs)

    def join(self, pixels: "Sequence[np.ndarray | Tensor]") -> "Tensor":
        """uint8 [N, crop, crop, 3] on the network's device: a batch of each size would have to be filled up."""
        return self.runner.join(pixels)

    def predict(self, pixels: "np.ndarray | Tensor") -> Columns:
        """uint8 [N, crop, crop, 3] RGB → the columns, N values each; an overflow or NaN is handed on as it is.

        A tensor is on the network's device already.
        """
        with self.runner.lane() as run:
            return self._results(*run(pixels))

    def describe(self) -> str:
        return self._runner.state if self._runner else ""

    def limit_batch(self, batch_size: int) -> None:
        if self._runner is not None:
            self._runner.limit_batch(batch_size)

    def lost(self) -> bool:
        if self._runner is None:
            return super().lost()
        with self._runner.starting:  # a GPU that is waited for while a graph is recorded on it spoils the recording
            return super().lost()

    def _label_file(self) -> str | None:
        return None

    def _columns(self, spec: "ModelSpec") -> pa.Schema:
        raise NotImplementedError

    def _results(self, features: "Tensor", logits: "Tensor | None") -> Columns:
        """float32 [N, embedding_dim] and [N, num_classes], on the network's device → the columns."""
        raise NotImplementedError

    def _embedding_field(self, spec: "ModelSpec") -> pa.Field:
        value = pa.float16() if self.embedding_dtype == "float16" else pa.float32()
        return pa.field("embedding", pa.list_(value, spec.embedding_dim))

    def _embedding(self, features: "Tensor") -> np.ndarray:
        """[N, embedding_dim] in embedding_dtype."""
        from pipeline.lane import to_host

        return to_host(features.half() if self.embedding_dtype == "float16" else features)


@dataclass
class Embedder(NetworkPredictor):
    """Column `embedding`: the input of the network's last classifier."""

    def _columns(self, spec: "ModelSpec") -> pa.Schema:
        return pa.schema([self._embedding_field(spec)])

    def _results(self, features: "Tensor", logits: "Tensor | None") -> Columns:
        return {"embedding": self._embedding(features)}


@dataclass
class Classifier(NetworkPredictor):
    """Columns label, label_id, score, and the best top_k of each; with `embeddings` the embedding too.

    score: probability, softmax over the logits in float32.
    """

    labels: str | None = flag("class names: text, JSON or CSV (default: the weights' own)", None, metavar="FILE")
    top_k: int = flag("classes to keep of each image", 5, metavar="N")
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
        from pipeline.lane import to_host

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
