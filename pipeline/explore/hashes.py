"""`nightshift duplicates --hash`: groups of images whose perceptual hashes differ in few bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import OutputRefused, SettingRefused
from pipeline.explore import groups
from pipeline.explore.groups import Duplicates, check_keep
from pipeline.explore.pairs import Pairs
from pipeline.explore.table import OnStep, Output, no_step
from pipeline.images.phash import BITS, COLUMN

DISTANCE = 4
MAX_DISTANCE = 10
"""Hashes that differ in more bits are also those of different images."""
BLOCK_ROWS, BLOCK_COLUMNS = 1024, 4096

Hashes = NDArray[np.int64]


@dataclass(frozen=True)
class Distance:
    """The largest number of bits in which the hashes of duplicates differ. without: images that have no hash."""

    bits: int
    without: int
    is_estimate = False

    def describe(self) -> str:
        none = f"; {self.without:,} images of one colour have no hash" if self.without else ""
        return f"hashes that differ in at most {self.bits} of {BITS} bits{none}"

    def to_json(self) -> dict[str, Any]:
        return {"distance": self.bits}


def duplicates_by_hash(
    output: Output, *, distance: int = DISTANCE, keep: str = "first", on_step: OnStep = no_step
) -> Duplicates:
    """Find groups of images by the column `phash` of `--phash`. Needs no vectors.

    distance: the largest number of different bits. keep: as in `duplicates.duplicates`. The similarity of two images is
    the share of equal bits. All pairs of hashes are compared. Raises SettingRefused, InputRefused and OutputRefused.
    """
    _check(output, distance, keep)
    hashes, rows = _read(output)
    ranked = groups.order(output, rows, keep)
    unique, of_row = np.unique(hashes, return_inverse=True)
    of_ranked = of_row[np.searchsorted(rows, ranked)]
    best, first = np.unique(of_ranked, return_index=True)  # the row of each hash that is rather kept
    assert len(best) == len(unique)
    places = np.argsort(first)
    keeper, similarity = groups.groups(_pairs(unique, distance, on_step), places)
    _add_equal(keeper, similarity, of_row)
    kept_row = ranked[first]
    keeper_of, similarity_of = _of_rows(keeper, similarity, rows, of_row, kept_row)
    limit = Distance(distance, output.rows - len(rows))
    record = {**limit.to_json(), "keep": keep}
    table = groups.table(output, keeper_of, similarity_of, record)
    return Duplicates(table, limit, output.rows, "all pairs were compared")


def _check(output: Output, distance: int, keep: str) -> None:
    if not 0 <= distance <= MAX_DISTANCE:
        raise SettingRefused(f"--distance is {distance}: it must be a number of bits from 0 to {MAX_DISTANCE}")
    output.require(["image_id"])
    if COLUMN not in output.columns or output.schema.field(COLUMN).type != pa.int64():
        raise OutputRefused(
            f"{output.uri} has no column {COLUMN} of int64: run its job with --phash, into another output"
        )
    check_keep(output, keep)


def _read(output: Output) -> tuple[Hashes, NDArray[np.int64]]:
    """The hashes, and the positions of the rows that have one."""
    hashes, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for block in output.blocks([COLUMN]):
        column = block.table[COLUMN].combine_chunks()
        is_valid = column.is_valid().to_numpy(zero_copy_only=False)
        hashes.append(column.drop_null().to_numpy())
        rows.append(block.positions[is_valid])
    return np.concatenate(hashes), np.concatenate(rows)


def _pairs(unique: Hashes, distance: int, on_step: OnStep) -> Pairs:
    """The pairs of different hashes, by their places. similarity: share of equal bits.

    Of distance + 1 pieces of two such hashes, one is equal. So only hashes with an equal piece are compared.
    """

    def found() -> Iterator[Pairs]:
        pieces = _pieces(unique, distance + 1)
        for number, piece in enumerate(pieces):
            order = np.argsort(piece, kind="stable")
            starts = np.flatnonzero(np.diff(piece[order], prepend=-1))
            for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
                if stop - start > 1:
                    for first, second, bits in _near(unique, order[start:stop], distance):
                        is_new = np.ones(len(first), bool)
                        for earlier in pieces[:number]:
                            is_new &= earlier[first] != earlier[second]
                        yield Pairs(first[is_new], second[is_new], np.asarray(1 - bits[is_new] / BITS, np.float32))
            on_step("comparing hashes", number + 1, len(pieces))

    return Pairs.joined(found()) if distance else Pairs.none()


def _pieces(hashes: Hashes, count: int) -> list[Hashes]:
    """The bits of each hash in pieces of about the same width, as numbers."""
    ends = [round(BITS * number / count) for number in range(count + 1)]
    bits = hashes.view(np.uint64)
    return [
        ((bits >> np.uint64(start)) & np.uint64((1 << (stop - start)) - 1)).astype(np.int64)
        for start, stop in pairwise(ends)
    ]


def _near(hashes: Hashes, places: NDArray[np.int64], distance: int) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """The pairs of some places, in ascending order, whose hashes differ in at most `distance` bits, and these bits."""
    some = hashes.view(np.uint64)[places]  # `bitwise_count` is that of the absolute value
    for start in range(0, len(places), BLOCK_ROWS):
        for column in range(start, len(places), BLOCK_COLUMNS):
            rows, columns = slice(start, start + BLOCK_ROWS), slice(column, column + BLOCK_COLUMNS)
            bits = np.bitwise_count(some[rows, None] ^ some[None, columns])
            i, j = np.nonzero(bits <= distance)
            is_pair = i + start < j + column
            i, j = i[is_pair], j[is_pair]
            if len(i):
                yield places[i + start], places[j + column], bits[i, j].astype(np.int64)


def _add_equal(keeper: dict[int, int], similarity: dict[int, float], of_row: NDArray[np.int64]) -> None:
    """Add the hashes that several images share, if they are in no group."""
    for place in np.flatnonzero(np.bincount(of_row) > 1).tolist() if len(of_row) else ():
        if place not in keeper:
            keeper[place], similarity[place] = place, 1.0


def _of_rows(
    keeper: dict[int, int],
    similarity: dict[int, float],
    rows: NDArray[np.int64],
    of_row: NDArray[np.int64],
    kept_row: NDArray[np.int64],
) -> tuple[dict[int, int], dict[int, float]]:
    """The groups of hashes as groups of rows. kept_row: of each hash, the row that is rather kept."""
    in_group = np.flatnonzero(np.isin(of_row, list(keeper)))
    pairs = [(int(rows[each]), int(of_row[each])) for each in in_group]
    return {row: int(kept_row[keeper[place]]) for row, place in pairs}, {row: similarity[place] for row, place in pairs}
