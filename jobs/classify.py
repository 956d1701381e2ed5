"""Classify an image archive: label, score and top classes per image, as Parquet.

    python jobs/classify.py --input photos/ --output labels/ --model resnet50 --top-k 5
    python jobs/classify.py --input tiles.tar --output labels/ --weights model.pt --labels names.txt --embeddings

Run the same command again after any stop: it continues from there.
"""

from collections.abc import Sequence

from pipeline import cli
from pipeline.config import RunConfig
from pipeline.predictors.classify import Classifier
from pipeline.report.messages import MessageFlags


def parser() -> cli.Parser:
    return cli.parser_of(__doc__, (RunConfig, Classifier, MessageFlags))


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.job(Classifier, __doc__, arguments)


if __name__ == "__main__":
    cli.leave(main())
