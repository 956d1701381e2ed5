"""Names of networks and of local files, checked without an import of torch or timm, which takes seconds."""

import difflib
import functools
import os
import re
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.storage import uris

SUFFIXES = (".pt", ".pth", ".pth.tar", ".ckpt", ".bin", ".safetensors")
"""Of files of weights."""

REGISTERED = re.compile(r"^@register_model(?:\(\))?\n(?:@.*\n)*def (\w+)", re.MULTILINE)
RENAMED = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", re.MULTILINE | re.DOTALL)
OLD_NAME = re.compile(r"""^\s*['"]([\w.]+)['"]\s*:""", re.MULTILINE)


@functools.cache
def torchvision_names() -> frozenset[str]:
    """The classification networks in torchvision's source files; empty if they are not found."""
    return frozenset(name for text in _sources("torchvision") for name in REGISTERED.findall(text))


@functools.cache
def timm_names() -> frozenset[str]:
    """The networks in timm's source files, without tags, and their earlier names; empty if they are not found."""
    texts = _sources("timm")
    renamed = (block for text in texts for block in RENAMED.findall(text))
    names = (name for text in texts for name in REGISTERED.findall(text))
    return frozenset([*names, *(name for block in renamed for name in OLD_NAME.findall(block))])


def _sources(package: str) -> list[str]:
    """The text of the modules in `models/` of a package."""
    spec = find_spec(package)
    folders = [Path(folder) / "models" for folder in (spec and spec.submodule_search_locations) or ()]
    return [path.read_text("utf-8") for folder in folders for path in folder.glob("*.py")]


def check(model: str) -> None:
    """Raise SettingRefused for a name that is neither torchvision's nor timm's nor that of a function."""
    if model.startswith("timm:"):
        names, name = timm_names(), model.removeprefix("timm:")
        if names and not names & {name, name.partition(".")[0]}:  # an earlier name may have a dot, as a tag has
            raise unknown_timm(model, sorted(names))
        return
    names = torchvision_names()
    if names and ":" not in model and model not in names:
        raise unknown(model, sorted(names))


def check_files(weights: str, labels: str | None) -> None:
    """Raise WeightsRefused for local files of weights and of class names that do not exist."""
    is_file = uris.redact(weights).endswith(SUFFIXES)
    for flag, name in (("--weights", weights if is_file else None), ("--labels", labels)):
        path = uris.normalize(name) if name else None
        if path and uris.is_local(path) and not os.path.isfile(path):
            raise WeightsRefused(
                f"{flag} {path} cannot be read: no such file on {os.uname().nodename}; use a path or URI that every "
                "node can read"
            )


def unknown_timm(model: str, names: list[str]) -> SettingRefused:
    """The error for an unknown network of timm, with the nearest of the known ones."""
    close = difflib.get_close_matches(model.removeprefix("timm:"), names, 3) or ["resnet50"]
    known = ", ".join(f"timm:{name}" for name in close)
    return SettingRefused(f"--model {model!r} is unknown: did you mean {known}?")


def unknown(model: str, names: list[str]) -> SettingRefused:
    """The error for an unknown name, with the nearest of the known ones."""
    close = difflib.get_close_matches(model, names, 3) or ["resnet50"]
    return SettingRefused(
        f"--model {model!r} is unknown: did you mean {', '.join(close)}? Also possible are timm:<name> and "
        "package.module:function"
    )
