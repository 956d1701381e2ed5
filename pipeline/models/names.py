"""Names of torchvision's networks, without an import of torch, which takes seconds."""

import difflib
import functools
import re
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import SettingRefused

REGISTERED = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)", re.MULTILINE)


@functools.cache
def torchvision_names() -> frozenset[str]:
    """The classification networks in torchvision's source files; empty if they are not found."""
    spec = find_spec("torchvision")
    folders = [Path(folder) / "models" for folder in (spec and spec.submodule_search_locations) or ()]
    files = [path for folder in folders for path in folder.glob("*.py")]
    return frozenset(name for path in files for name in REGISTERED.findall(path.read_text("utf-8")))


def check(model: str) -> None:
    """Raise SettingRefused for a name that is not torchvision's, and neither timm's nor that of a function."""
    names = torchvision_names()
    if names and ":" not in model and model not in names:
        raise unknown(model, sorted(names))


def unknown(model: str, names: list[str]) -> SettingRefused:
    """The error for an unknown name, with the nearest of the known ones."""
    close = difflib.get_close_matches(model, names, 3) or ["resnet50"]
    return SettingRefused(
        f"--model {model!r} is unknown: did you mean {', '.join(close)}? Also possible are timm:<name> and "
        "package.module:function"
    )
