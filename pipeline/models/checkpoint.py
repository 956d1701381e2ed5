"""A checkpoint file → a state dict that fits a network, or WeightsRefused."""

import argparse
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import WeightsRefused, first_line

_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_NESTED = ("state_dict", "model", "model_state_dict", "net", "weights", *_AVERAGED)
"""Keys under which training scripts save a state dict. If a file has several, the first one is taken."""
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # heads of Inception and GoogLeNet that are used only in training
_TRAINING = ("criterion.", "loss.", "loss_fn.", "n_averaged")  # tensors of a loss function or a moving average
_ONLY_DATA: list[Any] = [
    argparse.Namespace,  # the flags of a training script
    np.dtype,
    *(type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]
]
"""What pickles of training scripts hold beside tensors and that cannot run code: flags, and scalars of NumPy."""
_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)")


def read_state(path: str) -> "OrderedDict[str, Tensor]":
    """Read the tensors of a checkpoint by name, on the CPU; memory-mapped if the format allows it.

    Formats: safetensors, or torch.save() of a state dict, alone or under one of the usual keys: state_dict, model,
    model_state_dict, net, weights, state_dict_ema, model_ema, ema_state_dict, ema. Pickled code is never executed.
    Raises WeightsRefused.
    """
    try:
        if _is_safetensors(path):
            from safetensors.torch import load_file

            return OrderedDict(load_file(path))
        with torch.serialization.safe_globals(_ONLY_DATA):
            # Files from before PyTorch 1.6 are not zip archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsRefused(
            f"weights {path} hold more than tensors and were not executed ({_blocked_global(error)}); "
            "save the network's state_dict() instead, with torch.save or as .safetensors"
        ) from error
    except Exception as error:  # the exception of a damaged file depends on the place of the damage
        if "TorchScript" in str(error):
            raise WeightsRefused(
                f"weights {path} are TorchScript, a network with its code: save the state_dict() of its network instead"
            ) from error
        raise WeightsRefused(f"weights {path} cannot be read as a checkpoint: {first_line(error)}") from error
    return _find_state(content, path)


def read_metadata(path: str) -> dict[str, str]:
    """The metadata of a .safetensors file; none for other files. Raises WeightsRefused if the file is damaged."""
    if not _is_safetensors(path):
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise WeightsRefused(f"weights {path} cannot be read as a checkpoint: {first_line(error)}") from error


