"""Nightshift: run a network over an image archive of any size, into Parquet that anything can read."""

from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig, Transform
from pipeline.errors import NightshiftError

if TYPE_CHECKING:
    from pipeline.predictors import Classifier, Embedder, Predictor
    from pipeline.report import Report
    from pipeline.runner import run

__version__ = "0.1.0"

__all__ = ["Classifier", "Embedder", "NightshiftError", "Predictor", "Report", "RunConfig", "Transform", "run"]

_HOMES = {
    "Classifier": "predictors",
    "Embedder": "predictors",
    "Predictor": "predictors",
    "Report": "report",
    "run": "runner",
}


def __getattr__(name: str) -> Any:
    """Import on first use: decode workers must start without torch, and `--help` without Ray."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pipeline.{_HOMES[name]}"), name)
