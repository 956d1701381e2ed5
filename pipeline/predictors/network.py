"""NetworkPredictor: the base of Embedder and Classifier. Imports torch when it is prepared."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.config import check_choices, flag
from pipeline.errors import DecodeError, SettingRefused, printable
from pipeline.images.pixels import Encoded
from pipeline.models import input_spec as input_specs
from pipeline.models import names, transform_files
from pipeline.models.overrides import INTERPOLATIONS, Overrides, numbers
from pipeline.predictors.base import Allotment, Columns, Predictor, field_values
from pipeline.schema import EMBEDDING, EMBEDDING_SCALE, vector
from pipeline.storage import uris

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.inference.jpeg import JpegDecoder
    from pipeline.inference.session import InferenceSession
    from pipeline.models.spec import ModelSpec

log = logging.getLogger(__name__)

ANTIALIASED = ("bilinear", "bicubic")
"""Interpolations for which torch has antialiasing on every device."""
EMBEDDING_DTYPES = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}


@dataclass
class NetworkPredictor(Predictor):
    """A network with its weights. Subclasses define the columns.

    precision auto: bfloat16 if the hardware computes in it, else float16 on a GPU and float32 on a CPU.
    compile auto: compile if the remaining images save more time than compiling takes.
    resize, crop, interpolation, mean, std: replace values of the network's own transform, and of transform_, a file or
    its content.
    input_spec: what weights for satellite imagery were trained on; its transform replaces the network's own.
    The fingerprint contains hashes of the weights and labels instead of their paths: a file may be moved. It contains
    the resulting transform instead of the flags that change it.
    """

    model: str = flag("torchvision name, timm:<name>, or package.module:function", "resnet50", metavar="NAME")
    weights: str = flag(
        "DEFAULT, a torchvision enum name, a path or URI, or random", "DEFAULT", metavar="WEIGHTS", fingerprint=False
    )
    input_spec: str | None = flag(
        "bands and numbers that the weights were trained on: a shipped specification or a file",
        None,
        metavar="NAME|FILE.yaml",
        fingerprint=False,
    )
    precision: str = flag("number format of the network", "auto", choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = flag(
        "torch.compile: slow to start, then faster", "auto", choices=("auto", "on", "off"), fingerprint=False
    )
    embedding_dtype: str = flag(
        "number format of the embedding column: float32, float16 or int8",
        "float32",
        metavar="DTYPE",
    )
    seed: int = flag("seed of random weights", 0, metavar="N", fingerprint=False)
    transform_: str | Mapping[str, Any] | None = flag(
        "transform of the weights, if they do not state it: resize, crop, interpolation, range, mean, std",
        None,
        metavar="FILE.yaml",
        fingerprint=False,
    )
    resize: int | None = flag(
        "short side of the resized image in pixels (default: the network's)", None, metavar="N", fingerprint=False
    )
    crop: int | None = flag(
        "side of the centre crop in pixels (default: the network's)", None, metavar="N", fingerprint=False
    )
    interpolation: str | None = flag(
        "of the resize (default: the network's)", None, choices=INTERPOLATIONS, fingerprint=False
    )
    mean: str | float | Sequence[str | float] = flag(
        "subtracted from pixels of 0 to 1: a number, or one per channel (default: the network's)",
        (),
        metavar="R,G,B",
        fingerprint=False,
    )
    std: str | float | Sequence[str | float] = flag(
        "divisor after the mean (default: the network's)", (), metavar="R,G,B", fingerprint=False
    )
    _spec: "ModelSpec | None" = field(default=None, init=False, repr=False, compare=False)
    _stated: Overrides = field(default=Overrides(), init=False, repr=False, compare=False)
    _session: "InferenceSession | None" = field(default=None, init=False, repr=False, compare=False)
    _jpeg_decoder: "JpegDecoder | None" = field(default=None, init=False, repr=False, compare=False)

    images_are_alike: ClassVar[bool] = True
    max_concurrency: ClassVar[int] = 2  # one batch is computed while the pixels and results of the other are copied

    def __post_init__(self) -> None:
        check_choices(self)
        _check_embedding_dtype(self.embedding_dtype)
        if not -(1 << 63) <= self.seed < 1 << 64:
            raise SettingRefused(f"--seed is {self.seed}: it must be a number of at most 64 bits")
        self._overrides()
        if isinstance(self.transform_, str):
            self._stated = transform_files.load(self.transform_)
        elif self.transform_ is not None:
            self._stated = transform_files.overrides_of(self.transform_, "transform_")
        names.check(self.model)
        if self.input_spec is not None:
            self._use(input_specs.load(self.input_spec))

    def _use(self, specification: input_specs.InputSpec) -> None:
        if self.mean not in ((), []) or self.std not in ((), []):
            raise SettingRefused(
                f"--mean and --std contradict --input-spec {self.input_spec}: leave them out, or write them into a "
                "copy of the specification"
            )
        if self.transform_ is not None:
            raise SettingRefused(
                f"--transform contradicts --input-spec {self.input_spec}, which has a transform: leave one of them out"
            )
        self.specification, self.pixel_format = specification, specification.pixel_format

    @property
    def needs_head(self) -> bool:
        """Whether the network must have a classifier."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Settings and ModelSpec are sent to the actors, but no loaded network."""
        return {**self.__dict__, "_session": None, "_jpeg_decoder": None}

    @property
    def spec(self) -> "ModelSpec":
        """The network as `prepare` resolved it; calls `prepare` if necessary."""
        if self._spec is None:
            self.prepare()
        assert self._spec is not None
        return self._spec

    def check(self) -> None:
        """Raise WeightsRefused for local files of weights and of class names that do not exist."""
        names.check_files(self.weights, self._label_file())

    def prepare(self) -> None:
        """Resolve the network and download its weights. Raises SettingRefused and WeightsRefused."""
        from pipeline.models.spec import resolve

        self._spec = resolve(
            self.model,
            self.weights,
            labels=self._label_file(),
            seed=self.seed,
            need_head=self.needs_head,
            overrides=self._overrides(),
            transform_file=self._stated,
            input=self.specification,
        )
        for note in self._spec.notes:
            log.warning("nightshift: %s", printable(note))
        self.transform, self.trained_scale = self._spec.transform, self._spec.scale
        pads = self.transform.resize < self.transform.crop
        is_rgb = self.specification is None
        self.takes_tiles = is_rgb and self.transform.interpolation == "bilinear" and not pads
        self.takes_encoded = is_rgb and self.transform.interpolation in ANTIALIASED and not pads
        self.columns = self._columns(self._spec)

    def settings(self) -> dict[str, object]:
        spec = self.spec
        return {
            "predictor": type(self).__qualname__,
            **field_values(self),
            "weights": f"sha256:{spec.sha256}" if spec.sha256 else f"random, seed {spec.seed}",
            "transform": asdict(spec.transform),
            **({"specification": self.specification.settings()} if self.specification else {}),
        }

    def provenance(self) -> dict[str, object]:
        spec = self.spec
        return {
            **self.settings(),
            **({"input_spec": input_specs.shown(self.input_spec)} if self.input_spec else {}),
            "transform_from": dict(spec.origins),
            "weights": spec.weights,
            "weights_uri": spec.weights_uri and uris.redact(spec.weights_uri),
            "weights_sha256": spec.sha256,
            "seed": spec.seed,
            "embedding_dim": spec.embedding_dim,
            "num_classes": spec.num_classes,
        }

    def load(self, allotment: Allotment) -> None:
        """Build the network on this process's GPU, or on the CPU. Raises SettingRefused and WeightsRefused."""
        from pipeline.inference.session import InferenceSession

        self._session = InferenceSession(
            self.spec,
            self.precision,
            self.compile,
            allotment.batch_size,
            cores=allotment.cores,
            images=allotment.images,
            lanes=1 if allotment.gpu_share is None else self.max_concurrency,
            gpu_share=allotment.gpu_share,
        )

    @property
    def session(self) -> "InferenceSession":
        """The loaded network; calls `load` with a default Allotment if necessary."""
        if self._session is None:
            self.load(Allotment())
        assert self._session is not None
        return self._session

    def decode(self, jpegs: Sequence[Encoded]) -> "tuple[Tensor, dict[int, DecodeError]]":
        """Decode N JPEGs on the network's device: uint8 [M, crop, crop, 3] there, and N - M errors by index.

        Raises SettingRefused if the device cannot decode JPEGs.
        """
        from pipeline.inference.jpeg import JpegDecoder

        if self._jpeg_decoder is None:
            self._jpeg_decoder = JpegDecoder(self.transform, self.session.device)
        return self._jpeg_decoder(jpegs)

    def join(self, pixels: "Sequence[np.ndarray | Tensor]") -> "Tensor":
        """Join RGB of several sides into [N, crop, crop, 3] on the network's device.

        One joined batch is faster than one batch per side.
        """
        return self.session.join(pixels)

    def predict(self, pixels: "np.ndarray | Tensor") -> Columns:
        """[N, crop, crop, bands] of `pixel_format`, or smaller square RGB tiles if `takes_tiles` → N values per column.

        A tensor must be on the network's device. NaN and infinity are returned as they are.
        """
        with self.session.lane() as run:
            return self._results(*run(pixels))

    def describe(self) -> str:
        return self._session.state if self._session else ""

    def limit_batch(self, batch_size: int) -> None:
        if self._session is not None:
            self._session.limit_batch(batch_size)

    def lost(self) -> bool:
        if self._session is None:
            return super().lost()
        with self._session.launch_lock:  # synchronising during the recording of a CUDA graph would break it
            return super().lost()

    def _overrides(self) -> Overrides:
        mean, std = numbers("mean", self.mean), numbers("std", self.std)
        return Overrides(self.resize, self.crop, self.interpolation, mean, std)

    def _label_file(self) -> str | None:
        return None

    def _columns(self, spec: "ModelSpec") -> pa.Schema:
        raise NotImplementedError

    def _results(self, features: "Tensor", logits: "Tensor | None") -> Columns:
        """float32 [N, embedding_dim], and [N, num_classes] or None, on the network's device → the columns."""
        raise NotImplementedError

    def _embedding_fields(self, spec: "ModelSpec") -> list[pa.Field]:
        embedding = pa.field(EMBEDDING, vector(EMBEDDING_DTYPES[self.embedding_dtype], spec.embedding_dim))
        scale = pa.field(EMBEDDING_SCALE, pa.float32())
        return [embedding, scale] if self.embedding_dtype == "int8" else [embedding]

    def _embedding(self, features: "Tensor") -> Columns:
        """[N, embedding_dim] in embedding_dtype, in this process's memory; for int8 also the scales [N]."""
        from pipeline.inference.cuda_stream import to_host

        if self.embedding_dtype == "int8":
            from pipeline.inference.quantize import to_int8

            vectors, scales = to_int8(features)
            return {EMBEDDING: to_host(vectors), EMBEDDING_SCALE: to_host(scales)}
        return {EMBEDDING: to_host(features.half() if self.embedding_dtype == "float16" else features)}


def _check_embedding_dtype(dtype: str) -> None:
    if dtype.startswith("pca"):
        raise SettingRefused(
            f"--embedding-dtype is {dtype}: principal components are known only when all vectors are; run with float16 "
            "or int8, then nightshift export OUTPUT --to small.parquet --pca 64"
        )
    if dtype not in EMBEDDING_DTYPES:
        raise SettingRefused(f"--embedding-dtype is {dtype!r}: it must be one of {', '.join(EMBEDDING_DTYPES)}")


def with_flags_of_weights(run: Mapping[str, Any], network: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add the flags that a checkpoint of `finetune` stands for to the given ones, of a run and of its network.

    Raises WeightsRefused if --weights cannot be read, and SettingRefused for a flag that contradicts it.
    """
    weights = network.get("weights", "")
    if not uris.redact(weights).endswith(".safetensors"):
        return dict(run), dict(network)
    from pipeline.models.download import fetch_weights
    from pipeline.models.record import read_record, with_flags_of_record

    record = read_record(fetch_weights(weights)[0])
    if record is None:
        return dict(run), dict(network)
    return with_flags_of_record(record, uris.redact(weights), run, network)
