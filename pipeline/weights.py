"""A checkpoint's file → a state dict, fitted to a network or refused."""

import argparse
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import WeightsRefused, first_line

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")

_NESTED = ("state_dict", "model", "model_state_dict", "net")
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # heads of Inception and GoogLeNet that only training executes
_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)")


def read_state(path: str) -> "OrderedDict[str, Tensor]":
    """The tensors of a checkpoint by name, on the CPU, mapped from the file where its format allows.

    safetensors, or torch.save() of a state dict, bare or under state_dict, model, model_state_dict or net. Pickled code
    is never executed. Raises WeightsRefused.
    """
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    try:
        if is_safetensors:
            from safetensors.torch import load_file

            return OrderedDict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # a training script's flags, data only
            # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsRefused(
            f"weights {path} hold more than tensors and were not executed ({_blocked_global(error)}); "
            "save the network's state_dict() instead, with torch.save or as .safetensors"
        ) from error
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise WeightsRefused(f"weights {path} cannot be read as a checkpoint: {first_line(error)}") from error
    return _find_state(found, path)


def _find_state(found: Any, path: str) -> "OrderedDict[str, Tensor]":
    nested = [found[name] for name in _NESTED if isinstance(found, Mapping) and name in found]
    for state in [*nested, found]:
        tensors = (
            OrderedDict((k, v) for k, v in state.items() if isinstance(v, Tensor)) if isinstance(state, Mapping) else {}
        )
        if isinstance(tensors, OrderedDict) and tensors:
            tensors._metadata = dict(getattr(state, "_metadata", None) or {})  # type: ignore[attr-defined]
            return tensors
    holds = (
        f"its keys are {_some(map(str, found))}" if isinstance(found, Mapping) else f"it is a {type(found).__name__}"
    )
    raise WeightsRefused(f"weights {path} hold no state dict: {holds}; save the network's state_dict()")


def _blocked_global(error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"they want {found.group(1)}" if found else first_line(error)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (", …" if len(listed) > 5 else "")


def align(state: "OrderedDict[str, Tensor]", wanted: Iterable[str]) -> "OrderedDict[str, Tensor]":
    """The state under the network's own names: what a wrapper put before them is stripped, of all names that have it.

    The prefix is the one that makes most names match: module., backbone., model., encoder., _orig_mod., or any other.
    Raises WeightsRefused where two tensors would get the same of those names.
    """
    names = set(wanted)
    renamed = {key: _OLD_DENSENET.sub(r"\1\2", key) for key in state}
    fits: Counter[str] = Counter()
    for key in renamed.values():
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names:
                fits[".".join(parts[:i]) + "." if i else ""] += 1
    prefix = max(fits, key=lambda found: (fits[found], -len(found)), default="")
    aligned: OrderedDict[str, Tensor] = OrderedDict()
    for key, name in renamed.items():
        own = name.removeprefix(prefix)
        if own in aligned and own in names:
            raise WeightsRefused(
                f"the weights hold {own!r} twice, once with {prefix!r} before it: save the state_dict() of one network"
            )
        aligned[own] = state[key]
    for name in list(aligned):
        if name.startswith(_AUXILIARY) and name not in names:
            del aligned[name]
    metadata: Mapping[str, Any] = getattr(state, "_metadata", {})
    aligned._metadata = {  # type: ignore[attr-defined]
        name.removeprefix(prefix) if name != prefix[:-1] else "": versions
        for name, versions in metadata.items()
        if f"{name}.".startswith(prefix)
    }
    return aligned


def fit(network: nn.Module, state: "OrderedDict[str, Tensor]", what: str, head: str = "") -> bool:
    """Load an aligned state into the network, which may be weightless. Returns whether the head came with it.

    head: name of a classifier that may be missing as a whole. Raises WeightsRefused, naming what is missing, surplus or
    misshapen.
    """
    state._metadata = state._metadata or network.state_dict()._metadata  # type: ignore[attr-defined]
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    refused: RuntimeError | None = None
    try:
        missing, surplus = network.load_state_dict(state, strict=False, assign=True)
        misshapen = []
    except RuntimeError as error:
        refused = error
        missing, surplus = (
            [name for name in shapes if name not in state],
            [name for name in state if name not in shapes],
        )
        misshapen = [
            f"{name} {list(tensor.shape)} for {list(shapes[name])}"
            for name, tensor in state.items()
            if name in shapes and tuple(tensor.shape) != shapes[name]
        ]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    of_head = {name for name in shapes if head and name.startswith(f"{head}.")}
    headless = bool(of_head) and of_head <= set(missing)
    if headless:
        missing = [name for name in missing if name not in of_head]
    faults = {"missing": missing, "surplus": surplus, "of another shape": misshapen}
    if refused or any(faults.values()):
        found = "; ".join(f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names)
        found = found or " ".join(str(refused).split())[:400]
        raise WeightsRefused(
            f"{what} do not fit together: {found}; name the --model that these weights were trained for"
        )
    network.float()
    return not headless
