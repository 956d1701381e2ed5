"""The flags of `classify` that a head stands for: those that give its vectors again, from another archive too."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pipeline.config import RunConfig
from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import SettingRefused, WeightsRefused
from pipeline.models import input_spec
from pipeline.models.heads import NamedHead

Flags = dict[str, Any]
"""Fields of RunConfig or of a predictor, by name."""

DEFAULTS = {each.name: each.default for each in fields(RunConfig)}
OF_RUN = ("exif_rotate", "decoder", "tiling", "bands", "assets", "scale", "nodata_fill", "harmonize")
"""What RunConfig says in the description of an embedding space; the rest is of the network."""
SAME_NAME = ("exif_rotate", "decoder", "nodata_fill", "harmonize")
OF_TILING = {"size": "tile_size", "resolution": "resolution", "resampling": "resampling"}
WINDOWS = {"stride": "tile_stride", "edge": "edge", "max_nodata": "max_nodata"}
"""Settings that choose windows. A command may have others than the head: their vectors fit it too."""
OF_NETWORK = ("model", "weights", "seed", "input_spec", *WINDOWS.values())
"""The flags that a head may set by name. A file from elsewhere cannot set others, such as --overwrite."""
OF_TRANSFORM = ("resize", "crop", "interpolation", "mean", "std")


@dataclass(frozen=True)
class WithHead:
    """The flags of a command together with those of its head. taken: the latter as text, without defaults."""

    run: Flags
    network: Flags
    taken: str


def with_flags_of_head(named: NamedHead, run: Flags, network: Flags) -> WithHead:
    """Add the flags that give a head's vectors again to the flags of a command: of RunConfig, and of the predictor.

    Raises WeightsRefused if a flag of the command contradicts the head's embedding space. Weights, mean and std are
    compared later, when the network is known.
    """
    flags = flags_of(named, network.get("input_spec"))
    of_run = {name: value for name, value in flags.items() if name in DEFAULTS and name not in run}
    of_network = {name: value for name, value in flags.items() if name not in DEFAULTS and name not in network}
    refuse_difference(named, _space_of_command(named, {**of_run, **run}, network), "this command")
    shown = {name: value for name, value in of_run.items() if value != DEFAULTS[name]} | of_network
    taken = " ".join(f"--{name.replace('_', '-')} {_text(value)}" for name, value in shown.items())
    return WithHead({**of_run, **run}, {**of_network, **network}, taken)


def refuse_difference(named: NamedHead, space: EmbeddingSpace | None, given: str) -> None:
    """Raise WeightsRefused if a head was fitted on vectors of another space. given: what has that space."""
    if space is None or named.head.space.id != space.id:
        reason = "they are of no network" if space is None else space.difference(named.head.space)
        raise WeightsRefused(
            f"--head {named.name} was fitted on other vectors than those of {given}: {reason}; fit a head to "
            "embeddings of this run's settings, or leave out the flags that differ"
        )


def flags_of(named: NamedHead, specification: str | None = None) -> Flags:
    """All flags that give a head's vectors again, and its windows.

    specification: the --input-spec of a command, used instead of the head's. Raises SettingRefused if none can be read.
    """
    space = named.head.space.description
    flags: Flags = {name: space[name] for name in SAME_NAME if name in space}
    flags |= {name: ",".join(space[name]) for name in ("bands", "assets") if name in space}
    if "scale" in space:
        flags["scale"] = ":".join(map(repr, space["scale"]))
    tiling = space.get("tiling") or {}
    flags |= {flag: tiling[name] for name, flag in OF_TILING.items() if tiling.get(name) is not None}
    flags |= {name: value for name, value in named.head.network.items() if name in OF_NETWORK}
    return {**flags, "precision": space["precision"], **_transform(named, specification)}


def windows_of(settings: Mapping[str, Any]) -> Flags:
    """The flags that choose the windows of a run, without defaults; none if it did not read scenes."""
    tiling = settings.get("tiling") or {}
    defaults = {**DEFAULTS, "tile_stride": tiling.get("size")}
    return {flag: tiling[name] for name, flag in WINDOWS.items() if tiling.get(name, defaults[flag]) != defaults[flag]}


def _transform(named: NamedHead, specification: str | None) -> Flags:
    """The flags of a transform: with an input specification only those that differ from it.

    A `resize` of 0 has no flag: it can only be the network's own.
    """
    transform = named.head.space.description["transform"]
    flags = {name: transform[name] for name in OF_TRANSFORM if transform[name]}
    given = specification or named.head.network.get("input_spec")
    if given is None:
        return flags
    try:
        own = input_spec.load(given).transform
    except SettingRefused as error:
        remedy = "" if specification else f"; --head {named.name} names it: give its present place with --input-spec"
        raise SettingRefused(f"{error}{remedy}") from error
    return {name: value for name, value in flags.items() if name not in ("mean", "std") and value != getattr(own, name)}


def _space_of_command(named: NamedHead, run: Flags, network: Flags) -> EmbeddingSpace:
    """The head's space with everything that the flags of a command are known to say."""
    config = RunConfig(**run)
    description = named.head.space.description
    of_run = EmbeddingSpace.of({**description, **dict.fromkeys(OF_RUN), **config.result_settings()})
    assert of_run is not None
    changed = {name: value for name, value in of_run.description.items() if name not in OF_RUN or value is not None}
    if config.scale_percentiles() and config.scale_range() is None:
        changed["scale"] = config.scale  # not measured yet
    changed |= {name: network[name] for name in ("model", "precision") if name in network}
    of_transform = {name: network[name] for name in ("resize", "crop", "interpolation") if name in network}
    return EmbeddingSpace({**changed, "transform": {**description["transform"], **of_transform}})


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
