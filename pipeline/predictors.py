"""Pixels → result columns: Embedder and Classifier, and the base class of anyone's own predictor."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from pipeline import storage
from pipeline.config import Transform
from pipeline.errors import SettingRefused
from pipeline.models import ModelSpec, Network, build, resolve

log = logging.getLogger(__name__)

FIXED_BATCH_SIZE = 64
LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as Pillow's convert("L")."""

_NOT_IN_RESULTS = {"threads", "batch_size", "compile", "compile_auto"}
_RESOLVED = {"weights", "seed", "labels"}
"""Settings of a network that count by what they were resolved to: a moved file of weights is the same file."""

Columns = Mapping[str, np.ndarray | pa.Array]


class Predictor:
    """What a run does with its pixels. A predictor of one's own sets `columns` and writes `predict`.

    transform: the size that images are decoded to. columns: the result columns that it adds.
    threads, batch_size: what the run gives an actor; None before that.
    """

    transform: Transform = Transform()
    columns: pa.Schema = pa.schema([])
    threads: int | None = None
    batch_size: int | None = None

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

    def shrink(self, batch_size: int) -> None:
        """A batch did not fit the memory; those to come have at most this many images. Free what can be freed."""

    def predict(self, pixels: np.ndarray) -> Columns:
        """uint8 [N, crop, crop, 3] RGB → N values of each column."""
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


def _flag(help: str, default: Any, choices: Sequence[str] | None = None, **more: Any) -> Any:
    """A field that is also a command-line flag. choices, metavar: as argparse takes them."""
    return field(default=default, metadata={"help": help, **({"choices": choices} if choices else {}), **more})


@dataclass
class NetworkPredictor(Predictor):
    """What Embedder and Classifier share: one network, its weights, and how it runs.

    precision auto: bfloat16 where the hardware computes in it (float16 on a GPU that does not), float32 elsewhere.
    compile auto: compiled where the caller sets compile_auto.
    """

    model: str = _flag("torchvision name, timm:<name>, or package.module:function", "resnet50", metavar="NAME")
    weights: str = _flag("DEFAULT, a torchvision enum name, a path or URI, or random", "DEFAULT", metavar="WEIGHTS")
    precision: str = _flag("number format of the network", "auto", ("auto", "float32", "bfloat16", "float16"))
    compile: str = _flag("torch.compile: slow to start, then faster", "auto", ("auto", "on", "off"))
    embedding_dtype: str = _flag("number format of the embedding column", "float32", ("float32", "float16"))
    seed: int = _flag("seed of random weights", 0, metavar="N")
    threads: int | None = None
    compile_auto: bool = False
    _spec: ModelSpec | None = field(default=None, init=False, repr=False, compare=False)
    _runner: "_Runner | None" = field(default=None, init=False, repr=False, compare=False)

    needs_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            choices, value = each.metadata.get("choices"), getattr(self, each.name)
            if choices and value not in choices:
                flag = each.name.replace("_", "-")
                raise SettingRefused(f"--{flag} is {value!r}: it is one of {', '.join(choices)}")

    def __getstate__(self) -> dict[str, Any]:
        """Settings and ModelSpec travel to the actors; a loaded network stays where it is."""
        return {**self.__dict__, "_runner": None}

    @property
    def spec(self) -> ModelSpec:
        """The network as `prepare` found it."""
        if self._spec is None:
            self.prepare()
        assert self._spec is not None
        return self._spec

    def prepare(self) -> None:
        """Resolve the network and fetch its weights. Raises SettingRefused and WeightsRefused."""
        self._spec = resolve(
            self.model, self.weights, labels=self._label_file(), seed=self.seed, need_head=self.needs_head
        )
        self.transform = self._spec.transform
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
        """Build the network on this process's GPU, or on the CPU. Raises WeightsRefused."""
        if self.threads:
            torch.set_num_threads(self.threads)
        fixed_size = self.batch_size or FIXED_BATCH_SIZE
        wants_compile = self.compile == "on" or (self.compile == "auto" and self.compile_auto)
        self._runner = _Runner(self.spec, self.precision, fixed_size if wants_compile else None)

    def predict(self, pixels: np.ndarray) -> Columns:
        """uint8 [N, crop, crop, 3] RGB → the columns, N values each; an overflow or NaN is handed on as it is."""
        if self._runner is None:
            self.load()
        assert self._runner is not None
        features, logits = self._runner(pixels)
        return self._results(features, logits)

    def shrink(self, batch_size: int) -> None:
        if self._runner is not None:
            self._runner.shrink(batch_size)

    def _label_file(self) -> str | None:
        return None

    def _columns(self, spec: ModelSpec) -> pa.Schema:
        raise NotImplementedError

    def _results(self, features: Tensor, logits: Tensor | None) -> Columns:
        """float32 [N, embedding_dim] and [N, num_classes], on the network's device → the columns."""
        raise NotImplementedError

    def _embedding_field(self, spec: ModelSpec) -> pa.Field:
        value = pa.float16() if self.embedding_dtype == "float16" else pa.float32()
        return pa.field("embedding", pa.list_(value, spec.embedding_dim))

    def _embedding(self, features: Tensor) -> np.ndarray:
        """[N, embedding_dim] in embedding_dtype."""
        return features.to(getattr(torch, self.embedding_dtype)).cpu().numpy()


