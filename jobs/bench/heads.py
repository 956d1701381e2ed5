"""Speed of a head on the vectors of an output: `classify --from`, as a whole command.

    python jobs/bench/heads.py
    python jobs/bench/heads.py --small 200000 --large 1000000 --dim 2048

Writes two outputs of random vectors into a temporary folder (dim × 4 bytes per vector) and runs the command on each.
The rate is marginal: more vectors / more seconds, as in a long run, without Ray's start. The CPU time is that of all
processes; the rate that it allows is that of cores with nothing else to do.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from jobs.bench.harness import vector_output
from jobs.bench.harness.measure import Spent, spend
from pipeline import cli

CLASSIFY = Path(__file__).resolve().parents[1] / "classify.py"


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--small", metavar="N", type=int, default=100_000, help="vectors; default: 100000")
    flags.add_argument("--large", metavar="N", type=int, default=500_000, help="vectors; default: 500000")
    flags.add_argument(
        "--dim", metavar="N", type=int, default=512, help="width of a vector; default: 512, of ResNet-18"
    )
    flags.add_argument("--classes", metavar="N", type=int, default=10, help="default: 10")
    flags.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="default: float32")
    return flags


def measure(folder: Path, vectors: int, options: argparse.Namespace) -> Spent:
    """Run the command on so many vectors. Raises CommandFailed."""
    embeddings, head = folder / f"embeddings-{vectors}", folder / "head.safetensors"
    vector_output.write(embeddings, vectors, options.dim, getattr(pa, options.dtype)())
    vector_output.write_head(head, options.dim, options.classes)
    command = [sys.executable, CLASSIFY, "--from", embeddings, "--head", head, "--output", folder / f"out-{vectors}"]
    return spend([*map(str, command), "--quiet"], {**os.environ, "RAY_ADDRESS": "local"})


def report(options: argparse.Namespace, show: Callable[[str], object] = print) -> int:
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        small, large = (measure(Path(folder), vectors, options) for vectors in (options.small, options.large))
    more = options.large - options.small
    seconds, core_seconds = large.seconds - small.seconds, large.core_seconds - small.core_seconds
    cores = os.cpu_count() or 1
    show(
        f"{options.small:>12,} vectors of {options.dim}: {small.seconds:7.1f} s, {small.core_seconds:7.1f} core-seconds"
    )
    show(
        f"{options.large:>12,} vectors of {options.dim}: {large.seconds:7.1f} s, {large.core_seconds:7.1f} core-seconds"
    )
    show(f"marginal rate: {more / seconds:,.0f} vectors/s")
    show(
        f"marginal CPU time: {1e6 * core_seconds / more:.1f} core-µs per vector, "
        f"which allows {cores * more / core_seconds:,.0f} vectors/s on {cores} cores"
    )
    show(f"peak memory of all processes: {large.peak_memory_bytes / 2**20:,.0f} MiB")
    return 0


def main() -> int:
    options = parser().parse_args()
    return cli.guarded(lambda: report(options))


if __name__ == "__main__":
    sys.exit(main())
