"""A head: embedding → scores of your own classes. One .safetensors file, made by `fit` and applied by `classify`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import SettingRefused, WeightsRefused, first_line
from pipeline.models.download import fetch_weights, file_name
from pipeline.storage import access, uris

SUFFIX = ".safetensors"
KEY = "nightshift_head"
FORMAT = 1
SHARPNESS = 0.07
"""Temperature of the votes of neighbours by their cosine similarity, as in the evaluation of DINO."""
MIN_SHARE = 1e-4
"""Share of the votes of a class that none of the neighbours has, so that its logarithm is finite."""


@dataclass(frozen=True)
class Head:
    """A classifier on top of an embedding.

    method: linear, knn, mlp or centroid. tensors: float32, by name; see `logits`. classes: names of the C classes, in
    their order. temperature: divisor of the logits that calibrates the scores. multi_label: an image may have several
    classes, so each score is a probability of its own. normalize: vectors are scaled to length 1 first.
    space: of the vectors that the head was fitted on; it fits no others. network: flags that give this network again
    (`model`, `weights`, `seed`, `input_spec`) and, for scenes, the same windows (`tile_stride`, `edge`, `max_nodata`).
    """

    method: str
    tensors: Mapping[str, Tensor]
    classes: tuple[str, ...]
    space: EmbeddingSpace
    temperature: float = 1.0
    multi_label: bool = False
    normalize: bool = True
    network: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        name = {"mlp": "hidden.weight", "knn": "vectors"}.get(self.method, "weight")
        return self.tensors[name].shape[1]

    def to(self, device: torch.device) -> "Head":
        """The same head on a device."""
        return Head(**{**vars(self), "tensors": {name: each.to(device) for name, each in self.tensors.items()}})

    def logits(self, vectors: Tensor) -> Tensor:
        """float32 [N, dim] → float32 [N, C].

        linear, centroid: `weight` [C, dim] and `bias` [C]. mlp: `hidden.weight` [H, dim], `hidden.bias`, a ReLU, then
        `weight` [C, H] and `bias`. knn: the logarithm of each class's share of the votes of the `k` nearest of
        `vectors` [M, dim], whose classes are `targets` [M, C] of 0 and 1.
        """
        x = vectors.float()
        if self.method in ("linear", "centroid"):
            products = x @ self.tensors["weight"].T
            return (products / _lengths(x) if self.normalize else products) + self.tensors["bias"]
        x = x / _lengths(x) if self.normalize else x
        if self.method == "knn":
            return self._votes(x)
        hidden = functional.linear(x, self.tensors["hidden.weight"], self.tensors["hidden.bias"]).relu()
        return functional.linear(hidden, self.tensors["weight"], self.tensors["bias"])

    def scores(self, vectors: Tensor) -> Tensor:
        """float32 [N, dim] → calibrated probabilities, float32 [N, C]. They add up to 1 unless `multi_label`."""
        logits = self.logits(vectors) / self.temperature
        return logits.sigmoid() if self.multi_label else logits.softmax(1)

    def save(self, uri: str) -> None:
        """Write the file, local or in a bucket."""
        from safetensors.torch import save

        names = ("method", "classes", "temperature", "multi_label", "normalize")
        record: dict[str, Any] = {name: getattr(self, name) for name in names}
        record |= {"format": FORMAT, "network": dict(self.network), "embedding_space": self.space.to_json()}
        tensors = {name: each.contiguous() for name, each in self.tensors.items()}
        access.write(uris.normalize(uri), save(tensors, {KEY: json.dumps(record)}))

    def _votes(self, x: Tensor) -> Tensor:
        similarities, neighbours = (x @ self.tensors["vectors"].T).topk(int(self.tensors["k"]), 1)
        votes = (similarities / SHARPNESS).softmax(1)[..., None] * self.tensors["targets"][neighbours]
        shares = votes.sum(1).clamp(MIN_SHARE, 1 - MIN_SHARE)
        return shares.logit() if self.multi_label else shares.log()


def _lengths(x: Tensor) -> Tensor:
    """[N, dim] → [N, 1], as torch.nn.functional.normalize divides by."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return lengths.clamp_min(1e-12)


