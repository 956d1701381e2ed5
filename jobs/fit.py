"""Fit a classifier of your own classes to the embeddings of an output and some labels, and evaluate it.

    python jobs/fit.py embeddings/ --labels labels.csv --to head.safetensors
    python jobs/fit.py embeddings/ --labels folder --to head.safetensors --group-by scene

labels.csv has the columns image and label. An image is named by its image_id or by the end of it, such as the file's
name. Beside the head, the evaluation is written as head.json and head.html. `classify --head head.safetensors` applies
the head. Needs `pip install "nightshift[fit]"`.
"""

import argparse
from collections.abc import Sequence

from pipeline import cli
from pipeline.report import messages
from pipeline.report.messages import MessageFlags
from pipeline.training.job import FitConfig


def parser() -> cli.Parser:
    fit_parser = cli.parser_of(__doc__, (FitConfig, MessageFlags))
    fit_parser.add_argument("embeddings", metavar="EMBEDDINGS", help="output of a job that wrote embeddings")
    fit_parser.add_argument("--image-column", dest="name_column", help=argparse.SUPPRESS)  # its earlier name
    return fit_parser


def main(arguments: Sequence[str] | None = None) -> int:
    def work() -> int:
        given, fit_values, message_values = cli.parsed(parser(), (FitConfig, MessageFlags), arguments)
        cli.speak(MessageFlags(**message_values))
        config = FitConfig(**fit_values)
        from pipeline.training import page  # imports torch and scikit-learn, which takes seconds
        from pipeline.training.job import fit

        result = fit(given["embeddings"], config)
        for text in result.notes:
            cli.log(f"warning: {text}")
        page.show(result.evaluation, result.head.temperature)
        for file in result.files:
            messages.say(f"wrote {file}")
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    cli.leave(main())
