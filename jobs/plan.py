"""What will it take? Hours, dollars, the bottleneck and a better shape of cluster, before a job is run.

    python jobs/plan.py --input photos/ --model resnet50
    python jobs/plan.py --input 's3://bucket/tiles/*.tar' --model resnet50 --cluster 8xg6.2xlarge
    python jobs/plan.py --input 's3://bucket/tiles/*.tar' --cluster 4xg6.2xlarge+2xc7i.4xlarge --prices mine.yaml

Shards and bytes are counted, some images of a few shards are read and decoded here, and the network runs here for ten
seconds; the rate of a GPU that this machine lacks is looked up in a table. Nothing is written. Without --cluster
it is about this machine. Takes the flags of jobs/embed.py; actors are reckoned as a job chooses them by itself.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline import cli
from pipeline.config import RunConfig
from pipeline.predictors import Embedder


@dataclass
class Own:
    """The flags that no other job has."""

    json: bool = field(default=False, metadata={"help": "print every figure as JSON"})


def main(arguments: Sequence[str] | None = None) -> int:
    def work() -> int:
        run_values, network_values, own_values = cli.parse(Embedder, __doc__, arguments, Own)
        own = Own(**own_values)
        from pipeline.forecast import forecast  # Ray and torch, which --help need not wait for

        with tempfile.TemporaryDirectory(prefix="nightshift-") as unused:
            config = RunConfig(**{"output": unused, **run_values})
            found = forecast(config, Embedder(**network_values), cli.tell)
        if own.json:
            print(json.dumps(found.as_json(), indent=1))
        else:
            found.show()
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
