"""What a checkpoint that `finetune` wrote says of itself: network, transform, classes and training, in its metadata."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from pipeline.errors import SettingRefused, WeightsRefused, first_line
from pipeline.images.transform import Transform
from pipeline.models.classifier import Network
from pipeline.models.overrides import numbers
from pipeline.models.transform_files import METADATA_KEY as KEY
from pipeline.storage import access, uris

SUFFIX = ".safetensors"
OF_TRANSFORM = ("resize", "crop", "interpolation", "mean", "std")


@dataclass(frozen=True)
class CheckpointRecord:
    """The metadata of a checkpoint.

    model: as in --model. transform: of the training. classes: names of the outputs, in order. values: settings of the
    images' numbers that the training had, as `bands` and `scale`; a run must have the same. input_spec: as in
    --input-spec. training: settings and figures of the training, as JSON.
    """

    model: str
    transform: Transform
    classes: tuple[str, ...]
    values: Mapping[str, Any] = field(default_factory=dict)
    input_spec: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text under KEY."""
        transform = asdict(self.transform)
        if not self.transform.squash:
            del transform["squash"]
        return json.dumps({**vars(self), "transform": transform})

    @staticmethod
    def from_json(text: str) -> "CheckpointRecord | None":
        """The record of such a text, None if it does not name a network and its classes."""
        try:
            content = json.loads(text)
        except ValueError:
            return None
        if not isinstance(content, dict) or not {"model", "classes", "transform"} <= content.keys():
            return None
        given = {**content["transform"]}
        transform = Transform(**{**given, "mean": tuple(given["mean"]), "std": tuple(given["std"])})
        more = {name: content[name] for name in ("values", "input_spec", "training") if name in content}
        return CheckpointRecord(str(content["model"]), transform, tuple(map(str, content["classes"])), **more)


def read_record(path: str) -> CheckpointRecord | None:
    """The record of a local file of weights, None if it has none. Raises WeightsRefused if it cannot be read."""
    from safetensors import safe_open

    with open(path, "rb") as file:
        if file.read(9)[8:] != b"{":  # not safetensors
            return None
    try:
        with safe_open(path, framework="pt") as tensors:
            text = (tensors.metadata() or {}).get(KEY)
        return None if text is None else CheckpointRecord.from_json(text)
    except Exception as error:  # the exception of a damaged file depends on the place of the damage
        raise WeightsRefused(f"weights {path} cannot be read as a checkpoint: {first_line(error)}") from error


def write_checkpoint(uri: str, state: Mapping[str, Tensor], record: CheckpointRecord) -> None:
    """Write a checkpoint, local or in a bucket."""
    from safetensors.torch import save

    tensors = {name: each.detach().cpu().contiguous().clone() for name, each in state.items()}
    access.write(uris.normalize(uri), save(tensors, {KEY: record.to_json()}))


def state_of(network: Network, head: str) -> dict[str, Tensor]:
    """The tensors of a network by the names that they have in the network with its classifier in place.

    head: name of the classifier.
    """
    assert network.classifier is not None
    body = {name: each for name, each in network.body.state_dict().items() if not name.startswith(f"{head}.")}
    return {**body, **{f"{head}.{name}": each for name, each in network.classifier.state_dict().items()}}


def check_model(record: CheckpointRecord, model: str, weights: str) -> None:
    """Raise SettingRefused if a file holds another network."""
    if model != record.model:
        raise SettingRefused(
            f"--model is {model}, but --weights {weights} holds {record.model}: leave --model out, or use "
            f"{record.model}"
        )


def check_names(record: CheckpointRecord, names: Sequence[str], labels: str, weights: str) -> None:
    """Raise SettingRefused if a file of class names differs from a checkpoint's own."""
    if tuple(names) != record.classes:
        place = next(
            (n for n, (a, b) in enumerate(zip(names, record.classes, strict=False)) if a != b), len(record.classes)
        )
        ours, theirs = (each[place] if place < len(each) else "nothing" for each in (names, record.classes))
        raise SettingRefused(
            f"--labels {labels}: class {place} is {ours}, but {theirs} in --weights {weights}: leave --labels out"
        )


def with_flags_of_record(
    record: CheckpointRecord, weights: str, run: Mapping[str, Any], network: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add the flags that a checkpoint stands for to the given ones, of a run and of its network.

    Raises SettingRefused for a given flag with another value.
    """
    of_network: dict[str, Any] = {"model": record.model}
    of_network |= {"input_spec": record.input_spec} if record.input_spec else {}
    own = {**{name: getattr(record.transform, name) for name in OF_TRANSFORM}, **of_network, **record.values}
    for name, value in {**network, **run}.items():
        if name in own and not _are_equal(name, value, own[name]):
            raise SettingRefused(
                f"--{name.replace('_', '-')} is {_text(value)}, but {_text(own[name])} in --weights {weights}: "
                "leave it out"
            )
    return {**run, **record.values}, {**network, **of_network}


def _are_equal(name: str, given: Any, own: Any) -> bool:
    if name in ("mean", "std"):
        values = numbers(name, given)
        return values == own or (len(values) == 1 and set(values) == set(own))
    return bool(_range(given) == _range(own)) if name == "scale" else bool(given == own)


def _range(text: str) -> Any:
    """The two numbers of a range, so that 0:1 and 0.0:1.0 are equal."""
    try:
        return tuple(map(float, text.split(":")))
    except ValueError:
        return text


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
