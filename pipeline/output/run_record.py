"""The record of a run: settings, fingerprint, provenance, versions and labels. Computed once per run."""

import hashlib
import json
import platform
import re
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, Protocol
from urllib.parse import quote

from pipeline.config import RunConfig
from pipeline.embedding_space import EmbeddingSpace
from pipeline.storage import uris
from pipeline.version import __version__

LAYOUT = 2
"""Version of the output's layout. Version 1, which has no number in `_run.json`, had its parts beside `_run.json`."""
PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "pillow", "numpy")


class Described(Protocol):
    """The methods of a prepared predictor that a record needs."""

    def settings(self) -> dict[str, object]: ...
    def provenance(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class RunRecord:
    """The identity of a run. All fields are JSON values.

    output: URI of the output directory. settings: all settings that change results; a resumed run must have the same.
    provenance: description of the predictor, for people. config: flags of the attempt that began the run.
    """

    output: str
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    config: Mapping[str, Any]

    @staticmethod
    def of(config: RunConfig, predictor: Described) -> "RunRecord":
        """Describe a run with a prepared predictor."""
        settings = {**config.result_settings(), **predictor.settings()}
        as_read = json.loads(json.dumps(settings))  # equal to the settings that a later attempt reads from `_run.json`
        flags = {**asdict(config), **config.result_settings(), "output": uris.redact(config.output)}
        provenance = {**predictor.provenance(), **config.value_settings()}
        return RunRecord(config.output, as_read, provenance, flags)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the settings."""
        return fingerprint(self.settings)

    @property
    def model(self) -> str:
        """Name of the network, "" if the predictor has none."""
        return str(self.settings.get("model", ""))

    @cached_property
    def embedding_space(self) -> EmbeddingSpace | None:
        """The space of the run's vectors; None if no network computes any."""
        return EmbeddingSpace.of(self.settings)

    @cached_property
    def footer(self) -> str:
        """JSON for the metadata of every part, under the key `nightshift`."""
        return json.dumps({"fingerprint": self.fingerprint, **self._space(), **self.provenance})

    @cached_property
    def labels(self) -> dict[str, str]:
        """Labels of every metric of the run, in ASCII because Ray accepts no other characters.

        run: last name of the output's URI and 8 digits of the fingerprint, `embeddings-3f9a1c20`. output: that URI,
        without credentials.
        """
        uri = uris.redact(self.output).rstrip("/")
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", uri.rpartition("/")[2])
        return {"run": f"{name}-{self.fingerprint[:8]}", "output": quote(uri, safe=string.printable)}

    def to_json(self) -> bytes:
        """The content of `_run.json`."""
        record = {
            "layout": LAYOUT,
            "fingerprint": self.fingerprint,
            **self._space(),
            "settings": self.settings,
            "provenance": self.provenance,
            "config": self.config,
            "versions": _versions(),
        }
        return json.dumps(record, indent=1).encode()

    def _space(self) -> dict[str, Any]:
        return {"embedding_space": self.embedding_space.to_json()} if self.embedding_space else {}

    def difference(self, earlier: Mapping[str, Any]) -> str:
        """Describe the settings that differ from those of an earlier run."""
        names = [name for name in sorted({*earlier, *self.settings}) if earlier.get(name) != self.settings.get(name)]
        return "; ".join(
            f"{name} was {_shown(earlier.get(name))} and is {_shown(self.settings.get(name))}" for name in names
        )


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


def fingerprint(settings: Mapping[str, Any]) -> str:
    """16 hex digits that identify the settings, in any order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _versions() -> dict[str, str]:
    """Versions of Nightshift, Python and PACKAGES. Nightshift's is that of the code, which may not be installed."""
    running = {"nightshift": __version__, "python": platform.python_version()}
    return running | {name: version(name) for name in PACKAGES}
