"""Estimate a run before it starts: hours, dollars, the bottleneck, and a better cluster.

    python jobs/estimate.py --input photos/ --model resnet50
    python jobs/estimate.py --input 's3://bucket/tiles/*.tar' --model resnet50 --cluster 8xg6.2xlarge
    python jobs/estimate.py --input 's3://bucket/tiles/*.tar' --cluster 4xg6.2xlarge+2xc7i.4xlarge --prices mine.yaml

Counts shards and bytes, reads and decodes some images of a few shards, and runs the network for ten seconds, all on
this machine. Takes the rate of a GPU that this machine lacks from the price file. Writes nothing. Without --cluster the
estimate is for this machine. The other flags of jobs/embed.py are accepted and change nothing, except for --actors and
--gpus-per-actor, which are refused: the estimate assumes that the job chooses its actors itself.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline import cli
from pipeline.config import RunConfig
from pipeline.predictors.embed import Embedder
from pipeline.report.messages import MessageFlags


@dataclass
class EstimateFlags:
    """The flags that only this job has."""

    json: bool = field(default=False, metadata={"help": "print all figures as JSON"})


HIDDEN = {
    "output", "rows_per_part", "actors", "gpus_per_actor", "max_error_rate", "overwrite", "update", "dry_run",
    "embedding_dtype",
}  # fmt: skip
"""Flags of jobs/embed.py that do not change an estimate. They are accepted, so that its command needs no edit."""


def parser() -> cli.Parser:
    return cli.parser_of(__doc__, (RunConfig, Embedder, EstimateFlags, MessageFlags), HIDDEN)


def main(arguments: Sequence[str] | None = None) -> int:
    def work() -> int:
        parsed = cli.parse(Embedder, __doc__, arguments, EstimateFlags, MessageFlags, hidden=HIDDEN)
        run_values, network_values, estimate_values, message_values = parsed
        cli.speak(MessageFlags(**message_values))
        flags = EstimateFlags(**estimate_values)
        predictor = Embedder(**network_values)
        predictor.check()
        from pipeline.estimates.forecast import estimate  # imports Ray and torch, which take seconds

        with tempfile.TemporaryDirectory(prefix="nightshift-") as unused_output:
            config = RunConfig(**{"output": unused_output, **run_values})
            forecast = estimate(config, predictor, cli.log)
        if flags.json:
            print(json.dumps(forecast.as_json(), indent=1))
        else:
            forecast.show()
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    cli.leave(main())
