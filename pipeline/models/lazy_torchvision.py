"""torchvision, imported without torch's compiler, which takes 2 s and 150 MB in every process.

Only torchvision.ops.roi_align uses the compiler, to ask one question when it is called. No network here calls it.
"""

import sys
import types
from typing import cast

_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


def _is_compile_supported(device_type: str) -> bool:
    from torch._dynamo import utils

    return bool(utils.is_compile_supported(device_type))


def _import_torchvision() -> types.ModuleType:
    """Import torchvision with stubs in place of the compiler's modules."""
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
