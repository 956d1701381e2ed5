"""`nightshift compare`: accuracy, speed and cost of several networks on a labelled sample of one archive."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.config import RunConfig, flag
from pipeline.errors import InputRefused, NightshiftError, SettingRefused, message_line
from pipeline.predictors.embed import Embedder
from pipeline.storage import access, uris
from pipeline.training import labels as label_files

SUFFIX = ".json"
COST_CLUSTER = "1xg6.2xlarge"
"""The machine of the cost per million images, without --cluster."""
SAMPLE_IMAGES = 2000
RANDOM = "random"

Say = Callable[[str], None]


@dataclass(frozen=True)
class CompareConfig:
    """Settings of a comparison. Every field is a command-line flag. Raises SettingRefused if a value is not valid."""

    labels: str = flag(
        "CSV, JSON or Parquet file of images and classes; folder: the images' folders", "", metavar="FILE"
    )
    models: Sequence[str] = flag("networks, as in --model; NAME=WEIGHTS gives one its own weights", (), metavar="NAME")
    to: str = flag("write the figures as JSON, and the picture beside it", "", metavar="FILE.json")
    name_column: str = flag("column of the labels with the images' names", "image", metavar="COL")
    label_column: str = flag("column of the labels with the classes", "label", metavar="COL")
    group_by: str | None = flag(
        "column of --keep; images with one value are never on both sides of a split", None, metavar="COL"
    )

    def __post_init__(self) -> None:
        if not self.labels:
            raise SettingRefused("--labels is missing: name a file of images and classes, or folder")
        if self.labels.startswith(label_files.COLUMN):
            raise SettingRefused(f"--labels is {self.labels}: compare takes a file or folder")
        if not self.models:
            raise SettingRefused("--models is missing: name the networks, as in --models resnet18 resnet50")
        if twice := next((name for name in self.models if list(self.models).count(name) > 1), None):
            raise SettingRefused(f"--models has {twice} twice: name each network once")
        if self.to and not self.to.endswith(SUFFIX):
            raise SettingRefused(f"--to is {uris.redact(self.to)!r}: it must end in {SUFFIX}")
        if self.to and (problem := uris.check_output(self.to)):
            raise SettingRefused(f"--to {uris.redact(self.to)} {problem}")


@dataclass(frozen=True)
class NetworkResult:
    """The figures of one network. A network that could not be used has only a `fault`, its reason.

    accuracy: of a linear probe, on images left out, mean over the folds; spread: standard deviation over the folds.
    images_per_second: of a whole run on this machine, estimated. usd_per_million: on the cluster of the comparison;
    None if the price or the speed there is unknown.
    """

    model: str
    weights: str
    fault: str = ""
    embedding_dim: int = 0
    accuracy: float = 0.0
    spread: float = 0.0
    fold_accuracies: tuple[float, ...] = ()
    balanced_accuracy: float = 0.0
    images_per_second: float = 0.0
    usd_per_million: float | None = None
    gpu_source: str = ""

    @property
    def is_random(self) -> bool:
        return self.weights == RANDOM


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison. networks: the most accurate first, then those with a fault.

    images: labelled images that all networks embedded. failed: images that could not be read. classes: number of
    labels by class. baseline: accuracy of the most frequent class. cluster: of the cost.
    """

    networks: tuple[NetworkResult, ...]
    images: int
    failed: int
    classes: Mapping[str, int]
    folds: int
    baseline: float
    cluster: str
    files: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        del record["files"]
        return record


def compare(run: RunConfig, network: Mapping[str, Any], config: CompareConfig, say: Say) -> Comparison:
    """Compare networks on the labelled images of `run.input`. Each is embedded in this process, without Ray.

    network: flags of Embedder for all networks, without `model`. The splits are the same for all networks. A network
    that cannot be loaded is a result with its reason. Raises SettingRefused for an unknown name, and InputRefused if
    the labels do not fit the images or no network could be loaded.
    """
    embedders = _embedders(config, network)
    if config.labels != label_files.FOLDER:
        label_files.read_file(config.labels, config.name_column, config.label_column)
    run = run if run.limit is not None else replace(run, limit=SAMPLE_IMAGES)
    from pipeline.comparison import chart, measure, probe  # import torch, scikit-learn and matplotlib

    embedded: dict[str, measure.Embedded] = {}
    results: dict[str, NetworkResult] = {}
    cost_cluster = run.cluster or COST_CLUSTER
    for name, embedder in embedders.items():
        say(f"{name}: embedding the sample")
        try:
            embedder.check()
            embedder.prepare()
            embedded[name] = measure.embed(run, embedder)
            results[name] = measure.speed(run, embedder, cost_cluster, name)
        except InputRefused:
            raise
        except NightshiftError as error:
            embedded.pop(name, None)
            results[name] = NetworkResult(name, embedder.weights, message_line(error))
            say(f"{name}: {message_line(error)}")
    if not embedded:
        reasons = "; ".join(dict.fromkeys(each.fault for each in results.values()))
        raise InputRefused(f"no network could be loaded: {reasons}")
    say("fitting a probe to the vectors of each network")
    samples = probe.samples_of(embedded, config)
    for name, each in samples.items():
        results[name] = replace(results[name], **probe.figures(each, embedders[name].seed))
    first = next(iter(samples.values()))
    ordered = sorted(results.values(), key=lambda each: (bool(each.fault), -each.accuracy))
    comparison = Comparison(
        networks=tuple(ordered),
        images=len(first),
        failed=max(each.failed for each in embedded.values()),
        classes=dict(zip(first.names, first.counts.tolist(), strict=True)),
        folds=len(next(each.fold_accuracies for each in ordered if not each.fault)),
        baseline=float(first.counts.max() / len(first)),
        cluster=cost_cluster,
    )
    return replace(comparison, files=_write(comparison, config.to, chart.png)) if config.to else comparison


def _embedders(config: CompareConfig, network: Mapping[str, Any]) -> dict[str, Embedder]:
    """The networks by name. Raises SettingRefused for unknown names."""
    embedders = {}
    for each in config.models:
        name, _, weights = each.partition("=")
        own = {"weights": weights} if weights else {}
        embedders[each if name in embedders else name] = Embedder(**{**network, "model": name, **own})
    return embedders


def _write(comparison: Comparison, to: str, png: Callable[[Comparison], bytes]) -> tuple[str, ...]:
    base = uris.normalize(to).removesuffix(SUFFIX)
    access.write(f"{base}.png", png(comparison))
    access.write(f"{base}.json", json.dumps(comparison.to_json(), indent=1).encode())
    shown = uris.redact(to).removesuffix(SUFFIX)
    return f"{shown}.json", f"{shown}.png"
