"""Nightshift: run a network over an image archive of any size, and write the results as Parquet."""

from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig, flag
from pipeline.errors import (
    DecodeError,
    ImageError,
    InputRefused,
    Interrupted,
    NightshiftError,
    NotWhole,
    OutputLocked,
    OutputRefused,
    PredictError,
    ReadError,
    Refused,
    SettingRefused,
    StorageRefused,
    TooManyErrors,
    WeightsRefused,
)
from pipeline.images.transform import Transform
from pipeline.version import __version__

if TYPE_CHECKING:
    from pipeline.estimates.forecast import Forecast, estimate
    from pipeline.explore.table import Output, open_output
    from pipeline.images.pixels import PixelFormat
    from pipeline.output.verify import Verification, verify
    from pipeline.predictors.base import Allotment, Predictor
    from pipeline.predictors.classify import Classifier
    from pipeline.predictors.embed import Embedder
    from pipeline.report.report import Report
    from pipeline.runner import run

__all__ = [
    "Allotment",
    "Classifier",
    "DecodeError",
    "Embedder",
    "Forecast",
    "ImageError",
    "InputRefused",
    "Interrupted",
    "NightshiftError",
    "NotWhole",
    "Output",
    "OutputLocked",
    "OutputRefused",
    "PixelFormat",
    "PredictError",
    "Predictor",
    "ReadError",
    "Refused",
    "Report",
    "RunConfig",
    "SettingRefused",
    "StorageRefused",
    "TooManyErrors",
    "Transform",
    "Verification",
    "WeightsRefused",
    "__version__",
    "estimate",
    "flag",
    "open_output",
    "run",
    "verify",
]

_MODULES = {
    "Allotment": "predictors.base",
    "Classifier": "predictors.classify",
    "Embedder": "predictors.embed",
    "Forecast": "estimates.forecast",
    "Output": "explore.table",
    "PixelFormat": "images.pixels",
    "Predictor": "predictors.base",
    "Report": "report.report",
    "Verification": "output.verify",
    "estimate": "estimates.forecast",
    "open_output": "explore.table",
    "run": "runner",
    "verify": "output.verify",
}
"""Public name → module. Imported at first use, so that decode workers do not import torch, nor `--help` Ray."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"pipeline.{_MODULES[name]}"), name)