def _is_safetensors(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _find_state(content: Any, path: str) -> "OrderedDict[str, Tensor]":
    state = _first_state(content)
    if state is not None:
        return state
    is_mapping = isinstance(content, Mapping)
    holds = f"its keys are {_some(map(str, content))}" if is_mapping else f"it is a {type(content).__name__}"
    raise WeightsRefused(f"weights {path} hold no state dict: {holds}; save the network's state_dict()")


def _first_state(content: Any) -> "OrderedDict[str, Tensor] | None":
    """The first mapping with tensors: under one of _NESTED, at any depth, or the content itself."""
    if not isinstance(content, Mapping):
        return None
    for name in _NESTED:
        if name in content and (nested := _first_state(content[name])) is not None:
            return nested
    tensors = OrderedDict((name, value) for name, value in content.items() if isinstance(value, Tensor))
    if not tensors:
        return None
    tensors._metadata = dict(getattr(content, "_metadata", None) or {})  # type: ignore[attr-defined]
    return tensors


def _blocked_global(error: Exception) -> str:
    match = re.search(r"GLOBAL (\S+)", str(error))
    return f"they refer to {match.group(1)}" if match else first_line(error)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (", …" if len(listed) > 5 else "")


def align(state: "OrderedDict[str, Tensor]", expected: Iterable[str]) -> "OrderedDict[str, Tensor]":
    """Rename tensors to the names that the network expects, by removing the prefix that a wrapper has added.

    The prefix is the one that makes most names match: module., backbone., model., encoder., _orig_mod. or any other.
    Heads and losses that only training uses are removed if the network lacks them. Raises WeightsRefused if
    two tensors would get the same name.
    """
    names = set(expected)
    renamed = {key: _OLD_DENSENET.sub(r"\1\2", key) for key in state}
    prefix = _common_prefix(renamed.values(), names)
    aligned: OrderedDict[str, Tensor] = OrderedDict()
    for key, name in renamed.items():
        own = name.removeprefix(prefix)
        if own in aligned and own in names:
            raise WeightsRefused(
                f"the weights hold {own!r} twice, once with the prefix {prefix!r}: save the state_dict() of one network"
            )
        aligned[own] = state[key]
    for name in list(aligned):
        if name.startswith(_AUXILIARY + _TRAINING) and name not in names:
            del aligned[name]
    metadata: Mapping[str, Any] = getattr(state, "_metadata", {})
    aligned._metadata = {  # type: ignore[attr-defined]
        name.removeprefix(prefix) if name != prefix[:-1] else "": versions
        for name, versions in metadata.items()
        if f"{name}.".startswith(prefix)
    }
    return aligned


def unwrap_head(state: "OrderedDict[str, Tensor]", head: str) -> str:
    """Rename the tensors of a head of several layers, `fc.1.weight`, to those of the network's one layer, `fc.weight`.

    This is only possible if a single layer has tensors: the others are then a dropout, for example. Returns the name of
    that layer, "" if nothing was renamed. Raises WeightsRefused if several layers have tensors.
    """
    if not head or f"{head}.weight" in state:
        return ""
    inner = [name.removeprefix(f"{head}.") for name in state if name.startswith(f"{head}.")]
    layers = sorted({name.rpartition(".")[0] for name in inner})
    if len(layers) > 1:
        raise WeightsRefused(
            f"the weights hold a head of several layers ({_some(f'{head}.{layer}' for layer in layers)}), but the "
            f"network's {head} is one layer: write a function that builds the network with this head, and give it as "
            "--model package.module:function"
        )
    if not layers or not set(inner) <= {f"{layers[0]}.weight", f"{layers[0]}.bias"}:
        return ""
    for name in inner:
        state[f"{head}.{name.rpartition('.')[2]}"] = state.pop(f"{head}.{name}")
    return f"{head}.{layers[0]}"


def _common_prefix(keys: Iterable[str], names: set[str]) -> str:
    """The shortest of the prefixes that turn the most keys into names."""
    matches: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names:
                matches[".".join(parts[:i]) + "." if i else ""] += 1
    return max(matches, key=lambda prefix: (matches[prefix], -len(prefix)), default="")


def fit(network: nn.Module, state: "OrderedDict[str, Tensor]", subject: str, head: str = "") -> bool:
    """Load an aligned state into a network, which may be on the meta device, as float32.

    subject: the network and its weights, for messages. head: name of a classifier that may be missing as a whole.
    Returns whether the state contains the head. Raises WeightsRefused with the names of missing and unexpected tensors
    and of tensors of another shape.
    """
    state._metadata = state._metadata or network.state_dict()._metadata  # type: ignore[attr-defined]
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    refusal: RuntimeError | None = None
    try:
        missing, unexpected = network.load_state_dict(state, strict=False, assign=True)
        other_shapes = []
    except RuntimeError as error:
        refusal = error
        missing = [name for name in shapes if name not in state]
        unexpected = [name for name in state if name not in shapes]
        other_shapes = [
            f"{name} {list(tensor.shape)} for {list(shapes[name])}"
            for name, tensor in state.items()
            if name in shapes and tuple(tensor.shape) != shapes[name]
        ]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    of_head = {name for name in shapes if head and name.startswith(f"{head}.")}
    has_head = not of_head or not of_head <= set(missing)
    if not has_head:
        missing = [name for name in missing if name not in of_head]
    if refusal or missing or unexpected or other_shapes:
        groups = {"missing": missing, "unexpected": unexpected, "of another shape": other_shapes}
        faults = "; ".join(f"{len(names)} {fault} ({_some(names)})" for fault, names in groups.items() if names)
        faults = faults or " ".join(str(refusal).split())[:400]
        raise WeightsRefused(
            f"{subject} do not match: {faults}; use the --model that these weights were "
            "trained for, or a package.module:function that builds their network"
        )
    network.float()
    return has_head
