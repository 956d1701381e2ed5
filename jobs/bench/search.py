"""Search, duplicates and analysis of drawn vectors, beside FAISS on the same files: seconds and memory.

    python jobs/bench/search.py
    python jobs/bench/search.py --rows 10000 100000 1000000 --dim 512 --json figures.json

Each figure is a whole command, with its start and with reading the files. 2 % of the vectors are noisy copies; the
recall of `duplicates` is the share of them that it finds. The vectors are drawn around 1,000 centres.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.table import Table

from jobs.bench.harness import command, machine, show, vector_output
from jobs.bench.harness.contest import BENCH, JOBS
from jobs.bench.harness.measure import Spent, spend
from pipeline.errors import SettingRefused
from pipeline.explore.choices import need_search

QUERIES = 5
PLAIN, KMEANS = "FAISS flat", "FAISS k-means"


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--rows", metavar="N", type=int, nargs="+", default=[10_000, 100_000], help="default: 10000 100000"
    )
    flags.add_argument("--dim", metavar="N", type=int, default=512, help="width of the vectors (default: 512)")
    flags.add_argument("--only", metavar="NAME", action="append", help="only these commands; may be repeated")
    flags.add_argument("--folder", metavar="FOLDER", type=Path, help="keep the drawn outputs here, and use them again")
    flags.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return command.guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    if min(options.rows) < 1000:
        raise SettingRefused(f"--rows is {min(options.rows)}: it must be at least 1000")
    need_search("this benchmark", "faiss", "scipy")
    command.check_writable(options.json)
    here, console = machine.describe(), show.console()
    console.print(show.machine_line(here))
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="nightshift-") as temporary:
        for rows in options.rows:
            figures += measured(options.folder or Path(temporary), rows, options.dim, options.only)
            console.print(table(f"{rows:,} vectors of {options.dim}", [f for f in figures if f["rows"] == rows]))
    if options.json:
        options.json.write_text(json.dumps({"machine": here, "figures": figures}, indent=1))
    return 0


def measured(folder: Path, rows: int, dim: int, only: Sequence[str] | None) -> list[dict[str, Any]]:
    """The figures of each command on one output. Raises CommandFailed."""
    output, queries = folder / f"output-{rows}-{dim}", folder / f"queries-{rows}-{dim}.npy"
    if not (output / "_SUCCESS").exists():
        command.say(f"drawing {rows:,} vectors")
        copies = vector_output.write(output, rows, dim)
        (folder / f"copies-{rows}-{dim}.json").write_text(json.dumps(copies))
        np.save(queries, np.random.default_rng(1).standard_normal((QUERIES, dim), np.float32))
    copies = [tuple(pair) for pair in json.loads((folder / f"copies-{rows}-{dim}.json").read_text())]
    found = folder / f"duplicates-{rows}-{dim}.parquet"
    analysis = folder / f"analysis-{rows}-{dim}"
    search = [str(JOBS / "search.py"), str(output), "--vector", str(queries), "--json"]
    duplicates = [str(JOBS / "duplicates.py"), str(output), "--to", str(found), "--overwrite"]
    commands = {
        "search": search,
        PLAIN: [str(BENCH / "peers/faiss_flat.py"), str(output), str(queries)],
        "index": [str(JOBS / "index.py"), str(output), "--overwrite"],
        "search --index": [*search, "--index"],
        "duplicates": duplicates,
        "analyze": [str(JOBS / "analyze.py"), str(output), "--to", str(analysis), "--overwrite"],
        KMEANS: [str(BENCH / "peers/faiss_kmeans.py"), str(output)],
    }
    figures = []
    for name, line in commands.items():
        if only and name not in only:
            continue
        command.say(f"{rows:,} vectors: {name}")
        more = {} if name != "duplicates" else {"recall": None}
        figures.append({"rows": rows, "dim": dim, "name": name, **_figures(spend([sys.executable, *line])), **more})
        if name == "duplicates":
            figures[-1]["recall"] = recall(found, copies)
    return figures


def _figures(spent: Spent) -> dict[str, float]:
    return {"seconds": spent.seconds, "core_seconds": spent.core_seconds, "peak_bytes": spent.peak_memory_bytes}


def recall(found: Path, copies: Sequence[tuple[int, ...]]) -> float:
    """The share of the copies whose original is in the same group."""
    table = pq.read_table(found)
    rows = [int(name[-13:-4]) for name in table["image_id"].to_pylist()]
    group = dict(zip(rows, table["group"].to_pylist(), strict=True))
    return float(np.mean([a in group and group.get(a) == group.get(b) for a, b in copies]))


def table(title: str, figures: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title=title, title_justify="left")
    shown.add_column("command")
    for header in ("seconds", "core-seconds", "peak MiB", "recall of copies"):
        shown.add_column(header, justify="right")
    for each in figures:
        share = each.get("recall")
        shown.add_row(
            each["name"],
            f"{each['seconds']:.1f}",
            f"{each['core_seconds']:.1f}",
            f"{each['peak_bytes'] / 2**20:,.0f}",
            "" if share is None else f"{share:.4f}",
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
