"""Classify an image archive: label, score and top classes per image, as Parquet.

    python jobs/classify.py --input photos/ --output labels/ --model resnet50 --top-k 5
    python jobs/classify.py --input tiles.tar --output labels/ --weights model.pt --labels names.txt --embeddings
    python jobs/classify.py --input photos/ --output labels/ --head trees.safetensors --head roads.safetensors
    python jobs/classify.py --input photos/ --output labels/ --weights checkpoint.safetensors
    python jobs/classify.py --from embeddings/ --output labels/ --head head.safetensors

--head applies classes of your own, made by jobs/fit.py. It also sets the network, its weights, the transform, the
bands, the values and the windows. A checkpoint of jobs/finetune.py sets the network, its transform and the names of its
classes: --weights needs no other flag. --from reads the vectors of a finished output, and no images.

Run the same command again after any stop: it continues from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import cli
from pipeline.config import RunConfig, flag
from pipeline.errors import SettingRefused
from pipeline.predictors.base import Predictor
from pipeline.predictors.classify import Classifier
from pipeline.predictors.network import with_flags_of_weights
from pipeline.report import messages
from pipeline.report.messages import MessageFlags

OF_HEADS = ("head", "top_k")
OF_VECTORS = (
    *("output", "keep", "limit", "rows_per_part", "max_error_rate"),
    *("overwrite", "update", "cluster", "prices", "dry_run"),
)
"""The flags of a run that do not concern images."""


@dataclass
class VectorFlags:
    """The flag that only this job has."""

    from_: str | None = flag(
        "finished output of embed: read its vectors instead of images; needs --head", None, metavar="EMBEDDINGS"
    )


def parser() -> cli.Parser:
    return cli.parser_of(__doc__, (RunConfig, Classifier, MessageFlags, VectorFlags))


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.job(Classifier, __doc__, arguments, VectorFlags, make)


def make(run: dict[str, Any], network: dict[str, Any], more: dict[str, Any]) -> tuple[RunConfig, Predictor]:
    """The settings and the predictor of a run, from the given flags of RunConfig, Classifier and VectorFlags."""
    if source := more.get("from_"):
        return _on_vectors(source, run, network)
    run, network = with_flags_of_weights(run, network)
    if network.get("head"):
        run, network = _with_flags_of_head(run, network)
    return RunConfig(**run), Classifier(**network)


def _on_vectors(source: str, run: dict[str, Any], network: dict[str, Any]) -> tuple[RunConfig, Predictor]:
    from pipeline.explore.table import open_output
    from pipeline.explore.vectors import dim_of, space_of
    from pipeline.predictors.vectors import VectorClassifier

    if not network.get("head"):
        raise SettingRefused("--from needs --head, a file that `nightshift fit` made")
    if "input" in run:
        raise SettingRefused("--from reads the vectors of an output instead of --input: leave one of them out")
    others = [name for name in network if name not in OF_HEADS]
    others += [name for name in run if name not in OF_VECTORS]
    if others:
        raise SettingRefused(
            f"{cli.flag_name(others[0])} is for images and networks, but --from reads vectors: leave it out"
        )
    config = RunConfig(**{**run, "input": (source,), "gpus_per_actor": "0"}, vectors=True)
    output = open_output(source)
    dim = dim_of(output) if output.parts else None
    return config, VectorClassifier(space=space_of(output), dim=dim, source=source, **network)


def _with_flags_of_head(run: dict[str, Any], network: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add the flags that give the first head's vectors again, and say which."""
    from pipeline.models.head_flags import with_flags_of_head
    from pipeline.models.heads import load_heads

    head = load_heads(network["head"])[0]
    flags = with_flags_of_head(head, run, network)
    if flags.taken:
        messages.say(f"taken from --head {head.name}: {flags.taken}")
    return flags.run, flags.network


if __name__ == "__main__":
    cli.leave(main())
