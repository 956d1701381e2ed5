"""`nightshift duplicates`: groups of images that are nearly the same, and which one of each to keep."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import InputRefused, SettingRefused
from pipeline.explore.pairs import (
    Pairs,
    RunAll,
    here,
    pairs_by_partitions,
    pairs_within,
    read_all,
    remove,
    sample_vectors,
)
from pipeline.explore.search import Best
from pipeline.explore.table import Output
from pipeline.explore.vectors import COLUMN, Vectors, dim_of, space_of, view_vectors
from pipeline.storage import uris

MAX_ALL_PAIRS = 100_000
FALSE_RATE = 0.001
"""Other images that an image may be joined with by chance, on average."""
SAMPLE = 1000
NEAR, FAR = 8, 16
"""Ranks of the neighbours that the threshold is computed from. Nearer ones may be copies. Farther ones are those of the
image's class, which are spread over more dimensions than its surroundings."""
MIN_ROWS = 128
TRIM = 0.005
WORK = "_duplicates"
KEEPS = ("first", "largest")
COLUMN_PREFIX = "column:"
SCHEMA = pa.schema(
    [("group", pa.int64()), ("image_id", pa.string()), ("keep", pa.bool_()), ("similarity", pa.float32())]
)


@dataclass(frozen=True)
class Threshold:
    """The least cosine of duplicates. false_rate, dimension: how it was computed; None if it was given."""

    value: float
    false_rate: float | None = None
    dimension: float | None = None

    def describe(self) -> str:
        """One line: the value, and where it comes from."""
        if self.false_rate is None:
            return f"threshold {self.value:.4f}, as given"
        return (
            f"threshold {self.value:.4f}, from the distances of the {NEAR}th to {FAR}th neighbours (dimension "
            f"{self.dimension:.1f}): about {self.false_rate:g} images per image are that similar by chance"
        )


@dataclass(frozen=True)
class Duplicates:
    """The groups of duplicates of an output.

    table: group, image_id, keep, similarity to the image of the group that is kept. Sorted by group, the kept image
    first. rows: of the output. how: how the pairs were found.
    """

    table: pa.Table
    threshold: Threshold
    rows: int
    how: str

    @cached_property
    def groups(self) -> int:
        """Number of groups."""
        return int(np.sum(self.table["keep"].to_numpy()))

    def describe(self) -> str:
        """Two lines: the groups, and the threshold."""
        dropped = len(self.table) - self.groups
        return (
            f"{self.groups:,} groups with {len(self.table):,} of {self.rows:,} images; {dropped:,} need not be kept\n"
            f"{self.threshold.describe()}; {self.how}"
        )


def duplicates(
    output: Output,
    *,
    threshold: float | None = None,
    keep: str = "first",
    false_rate: float = FALSE_RATE,
    max_all_pairs: int = MAX_ALL_PAIRS,
    run_all: RunAll = here,
    on_cell: Callable[[int, int], object] = lambda done, cells: None,
) -> Duplicates:
    """Find groups of near-duplicates.

    threshold: least cosine; None to compute it from the output for a `false_rate`. keep: the image of a group to keep:
    `first`, `largest` (pixels), or `column:NAME` (its highest value). Each other image of the group is at least as
    similar to the kept one as the threshold. max_all_pairs: rows up to which all pairs are compared; beyond, those in
    overlapping k-means partitions, whose files are in OUTPUT/_duplicates/ until the end.
    run_all, on_cell: see `pairs_by_partitions`. Raises SettingRefused, InputRefused and OutputRefused.
    """
    _check(output, threshold, keep, false_rate)
    if output.rows <= max_all_pairs:
        vectors, positions = read_all(output)
        chosen = _given(threshold) or _threshold(output, vectors, false_rate)
        pairs = Pairs.joined(pairs_within(vectors, positions, chosen.value))
        how = "all pairs were compared"
    else:
        folder = uris.join(output.uri, WORK)
        chosen = _given(threshold) or _threshold(output, None, false_rate)
        pairs, partitions = pairs_by_partitions(
            output, chosen.value, folder, _key(output, chosen.value), run_all, on_cell
        )
        how = (
            f"compared in {partitions.cells:,} overlapping partitions; {partitions.truncated:.1%} of the images are "
            "near the borders of more partitions than they were compared in"
        )
        remove(folder)
    return Duplicates(_table(output, pairs, keep, chosen), chosen, output.rows, how)


def _check(output: Output, threshold: float | None, keep: str, false_rate: float) -> None:
    dim_of(output)
    if str(output.settings.get("weights", "")).startswith("random"):
        raise InputRefused(
            f"{output.uri} has vectors of random weights, which are alike for images that are not: embed the images "
            "with trained weights"
        )
    space_of(output)
    if threshold is not None and not 0 < threshold <= 1:
        raise SettingRefused(f"--threshold is {threshold:g}: it must be a cosine greater than 0 and at most 1")
    if not 0 < false_rate < 1:
        raise SettingRefused(f"--false-rate is {false_rate:g}: it must be greater than 0 and less than 1")
    if keep not in KEEPS and not keep.startswith(COLUMN_PREFIX):
        raise SettingRefused(f"--keep is {keep!r}: it must be first, largest or column:NAME")
    if keep.startswith(COLUMN_PREFIX):
        output.require([keep.removeprefix(COLUMN_PREFIX)])
    if threshold is None and output.rows < MIN_ROWS:
        raise InputRefused(
            f"{output.uri} has {output.rows} rows: a threshold can be computed from {MIN_ROWS} or more; give "
            "--threshold"
        )