@dataclass(frozen=True)
class NamedHead:
    """A head and its file. name: of the file, without its suffix. sha256: hex, of the file."""

    name: str
    sha256: str
    head: Head


def load_heads(files: Sequence[str]) -> tuple[NamedHead, ...]:
    """Read heads of vectors of one width. Each is named by its file.

    Raises WeightsRefused, and SettingRefused if two have the same name in any case.
    """
    heads = tuple(load_head(uri) for uri in files)
    names = [each.name.casefold() for each in heads]  # SQL does not distinguish A_label and a_label
    if repeated := next((each.name for each in heads if names.count(each.name.casefold()) > 1), None):
        raise SettingRefused(
            f"--head: two files are named {repeated}{SUFFIX}, and each head's columns have its name: rename one"
        )
    widths = {each.head.dim: each.name for each in heads}
    if len(widths) > 1:
        text = " and ".join(f"{name} takes {dim} numbers" for dim, name in widths.items())
        raise WeightsRefused(f"--head: {text}: heads of one run need the same vectors")
    return heads


def load_head(uri: str) -> NamedHead:
    """Read a head, local or remote. Raises WeightsRefused if it is missing, damaged or no head."""
    from safetensors import safe_open

    path, sha256 = fetch_weights(uri)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        head = None if text is None else _head(json.loads(text), tensors)
    except Exception as error:  # the exception of a damaged file depends on the place of the damage
        raise WeightsRefused(f"--head {uris.redact(uri)} cannot be read: {first_line(error)}") from error
    if head is None:
        raise WeightsRefused(
            f"--head {uris.redact(uri)} is no head: make one with `nightshift fit`; weights of a network are given "
            "with --weights"
        )
    return NamedHead(file_name(uri).removesuffix(SUFFIX), sha256, head)


def _head(record: dict[str, Any], tensors: dict[str, Tensor]) -> Head:
    """The head of a file. Raises ValueError and other exceptions if the file contradicts itself."""
    if record.pop("format") != FORMAT:
        raise ValueError("it was written by a newer version of Nightshift")
    space = EmbeddingSpace.from_json(record.pop("embedding_space"))
    head = Head(tensors=tensors, space=space, **{**record, "classes": tuple(record["classes"])})
    _check(head)
    return head


def _check(head: Head) -> None:
    classes = head.classes
    if len(set(classes)) < len(classes) or not classes or not all(isinstance(name, str) and name for name in classes):
        raise ValueError(f"its classes are {list(classes)[:5]}: they must be different names")
    if not (isinstance(head.temperature, float) and 0 < head.temperature < math.inf):
        raise ValueError(f"its temperature is {head.temperature}")
    if head.method not in _SHAPES:
        raise ValueError(f"its method is {head.method!r}, not one of {', '.join(_SHAPES)}")
    sizes = {"classes": len(classes)}
    for name, axes in _SHAPES[head.method].items():
        tensor = head.tensors[name]
        if tensor.ndim != len(axes):
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, not [{', '.join(axes)}]")
        expected = [sizes.setdefault(axis, size) for axis, size in zip(axes, tensor.shape, strict=True)]
        if list(tensor.shape) != expected:
            raise ValueError(f"{name} has the shape {list(tensor.shape)}, not {expected}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
    if head.method == "knn" and not 1 <= int(head.tensors["k"]) <= len(head.tensors["vectors"]):
        raise ValueError(f"k is {int(head.tensors['k'])}, of {len(head.tensors['vectors'])} vectors")


_SHAPES: dict[str, dict[str, tuple[str, ...]]] = {
    "linear": {"weight": ("classes", "dim"), "bias": ("classes",)},
    "centroid": {"weight": ("classes", "dim"), "bias": ("classes",)},
    "mlp": {
        "hidden.weight": ("hidden", "dim"),
        "hidden.bias": ("hidden",),
        "weight": ("classes", "hidden"),
        "bias": ("classes",),
    },
    "knn": {"vectors": ("images", "dim"), "targets": ("images", "classes"), "k": ()},
}
"""The tensors of each method, and the names of their axes."""
