"""Embed an image archive: one vector per image, as Parquet.

    python jobs/embed.py --input photos/ --output embeddings/ --model resnet50
    python jobs/embed.py --input 's3://bucket/tiles/{0000..0099}.tar' --output s3://bucket/embeddings

Run the same command again after any stop: it continues from there.
"""

from collections.abc import Sequence
from typing import Any

from pipeline import cli
from pipeline.config import RunConfig
from pipeline.predictors.base import Predictor
from pipeline.predictors.embed import Embedder
from pipeline.predictors.network import with_flags_of_weights
from pipeline.report.messages import MessageFlags


def parser() -> cli.Parser:
    return cli.parser_of(__doc__, (RunConfig, Embedder, MessageFlags))


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.job(Embedder, __doc__, arguments, make=make)


def make(run: dict[str, Any], network: dict[str, Any], _: dict[str, Any]) -> tuple[RunConfig, Predictor]:
    """The settings and the predictor of a run. A checkpoint of jobs/finetune.py names its network itself."""
    run, network = with_flags_of_weights(run, network)
    return RunConfig(**run), Embedder(**network)


if __name__ == "__main__":
    cli.leave(main())
