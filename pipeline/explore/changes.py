"""The images of two outputs, matched by image_id: new, gone, replaced, and with another label."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import OutputRefused
from pipeline.explore.table import OnStep, Output, no_step
from pipeline.explore.vectors import COLUMN, Vectors, dim_of, scaled, space_of, view_vectors

CONTENT = ("width", "height", "tile_hash")
SAME = 0.999
"""The least cosine of vectors of the same pixels. Other hardware, and bfloat16, move a vector by less."""
NEW, GONE, REPLACED, RELABELLED = "new", "gone", "replaced", "relabelled"
KINDS = (NEW, GONE, REPLACED, RELABELLED)
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("change", pa.string()),
        ("similarity", pa.float32()),
        ("earlier_label", pa.string()),
        ("label", pa.string()),
    ]
)
MAX_SHUFFLED_ROWS = 1_000_000
"""Rows of an output whose vectors are looked up in another order than that of the files."""
MAX_DISORDER = 0.01
PIECE_ROWS = 8192


def refuse_other_space(output: Output, earlier: Output) -> None:
    """Raise OutputRefused if the networks of two outputs differ, or what they see of an image."""
    if difference := space_of(output).difference(space_of(earlier)):
        raise OutputRefused(
            f"{output.uri} and {earlier.uri} cannot be compared, because their embedding spaces differ: {difference}"
        )


@dataclass
class Matcher:
    """Finds the rows of an earlier output by image_id. Keeps 17 bytes per image of it.

    hashes: of the image_ids, in ascending order. positions: of their rows. seen: whether each row was found.
    common, disorder: images that were found, and how many of them precede the one found before.
    """

    earlier: Output
    hashes: NDArray[np.int64]
    positions: NDArray[np.int64]
    seen: NDArray[np.bool_]
    common: int = 0
    disorder: int = 0
    _last: int = field(default=-1, repr=False)

    @staticmethod
    def of(earlier: Output, on_step: OnStep = no_step) -> "Matcher":
        hashes, filled = np.empty(earlier.rows, np.int64), 0
        for batch in earlier.batches(["image_id"]):
            hashes[filled : filled + len(batch)] = _hashes(batch["image_id"])
            filled += len(batch)
            on_step("reading the names of the earlier images", filled, earlier.rows)
        positions = np.argsort(hashes, kind="stable")
        return Matcher(earlier, hashes[positions], positions, np.zeros(earlier.rows, bool))

    def find(self, ids: pa.Array) -> NDArray[np.int64]:
        """Positions of these images in the earlier output, -1 for new ones."""
        hashes = _hashes(ids)
        place = np.searchsorted(self.hashes, hashes).clip(max=max(len(self.hashes) - 1, 0))
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        return np.where(self.hashes[place] == hashes, self.positions[place], -1)

    def note(self, places: NDArray[np.int64]) -> None:
        """Count what `find` returned for the next images."""
        found = places[places >= 0]
        self.seen[found] = True
        self.common += len(found)
        self.disorder += int((np.diff(found, prepend=self._last) < 0).sum())
        self._last = int(found[-1]) if len(found) else self._last

    def match_all(self, output: Output, on_step: OnStep = no_step) -> None:
        """Match all images of the later output."""
        done = 0
        for batch in output.batches(["image_id"]):
            self.note(self.find(batch["image_id"]))
            done += len(batch)
            on_step("matching the images of both outputs", done, output.rows)

    @property
    def is_shuffled(self) -> bool:
        """The outputs have so many rows in different orders that vectors cannot be looked up in reasonable time."""
        return self.common > MAX_SHUFFLED_ROWS and self.disorder > MAX_DISORDER * self.common

    def gone(self) -> Iterator[pa.RecordBatch]:
        """image_ids of the earlier output that the later one lacks."""
        first = 0
        for batch in self.earlier.batches(["image_id"]):
            lacks = ~self.seen[first : first + len(batch)]
            first += len(batch)
            if lacks.any():
                yield batch.filter(pa.array(lacks))


def _hashes(ids: pa.Array) -> NDArray[np.int64]:
    """Python's own hashes of strings, of 64 bits, which are equal within a process."""
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))


@dataclass(frozen=True)
class Compared:
    """Rows of the later output beside those of the earlier one.

    similarity: cosine of the vectors, float32 [N], NaN for new images and without vectors. table: with SCHEMA, the rows
    that have changed.
    """

    similarity: NDArray[np.float32]
    table: pa.Table


@dataclass(frozen=True)
class Comparer:
    """Compares the images of two outputs, block by block. label: column of both outputs, or None.

    has_vectors: compare the vectors too.
    """

    output: Output
    matcher: Matcher
    label: str | None
    has_vectors: bool

    @property
    def content(self) -> Sequence[str]:
        """Columns that both outputs have, and that differ only if an image was replaced."""
        earlier = self.matcher.earlier.columns
        return [name for name in CONTENT if name in self.output.columns and name in earlier]

    def compare(self, rows: pa.Table) -> Compared:
        """Compare a block of the later output, with the columns image_id, those of `content`, label and vectors."""
        places = self.matcher.find(rows["image_id"].combine_chunks())
        found = np.flatnonzero(places >= 0)
        labels = [self.label] if self.label else []
        names = [*self.content, *labels, *([COLUMN] if self.has_vectors else [])]
        earlier = self.matcher.earlier.take(places[found], names)
        is_replaced, similarity = np.zeros(len(rows), bool), np.full(len(rows), np.nan, np.float32)
        for name in self.content:
            now = rows[name].take(pa.array(found))
            is_replaced[found] |= ~pc.fill_null(pc.equal(now, earlier[name]), True).to_numpy()
        if self.has_vectors:
            dim = dim_of(self.output)
            similarity[found] = _cosines(view_vectors(rows[COLUMN], dim), found, view_vectors(earlier[COLUMN], dim))
            is_replaced |= similarity < SAME
        return Compared(similarity, self._table(rows, earlier, places, is_replaced, similarity))

    def _table(
        self,
        rows: pa.Table,
        earlier: pa.Table,
        places: NDArray[np.int64],
        is_replaced: NDArray[np.bool_],
        similarity: NDArray[np.float32],
    ) -> pa.Table:
        kind = np.where(places < 0, NEW, np.where(is_replaced, REPLACED, "")).astype(object)
        labels = earlier_labels = pa.nulls(len(rows), pa.string())
        if self.label:
            back = np.full(len(rows), -1)
            back[places >= 0] = np.arange(len(earlier))
            labels = rows[self.label].combine_chunks()
            earlier_labels = earlier[self.label].combine_chunks().take(pa.array(back, mask=back < 0))
            differs = ~pc.fill_null(pc.equal(labels, earlier_labels), True).to_numpy(zero_copy_only=False)
            kind[differs & (kind == "")] = RELABELLED
        columns = {
            "image_id": rows["image_id"],
            "change": pa.array(kind, pa.string()),
            "similarity": pa.array(similarity, mask=np.isnan(similarity)),
            "earlier_label": earlier_labels,
            "label": labels,
        }
        return pa.table(columns, schema=SCHEMA).filter(pa.array(kind != ""))


def _cosines(vectors: Vectors, rows: NDArray[np.int64], others: Vectors) -> NDArray[np.float32]:
    """Cosine of each of some vectors with another one, in pieces."""
    cosines = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), PIECE_ROWS):
        part = slice(start, start + PIECE_ROWS)
        cosines[part] = np.einsum("nd,nd->n", scaled(vectors[rows[part]]), scaled(others[part]))
    return np.clip(cosines, -1, 1)
