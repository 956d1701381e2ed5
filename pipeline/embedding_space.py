"""EmbeddingSpace: which vectors can be compared with each other. Imports nothing from Nightshift."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

NOT_OF_VECTORS = {
    # which images are read, and what is written beside the vector
    "input", "keep", "image_column", "uri_column", "any_suffix", "limit", "max_pixels", "vectors",
    "zoom", "bbox", "datetime", "any_values", "geoparquet", "phash", "quality",
    # how `scale` was measured, which counts itself
    "scale_percentiles",
    # which columns the same features become. A float16 column is a rounded copy of the same vector
    "predictor", "columns", "embedding_dtype", "embeddings", "top_k", "labels", "heads",
}  # fmt: skip
"""Settings of a run that do not change its vectors. A setting that is not in this list counts, also a new one."""

CHOOSE_WINDOWS = {"stride", "edge", "max_nodata"}
"""The settings of windows that do not change the pixels of one window."""


@dataclass(frozen=True)
class EmbeddingSpace:
    """Everything that determines an image's vector, as JSON: network, weights, transform, values, precision, decoder.

    Vectors of two runs can be compared, and a head fits both, if their spaces have the same id. The id does not depend
    on the input, the output or the hardware: a precision of `auto` stands for itself, and is not the number format that
    the hardware chose.
    """

    description: Mapping[str, Any]

    @staticmethod
    def of(settings: Mapping[str, Any]) -> "EmbeddingSpace | None":
        """The space of a run with these settings, which `_run.json` has; None if no network computed its vectors.

        Outputs of earlier versions have no id, but the settings that it is computed from.
        """
        if not {"model", "weights", "transform"} <= settings.keys():
            return None
        of_vectors = {name: value for name, value in settings.items() if name not in NOT_OF_VECTORS}
        if tiling := of_vectors.get("tiling"):
            of_vectors["tiling"] = {name: value for name, value in tiling.items() if name not in CHOOSE_WINDOWS}
        return EmbeddingSpace(json.loads(json.dumps(of_vectors)))

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "EmbeddingSpace":
        """The space that `to_json` described."""
        return EmbeddingSpace({name: value for name, value in record.items() if name not in {"id", *NOT_OF_VECTORS}})

    def to_json(self) -> dict[str, Any]:
        """The id and what it stands for, for `_run.json` and the footer of each part."""
        return {"id": self.id, **self.description}

    @cached_property
    def id(self) -> str:
        """16 hex digits."""
        return hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, other: "EmbeddingSpace") -> str:
        """Name what differs, with this space's value and the other's: "weights are sha256:3f9a1c20…, not …".

        "" if the spaces are the same.
        """
        ours, others = _flat(self.description), _flat(other.description)
        names = [name for name in dict.fromkeys([*ours, *others]) if ours.get(name) != others.get(name)]
        return "; ".join(
            f"{name} is {_text(ours.get(name))}, {'not' if name in others else 'but was'} {_text(others.get(name))}"
            for name in names
        )


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    """The values by name, those of a group by `group.name`: a transform that differs in its crop is named by that."""
    flat: dict[str, Any] = {}
    for name, value in description.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            flat[name] = value
    return flat


def _text(value: Any) -> str:
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:20]}…" if text.startswith("sha256:") else text
