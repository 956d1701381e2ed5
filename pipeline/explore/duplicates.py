"""`nightshift duplicates`: groups of images that are nearly the same, by their vectors."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.errors import InputRefused, SettingRefused
from pipeline.explore import groups, known_pairs
from pipeline.explore.groups import Duplicates, check_keep
from pipeline.explore.known_pairs import KnownPairs
from pipeline.explore.pairs import Pairs, RunAll, here, pairs_of_new, sample_vectors
from pipeline.explore.partitions import pairs_by_partitions, remove, unfinished
from pipeline.explore.search import Best
from pipeline.explore.table import OnStep, Output, no_step
from pipeline.explore.vectors import COLUMN, dim_of, space_of, view_vectors
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
MAX_GROWTH = 2.0
"""A threshold is computed again if the output has grown more than this."""
WORK = f"{known_pairs.FOLDER}/work"


@dataclass(frozen=True)
class Threshold:
    """The least cosine of duplicates.

    false_rate, dimension, rows: how it was computed, and from how many rows; none of them if it was given.
    """

    value: float
    false_rate: float | None = None
    dimension: float | None = None
    rows: int = 0

    @property
    def is_estimate(self) -> bool:
        return self.false_rate is not None

    def describe(self) -> str:
        """One line: the value, and where it comes from."""
        if self.false_rate is None:
            return f"threshold {self.value:.4f}, as given"
        return (
            f"threshold {self.value:.4f}, from the distances of the {NEAR}th to {FAR}th neighbours (dimension "
            f"{self.dimension:.1f}): about {self.false_rate:g} images per image are that similar by chance"
        )

    def to_json(self) -> dict[str, Any]:
        return {"threshold": self.value, "false_rate": self.false_rate}


def duplicates(
    output: Output,
    *,
    threshold: float | None = None,
    keep: str = "first",
    false_rate: float = FALSE_RATE,
    anew: bool = False,
    max_all_pairs: int = MAX_ALL_PAIRS,
    run_all: RunAll = here,
    on_step: OnStep = no_step,
) -> Duplicates:
    """Find groups of near-duplicates.

    threshold: least cosine; None to compute it from the output for a `false_rate`. keep: the image of a group to keep:
    `first`, `largest` (pixels), or `column:NAME` (its highest value). Each other image of the group is at least as
    similar to the kept one as the threshold.

    The pairs are kept in OUTPUT/_duplicates/, and the next call compares only images of new parts: with each other and
    with all others. It uses the same threshold unless one is given or the output has doubled. anew: compare all.
    max_all_pairs: rows up to which all pairs are compared directly; beyond, those in overlapping k-means partitions,
    whose files are in OUTPUT/_duplicates/work/ until the end, so that a stopped call continues. run_all: calls the
    function for each partition. on_step: called with the progress.
    Raises SettingRefused, InputRefused and OutputRefused.
    """
    _check(output, threshold, keep, false_rate)
    known = None if anew else known_pairs.load(output)
    folder, key = uris.join(output.uri, WORK), _key(output, threshold, false_rate, known)
    chosen = _given(threshold) or _of_work(folder, key) or _of_known(output, known, false_rate)
    chosen = chosen or _threshold(output, false_rate, on_step)
    if known and known.threshold["value"] > chosen.value:
        known = None
    base = Threshold(**known.threshold) if known else chosen
    old = known.unchanged(output) if known else frozenset()
    new = sum(part.rows for part in output.parts if part.path not in old)
    if new * output.rows <= max_all_pairs**2:
        found = Pairs.joined(pairs_of_new(output, base.value, old, on_step))
        how = "all pairs were compared"
    else:
        found, how = pairs_by_partitions(output, base.value, old, folder, key, asdict(chosen), run_all, on_step)
    if known:
        how = f"{new:,} images are new since an earlier call, which compared the others; {how}"
    pairs = Pairs.joined([found, known.pairs(output)]) if known else found
    known_pairs.save(output, asdict(base), pairs)
    remove(folder)
    pairs = pairs.at_least(chosen.value)
    keeper, similarity = groups.groups(pairs, groups.order(output, pairs.rows, keep))
    record = {"embedding_space": space_of(output).id, **chosen.to_json(), "keep": keep}
    return Duplicates(groups.table(output, keeper, similarity, record), chosen, output.rows, how)


def _check(output: Output, threshold: float | None, keep: str, false_rate: float) -> None:
    dim_of(output)
    if str(output.settings.get("weights", "")).startswith("random"):
        raise InputRefused(
            f"{output.uri} has vectors of random weights, which are alike for images that are not: embed the images "
            "with trained weights, or use --hash"
        )
    space_of(output)
    if threshold is not None and not 0 < threshold <= 1:
        raise SettingRefused(f"--threshold is {threshold:g}: it must be a cosine greater than 0 and at most 1")
    if not 0 < false_rate < 1:
        raise SettingRefused(f"--false-rate is {false_rate:g}: it must be greater than 0 and less than 1")
    check_keep(output, keep)
    if threshold is None and output.rows < MIN_ROWS:
        raise InputRefused(
            f"{output.uri} has {output.rows} rows: a threshold can be computed from {MIN_ROWS} or more; give "
            "--threshold"
        )


def _given(threshold: float | None) -> Threshold | None:
    return None if threshold is None else Threshold(threshold)


def _of_work(folder: str, key: str) -> Threshold | None:
    """The threshold of a stopped call."""
    note = unfinished(folder, key)
    return Threshold(**note) if note else None


def _of_known(output: Output, known: KnownPairs | None, false_rate: float) -> Threshold | None:
    """The threshold of earlier pairs, if it was computed for the same rate and from no far smaller output."""
    threshold = Threshold(**known.threshold) if known else None
    fits = threshold and threshold.false_rate == false_rate and output.rows <= MAX_GROWTH * threshold.rows
    return threshold if fits else None


def _key(output: Output, threshold: float | None, false_rate: float, known: KnownPairs | None) -> str:
    """Of everything that the work of a call depends on."""
    limit = {"false_rate": false_rate} if threshold is None else {"threshold": threshold}
    parts = [(part.path, part.rows) for part in output.parts]
    text = json.dumps([limit, space_of(output).id, parts, known.file if known else ""])
    return hashlib.sha256(text.encode()).hexdigest()


def _threshold(output: Output, false_rate: float, on_step: OnStep) -> Threshold:
    """The cosine that about `false_rate` images per image reach by chance.

    Around an image, the number of others within a distance r grows like r ** d. The dimension d and the density are
    those of its NEAR-th to FAR-th neighbours: near enough to be like its surroundings, and too many to be copies.
    """
    from scipy.special import digamma

    queries, dim = sample_vectors(output, SAMPLE), dim_of(output)
    best = Best(len(queries), FAR + 1)  # with the image itself
    for block in output.blocks([COLUMN]):
        best.add(queries, view_vectors(block.table[COLUMN], dim), block.positions)
        on_step("computing the threshold", int(block.positions[-1]) + 1, output.rows)
    near, far = (np.sqrt(np.maximum(2 - 2 * best.similarities[:, rank].astype(float), 0)) for rank in (NEAR, FAR))
    near = np.maximum(near, max(np.quantile(near, TRIM), 1e-6))  # of images with more than NEAR copies
    spread = np.log(np.maximum(far, near * (1 + 1e-6)) / near).mean()
    dimension = float((digamma(FAR) - digamma(NEAR)) / spread)
    scale = np.exp(np.mean(np.log(near)))
    expected = NEAR * np.mean((near / scale) ** -dimension)
    distance = scale * (false_rate / expected) ** (1 / dimension)
    return Threshold(float(np.clip(1 - distance**2 / 2, 0.0, 1 - 1e-6)), false_rate, dimension, output.rows)