@dataclass
class Embedder(NetworkPredictor):
    """Column `embedding`: the input of the network's last classifier."""

    def _columns(self, spec: ModelSpec) -> pa.Schema:
        return pa.schema([self._embedding_field(spec)])

    def _results(self, features: Tensor, logits: Tensor | None) -> Columns:
        return {"embedding": self._embedding(features)}


@dataclass
class Classifier(NetworkPredictor):
    """Columns label, label_id, score, and the best top_k of each; with `embeddings` the embedding too.

    score: probability, softmax over the logits in float32.
    """

    labels: str | None = _flag("class names: text, JSON or CSV (default: the weights' own)", None, metavar="FILE")
    top_k: int = _flag("classes to keep of each image", 5, metavar="N")
    embeddings: bool = _flag("write the embedding too, in the same pass", False)

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

    def _columns(self, spec: ModelSpec) -> pa.Schema:
        best = [("label", pa.string()), ("label_id", pa.int32()), ("score", pa.float32())]
        top = [
            ("top_labels", pa.list_(pa.string())),
            ("top_label_ids", pa.list_(pa.int32())),
            ("top_scores", pa.list_(pa.float32())),
        ]
        return pa.schema([*best, *top, *([self._embedding_field(spec)] if self.embeddings else [])])

    def _results(self, features: Tensor, logits: Tensor | None) -> Columns:
        assert logits is not None
        top = logits.softmax(1).topk(min(self.top_k, self.spec.num_classes))
        scores, ids = top.values.cpu().numpy(), top.indices.int().cpu().numpy()
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


class _Runner:
    """A network on its device. fixed_size: images a batch, to which short ones are padded; None: any, uncompiled."""

    def __init__(self, spec: ModelSpec, precision: str, fixed_size: int | None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.fixed_size = fixed_size
        dtype = _dtype(precision, self.device)
        if dtype is torch.float32:
            torch.backends.cudnn.allow_tf32 = False  # TF32 keeps 10 bits of a float32's 23
        network = _FromPixels(_folded(build(spec), spec), spec, dtype)
        self.forward: Callable[[Tensor], tuple[Tensor, Tensor | None]] = network.to(self.device)
        self.staging = torch.empty(0, dtype=torch.uint8)
        if fixed_size:
            self._compile(fixed_size, spec.transform.crop)

    def __call__(self, pixels: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """uint8 [N, H, W, 3], N ≥ 1 → float32 [N, embedding_dim], [N, num_classes] or None, on the device."""
        size = self.fixed_size or len(pixels)
        batches = [self._batch(pixels[start : start + size], size) for start in range(0, len(pixels), size)]
        logits = [found for _, found in batches if found is not None]
        return torch.cat([features for features, _ in batches]), torch.cat(logits) if logits else None

    def shrink(self, size: int) -> None:
        """Give back what the batch that did not fit has taken; a compiled network is compiled again for this size."""
        self.fixed_size = self.fixed_size and min(self.fixed_size, size)
        self.staging = torch.empty(0, dtype=torch.uint8)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _batch(self, pixels: np.ndarray, size: int) -> tuple[Tensor, Tensor | None]:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.current_stream().synchronize()  # the last copy out of the staging memory is over
        if self.staging.shape[1:] != pixels.shape[1:] or len(self.staging) < size:
            self.staging = torch.zeros((size, *pixels.shape[1:]), dtype=torch.uint8, pin_memory=on_gpu)
        np.copyto(self.staging[: len(pixels)].numpy(), pixels)
        with torch.no_grad():
            features, logits = self.forward(self.staging[:size].to(self.device, non_blocking=True))
        return features[: len(pixels)], None if logits is None else logits[: len(pixels)]

    def _compile(self, size: int, crop: int) -> None:
        eager = self.forward
        options: dict[str, Any] | None = {"freezing": True} if self.device.type == "cpu" else None
        try:
            self.forward = torch.compile(eager, dynamic=False, options=options)
            self._batch(np.zeros((size, crop, crop, 3), np.uint8), size)
        except Exception as error:  # no C++ compiler, or a network that the compiler cannot take
            log.warning("torch.compile failed, so the network runs uncompiled: %s", str(error).partition("\n")[0])
            self.forward, self.fixed_size = eager, None


class _FromPixels(nn.Module):
    """uint8 [N, H, W, 3] on the device → float32 embedding and logits. The scale in float32, the network in `dtype`."""

    mean: Tensor
    std: Tensor
    luma: Tensor

    def __init__(self, network: Network, spec: ModelSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype, self.one_channel = dtype, spec.in_channels == 1
        for name, values in {"mean": spec.transform.mean, "std": spec.transform.std, "luma": LUMA}.items():
            self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        x = pixels.permute(0, 3, 1, 2).float()
        if self.one_channel:
            x = (x * self.luma).sum(1, keepdim=True)
        x = x.div_(255).sub_(self.mean).div_(self.std)
        features, logits = self.network(x.to(self.dtype))
        return features.float(), None if logits is None else logits.float()


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 on a CPU pays only where it computes in it: AVX512-BF16 or AMX."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def _folded(network: Network, spec: ModelSpec) -> Network:
    """Each batch normalisation folded into the convolution before it, where the network can be traced.

    A trace is one way through the network's Python and may be another network, so one image is put through both.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    size = spec.transform.crop
    image = torch.randn(1, spec.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            folded = fuse(network.body)
            before, after = network.body(image), folded(image)
        except Exception as error:  # tracing runs the network's own Python
            log.debug("%s stays unfolded: %s", spec.model, error)
            return network
        if torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
            network.body = folded
    return network
