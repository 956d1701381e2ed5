"""Choose a network: compare several on a labelled sample of an archive, by accuracy, speed and cost.

    python jobs/compare.py --input photos/ --labels labels.csv --models resnet18 resnet50 densenet121 vgg16
    python jobs/compare.py --input tiles.tar --labels labels.csv --models resnet50 timm:resnetv2_50 --to networks.json
    python jobs/compare.py --input photos/ --labels folder --models resnet18 resnet18=mine.pth --limit 500

Each network embeds the sample, at most 2,000 images without --limit. A linear probe is fitted to its vectors, on the
same splits for all networks. The speed is that of a run on this machine and the cost that of --cluster, as
jobs/estimate.py estimates them. A network whose weights are out of reach is left out, with the reason. Needs
`pip install "nightshift[fit]"`.
"""

from collections.abc import Sequence

from pipeline import cli
from pipeline.comparison.job import CompareConfig, compare
from pipeline.config import RunConfig
from pipeline.predictors.embed import Embedder
from pipeline.report import messages
from pipeline.report.messages import MessageFlags

CLASSES = (CompareConfig, RunConfig, Embedder, MessageFlags)
OF_OTHER_JOBS = {
    *("output", "rows_per_part", "actors", "gpus_per_actor", "max_error_rate", "overwrite", "update", "dry_run"),
    *("model", "compile", "embedding_dtype"),
}
"""The flags of embed that do not concern a comparison. They are refused."""


def parser() -> cli.Parser:
    return cli.parser_of(__doc__, CLASSES, OF_OTHER_JOBS)


def main(arguments: Sequence[str] | None = None) -> int:
    def work() -> int:
        values = cli.parsed_by_job("compare", parser(), CLASSES, OF_OTHER_JOBS, arguments)
        config_values, run_values, network_values, message_values = values
        cli.speak(MessageFlags(**message_values))
        config = CompareConfig(**config_values)
        run = RunConfig(**{"output": "unused", **run_values})
        result = compare(run, network_values, config, messages.say)
        from pipeline.comparison import chart

        chart.show(result)
        for file in result.files:
            messages.say(f"wrote {file}")
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    cli.leave(main())