def _given(threshold: float | None) -> Threshold | None:
    return None if threshold is None else Threshold(threshold)


def _key(output: Output, threshold: float) -> str:
    """Of everything that the pairs depend on."""
    parts = [(part.path, part.rows) for part in output.parts]
    return hashlib.sha256(json.dumps([threshold, space_of(output).id, parts]).encode()).hexdigest()


def _threshold(output: Output, vectors: Vectors | None, false_rate: float) -> Threshold:
    """The cosine that about `false_rate` images per image reach by chance.

    Around an image, the number of others within a distance r grows like r ** d. The dimension d and the density are
    those of its NEAR-th to FAR-th neighbours: near enough to be like its surroundings, and too many to be copies.
    """
    from scipy.special import digamma

    queries = sample_vectors(output, SAMPLE) if vectors is None else vectors[:: max(1, len(vectors) // SAMPLE)]
    best = Best(len(queries), FAR + 1)  # with the image itself
    if vectors is not None:
        best.add(queries, vectors, np.arange(len(vectors)))
    else:
        dim = dim_of(output)
        for block in output.blocks([COLUMN]):
            best.add(queries, view_vectors(block.table[COLUMN], dim), block.positions)
    near, far = (np.sqrt(np.maximum(2 - 2 * best.similarities[:, rank].astype(float), 0)) for rank in (NEAR, FAR))
    near = np.maximum(near, max(np.quantile(near, TRIM), 1e-6))  # of images with more than NEAR copies
    spread = np.log(np.maximum(far, near * (1 + 1e-6)) / near).mean()
    dimension = float((digamma(FAR) - digamma(NEAR)) / spread)
    scale = np.exp(np.mean(np.log(near)))
    expected = NEAR * np.mean((near / scale) ** -dimension)
    distance = scale * (false_rate / expected) ** (1 / dimension)
    return Threshold(float(np.clip(1 - distance**2 / 2, 0.0, 1 - 1e-6)), false_rate, dimension)


def _table(output: Output, pairs: Pairs, keep: str, threshold: Threshold) -> pa.Table:
    keeper, similarity = _groups(pairs, _order(output, pairs, keep))
    rows = np.array(sorted(keeper, key=lambda row: (keeper[row], row != keeper[row], row)), np.int64)
    of_group = np.array([keeper[row] for row in rows], np.int64)
    columns = {
        "group": np.unique(of_group, return_inverse=True)[1].astype(np.int64),
        "image_id": output.take(rows, ["image_id"])["image_id"],
        "keep": rows == of_group,
        "similarity": np.array([similarity[row] for row in rows], np.float32),
    }
    record = {
        "output": output.uri,
        "rows": output.rows,
        "embedding_space": space_of(output).id,
        "threshold": threshold.value,
        "false_rate": threshold.false_rate,
        "keep": keep,
    }
    return pa.table(columns, schema=SCHEMA.with_metadata({"nightshift": json.dumps(record)}))


def _order(output: Output, pairs: Pairs, keep: str) -> NDArray[np.int64]:
    """The rows that are in a pair, those that are rather kept first."""
    rows = np.unique(np.concatenate([pairs.first, pairs.second]))
    if keep == KEEPS[0]:
        return rows
    if keep == KEEPS[1]:
        sides = output.take(rows, ["width", "height"])
        values = sides["width"].to_numpy().astype(np.int64) * sides["height"].to_numpy()
        return np.asarray(rows[np.lexsort((rows, -values))], np.int64)
    name = keep.removeprefix(COLUMN_PREFIX)
    table = output.take(rows, [name]).append_column("place", pa.array(np.arange(len(rows))))
    order = table.sort_by([(name, "descending"), ("place", "ascending")])["place"].to_numpy()
    return np.asarray(rows[order], np.int64)


def _groups(pairs: Pairs, order: NDArray[np.int64]) -> tuple[Mapping[int, int], Mapping[int, float]]:
    """Row → the row that is kept of its group, and → its similarity to that one.

    In the order of preference, each row that is free keeps itself and takes its free neighbours. So no chain of
    neighbours joins images that differ.
    """
    first = np.concatenate([pairs.first, pairs.second])
    second = np.concatenate([pairs.second, pairs.first])
    values = np.concatenate([pairs.similarity, pairs.similarity])
    by_first = np.argsort(first, kind="stable")
    first, second, values = first[by_first], second[by_first], values[by_first]
    keeper: dict[int, int] = {}
    similarity: dict[int, float] = {}
    for row in order.tolist():
        if row in keeper:
            continue
        start, stop = np.searchsorted(first, [row, row + 1])
        members = [
            (other, value)
            for other, value in zip(second[start:stop].tolist(), values[start:stop].tolist(), strict=True)
            if other not in keeper
        ]
        if members:
            keeper[row], similarity[row] = row, 1.0
            keeper |= dict.fromkeys((other for other, _ in members), row)
            similarity |= dict(members)
    return keeper, similarity
