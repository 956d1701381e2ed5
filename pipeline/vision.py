"""torchvision, imported without torch's compiler, which takes two seconds and 150 MB in every process that has it.

torchvision.ops.roi_align asks it one question, when a region of interest is aligned. No network here does that.
"""

import sys
import types
from typing import cast

_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo import utils

    return bool(utils.is_compile_supported(device_type))


def _import_torchvision() -> types.ModuleType:
    names = [name for name in _COMPILER if name not in sys.modules]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    try:
        import torchvision
    finally:
        for name in names:
            del sys.modules[name]
    return cast(types.ModuleType, torchvision)


torchvision = _import_torchvision()
