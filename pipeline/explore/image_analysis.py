"""What `analyze` computes of every image of an output: cluster, outlier score, contradiction, flags."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import schema
from pipeline.explore.changes import SAME
from pipeline.explore.choices import need_search
from pipeline.explore.class_statistics import ClassTally, LabelColumn, strings
from pipeline.explore.clusters import Clusters, Tally, find_clusters
from pipeline.explore.outliers import Neighbourhoods
from pipeline.explore.reference import Reference
from pipeline.explore.table import OnStep, Output, no_step
from pipeline.explore.vectors import COLUMN, Vectors, dim_of, scaled, view_vectors
from pipeline.images import quality

LISTED = 100
"""Images of each list."""
PIECE_ROWS = 8192
MAX_NAMED = 5


@dataclass(frozen=True)
class Settings:
    """How to cluster, and which neighbours count. See `analysis.analyze`."""

    method: str
    clusters: int | None
    sample: int | None
    neighbours: int


class Top:
    """The LISTED rows with the largest numbers of a column, or the smallest, of all tables seen so far."""

    def __init__(
        self, column: str, where: str | None = None, *, below: float | None = None, largest: bool = True
    ) -> None:
        self.column, self.where, self.below = column, where, below
        self.order = "descending" if largest else "ascending"
        self.table: pa.Table | None = None

    def add(self, rows: pa.Table) -> None:
        """Add rows that have the column. Those for which the column `where` is false, or that are not `below`, do not
        count.
        """
        if self.column not in rows.column_names:
            return
        is_chosen = rows[self.where] if self.where else pc.less(rows[self.column], self.below)
        chosen = rows.filter(is_chosen)
        both = chosen if self.table is None else pa.concat_tables([self.table, chosen])
        self.table = both.sort_by([(self.column, self.order), ("image_id", "ascending")]).slice(0, LISTED)
        self.table = self.table.combine_chunks()

    def rows(self, *names: str) -> list[dict[str, Any]]:
        """The rows with some columns, those that exist; [] if there are none."""
        if self.table is None:
            return []
        return list(self.table.select([name for name in names if name in self.table.column_names]).to_pylist())


class ImageAnalysis:
    """reference, clusters, neighbourhoods: None for an output without vectors. flags: images with each quality flag."""

    def __init__(
        self, output: Output, labels: tuple[LabelColumn, ...], settings: Settings, on_step: OnStep = no_step
    ) -> None:
        self.output, self.labels = output, labels
        self.reference: Reference | None = None
        self.clusters: Clusters | None = None
        self.neighbourhoods: Neighbourhoods | None = None
        self.tally: Tally | None = None
        if has_vectors(output):
            self._prepare(settings, on_step)
        self.classes = [ClassTally(column) for column in labels]
        self.flags: dict[str, int] = {}
        self.outlier_count = self.contradicted_count = 0
        self.outliers = Top("outlier", "is_outlier")
        self.contradicted = Top("contradiction", "is_contradicted")
        self.moved = Top("earlier_similarity", below=SAME, largest=False)

    def _prepare(self, settings: Settings, on_step: OnStep) -> None:
        need_search("nightshift analyze", "faiss")
        own = [self.labels[0].name] if self.labels else []
        self.reference = Reference.of(self.output, own, on_step=on_step)
        on_step("clustering", 0, 1)
        self.clusters = find_clusters(self.reference, settings.method, settings.clusters, settings.sample)
        self.tally = Tally(self.clusters)
        if count := min(settings.neighbours, len(self.reference) - 1):
            names = strings(self.reference.table[own[0]]) if own else None
            self.neighbourhoods = Neighbourhoods(self.reference, count, names)
            on_step("clustering", 1, 1)
            _ = self.neighbourhoods.scale  # builds the index

    @property
    def columns(self) -> list[str]:
        """The columns that `add` needs."""
        names = ["image_id", "width", "height"]
        names += [name for each in self.labels for name in (each.name, each.score) if name]
        names += quality.COLUMNS.names if quality.is_measured(self.output.columns) else []
        names += [COLUMN] if self.reference else []
        return list(dict.fromkeys(names))

    def add(self, block: pa.Table, positions: NDArray[np.int64], similarity: NDArray[np.float32] | None) -> pa.Table:
        """Add a block with the `columns`. Returns its rows for images.parquet.

        similarity: cosines with the vectors of an earlier output, NaN for none.
        """
        pieces = []
        for start in range(0, len(block), PIECE_ROWS):
            part = slice(start, start + PIECE_ROWS)
            of_piece = None if similarity is None else similarity[part]
            pieces.append(self._add(block.slice(start, PIECE_ROWS), positions[part], of_piece))
        return pa.concat_tables(pieces)

    def _add(self, rows: pa.Table, positions: NDArray[np.int64], similarity: NDArray[np.float32] | None) -> pa.Table:
        columns: dict[str, Any] = {"image_id": rows["image_id"]}
        label = strings(rows[self.labels[0].name]) if self.labels else None
        if label is not None:
            columns["label"] = label
        if self.reference:
            vectors = scaled(view_vectors(rows[COLUMN], dim_of(self.output)))
            columns |= self._of_vectors(vectors, positions, rows["image_id"].combine_chunks(), label)
        columns["flags"] = self._flags(rows)
        if similarity is not None:
            columns["earlier_similarity"] = pa.array(similarity, mask=np.isnan(similarity))
        for tally in self.classes:
            tally.add(rows)
        table = pa.table(columns)
        for top in (self.outliers, self.contradicted, self.moved):
            top.add(table)
        return table

    def _of_vectors(
        self, vectors: Vectors, positions: NDArray[np.int64], ids: pa.Array, label: pa.Array | None
    ) -> dict[str, Any]:
        assert self.clusters
        assert self.tally
        cluster, distance = self.clusters.assign(vectors)
        self.tally.add(cluster, distance, ids, label)
        columns: dict[str, Any] = {"cluster": pa.array(cluster, pa.int32())}
        columns["distance"] = pa.array(distance, mask=np.isnan(distance))
        if self.neighbourhoods is None:
            return columns
        cosines, found = self.neighbourhoods.reference.neighbours(vectors, positions, self.neighbourhoods.count)
        outlier = self.neighbourhoods.outliers(cosines)
        is_outlier = outlier > self.neighbourhoods.scale[1]
        self.outlier_count += int(is_outlier.sum())
        columns |= {"outlier": outlier, "is_outlier": is_outlier}
        if label is not None:
            contradiction, winners, is_contradicted = self.neighbourhoods.contradictions(found, label)
            self.contradicted_count += int(is_contradicted.sum())
            columns["contradiction"] = pa.array(contradiction, mask=np.isnan(contradiction))
            columns |= {"neighbour_label": winners, "is_contradicted": is_contradicted}
        return columns

    def _flags(self, rows: pa.Table) -> pa.Array:
        """The quality flags of each row, as lists."""
        found = quality.flags(rows)
        for name, has in found.items():
            self.flags[name] = self.flags.get(name, 0) + int(has.sum())
        stacked = np.stack(list(found.values()), axis=1)
        offsets = np.concatenate([[0], np.cumsum(stacked.sum(axis=1))]).astype(np.int32)
        names = pa.array(list(found), pa.string()).take(pa.array(np.nonzero(stacked)[1]))
        return pa.ListArray.from_arrays(pa.array(offsets), names)

    def notes(self) -> list[str]:
        """What was left out, and why."""
        notes = []
        if not self.output.is_finished:
            notes.append("the run has not finished: these are the rows that are committed so far")
        if self.reference is None:
            notes.append(
                "there are no vectors, so clusters, outliers, contradicted labels and drift are left out: `embed` and "
                "`classify --embeddings` write them"
            )
        elif str(self.output.settings.get("weights", "")).startswith("random"):
            notes.append("the vectors are of random weights: they say little about what the images show")
        if not self.labels:
            notes.append(
                "there are no classes, so their counts, the clusters' names and contradicted labels are left out: "
                "`classify` writes them, and --label names a kept column"
            )
        if not quality.is_measured(self.output.columns):
            notes.append("of the quality, only small images are flagged: --quality on `embed` and `classify` adds more")
        if self.neighbourhoods and (rare := self.neighbourhoods.not_judged):
            notes.append(
                f"labels of {_some(rare)} are not judged: the sample has at most {self.neighbourhoods.count} images of "
                "each"
            )
        notes += [
            f"{each.outside:,} values of {each.column.score} are not from 0 to 1, and are in no histogram"
            for each in self.classes
            if each.outside
        ]
        return notes


def has_vectors(output: Output) -> bool:
    """Whether an output has a column of vectors."""
    return COLUMN in output.columns and schema.is_vector(output.schema.field(COLUMN).type)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMED])
    return f"{shown} and {len(names) - MAX_NAMED:,} further classes" if len(names) > MAX_NAMED else shown
