"""How many of the nearest vectors are found if vectors are stored in fewer bytes: float16, int8, principal components.

    python jobs/bench/storage.py PHOTOS
    python jobs/bench/storage.py --rows 20000 --dim 512 --json figures.json

With PHOTOS, a folder of images, the vectors are those of an EfficientNet-Lite0 with trained weights; otherwise they are
drawn around 1,000 centres. Neighbours are compared with those of float32, by cosine.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from jobs.bench import fidelity
from jobs.bench.harness import command, lite0, machine, show, vector_output
from pipeline import open_output
from pipeline.errors import SettingRefused
from pipeline.explore import pca
from pipeline.explore.vectors import COLUMN, Vectors, as_vectors, scaled
from pipeline.inference.quantize import to_int8

COUNT, WIDER = 10, 100
MAX_QUERIES = 1000
COMPONENTS = (64, 128)


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("photos", metavar="PHOTOS", type=Path, nargs="?", help="a folder of images")
    flags.add_argument("--rows", metavar="N", type=int, default=20_000, help="drawn vectors (default: 20000)")
    flags.add_argument("--dim", metavar="N", type=int, default=512, help="their width (default: 512)")
    flags.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return command.guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    command.check_writable(options.json)
    vectors = of_photos(options.photos) if options.photos else drawn(options.rows, options.dim)
    if len(vectors) <= WIDER or vectors.shape[1] <= max(COMPONENTS):
        raise SettingRefused(f"there must be more than {WIDER} vectors of more than {max(COMPONENTS)} numbers")
    here, console = machine.describe(), show.console()
    figures = measured(vectors)
    console.print(show.machine_line(here))
    console.print(table(f"{len(vectors):,} vectors of {vectors.shape[1]:,}", figures))
    if options.json:
        options.json.write_text(json.dumps({"machine": here, "figures": figures}, indent=1))
    return 0


def of_photos(folder: Path) -> Vectors:
    """float32 [photos, 1280]."""
    return np.asarray(fidelity.embeddings(fidelity.photos(folder), lite0.MODEL, "DEFAULT", "float32").numpy())


def drawn(rows: int, dim: int) -> Vectors:
    """float32 [rows, dim]."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        vector_output.write(Path(folder), rows, dim)
        return np.concatenate([as_vectors(batch[COLUMN], dim) for batch in open_output(folder).batches([COLUMN])])


def encodings(vectors: Vectors) -> Mapping[str, tuple[int, Callable[[], Vectors]]]:
    """Name → bytes per vector, and the vectors as they are read again."""
    dim = vectors.shape[1]

    def int8() -> Vectors:
        numbers, scales = to_int8(torch.from_numpy(vectors))
        return np.asarray(numbers.float().numpy() * scales.numpy()[:, None], np.float32)

    def reduced(count: int) -> Callable[[], Vectors]:
        return lambda: pca.of_pieces([vectors], dim, count)[0].project(vectors)

    return {
        "float32": (4 * dim, lambda: vectors),
        "float16": (2 * dim, lambda: vectors.astype(np.float16).astype(np.float32)),
        "int8": (dim + 4, int8),
        **{f"pca:{count}": (4 * count, reduced(count)) for count in COMPONENTS},
    }


def measured(vectors: Vectors) -> list[dict[str, Any]]:
    """Bytes per vector and recall of each encoding."""
    queries = np.linspace(0, len(vectors) - 1, min(len(vectors), MAX_QUERIES)).astype(np.int64)
    truth = neighbours(vectors, queries, COUNT)
    figures = []
    for name, (size, encode) in encodings(vectors).items():
        found = neighbours(encode(), queries, WIDER)
        figures.append(
            {"name": name, "bytes": size, "recall": share(truth, found[:, :COUNT]), "recall_wider": share(truth, found)}
        )
    return figures


def neighbours(vectors: Vectors, queries: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Rows of the highest cosines to each query but itself, the best first: [queries, count]."""
    units = scaled(vectors)
    products = units[queries] @ units.T
    products[np.arange(len(queries)), queries] = -np.inf
    best = np.argpartition(-products, count, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(products, best, axis=1), axis=1)
    return np.asarray(np.take_along_axis(best, order, axis=1), np.int64)


def share(truth: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    """The share of the true neighbours that are found."""
    return float(np.mean([np.isin(row, others).mean() for row, others in zip(truth, found, strict=True)]))


def table(title: str, figures: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title=title, title_justify="left")
    shown.add_column("vectors")
    for header in ("bytes", f"recall@{COUNT}", f"{COUNT} in the best {WIDER}"):
        shown.add_column(header, justify="right")
    for each in figures:
        shown.add_row(each["name"], f"{each['bytes']:,}", f"{each['recall']:.3f}", f"{each['recall_wider']:.3f}")
    return shown


if __name__ == "__main__":
    sys.exit(main())
