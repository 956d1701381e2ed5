"""A network that does nothing, and a whole job with it: what that takes is what everything but the network takes.

python -m jobs.bench.null INPUT OUTPUT --resize 64 --crop 64 --batch-size 256
"""

import argparse
import sys
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline import Predictor, RunConfig, Transform, cli, run


class Null(Predictor):
    """Takes pixels as a network takes them, and returns each image's first byte."""

    columns = pa.schema([("first", pa.uint8())])
    max_concurrency: ClassVar[int] = 2  # as a network's

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def predict(self, pixels: np.ndarray) -> Mapping[str, np.ndarray]:
        return {"first": pixels[:, 0, 0, 0].copy()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("output", metavar="OUTPUT")
    parser.add_argument("--resize", metavar="PIXELS", type=int, default=Transform().resize)
    parser.add_argument("--crop", metavar="PIXELS", type=int, default=Transform().crop)
    parser.add_argument("--batch-size", metavar="N", type=int, help="default: the job's own")
    parser.add_argument("--rows-per-part", metavar="N", type=int, help="default: the job's own")
    given = parser.parse_args()
    sizes = {"batch_size": given.batch_size, "rows_per_part": given.rows_per_part}
    config = RunConfig(input=given.input, output=given.output, **sizes)

    def work() -> int:
        run(config, Null(Transform(resize=given.resize, crop=given.crop)))
        return 0

    return cli.guarded(work)


if __name__ == "__main__":
    sys.exit(main())
