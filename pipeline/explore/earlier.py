"""What changed since an earlier output: images, classes, clusters, and the distribution of the vectors."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import OutputRefused
from pipeline.explore.analysis_files import AnalysisFiles
from pipeline.explore.changes import GONE, KINDS, SAME, SCHEMA, Comparer, Matcher, refuse_other_space
from pipeline.explore.class_statistics import ClassTally, LabelColumn, stability
from pipeline.explore.drift import EXAMPLES, SAMPLE, drift
from pipeline.explore.image_analysis import ImageAnalysis, has_vectors
from pipeline.explore.reference import Reference
from pipeline.explore.table import OnStep, Output, no_step

OF_CLASSES = ("labels", "heads")
"""Settings of a run that name its classes."""


def check_pair(output: Output, earlier: Output) -> None:
    """Raise OutputRefused for another embedding space, and for one output twice."""
    if earlier.uri == output.uri:
        raise OutputRefused(f"--against {earlier.uri} is the output itself: give that of an earlier run")
    both = (output, earlier)
    if all(has_vectors(each) for each in both) or all(each.settings.get("model") for each in both):
        refuse_other_space(output, earlier)


class Earlier:
    """Compares an output with an earlier one. images: the analysis of the later one.

    Both outputs have passed `check_pair`.
    """

    def __init__(self, earlier: Output, images: ImageAnalysis, on_step: OnStep = no_step) -> None:
        output = images.output
        self.output, self.earlier, self.images = output, earlier, images
        self.notes: list[str] = []
        with_vectors = has_vectors(earlier) and images.reference is not None
        if not has_vectors(earlier) and images.reference is not None:
            self.notes.append(f"{earlier.uri} has no vectors, so drift and changes of single images are left out")
        self.classes = [ClassTally(each) for each in self._comparable()]
        self.matcher = Matcher.of(earlier, on_step)
        self.matcher.match_all(output, on_step)
        if not self.matcher.common:
            self.notes.append(
                "no image_id is in both outputs: image_ids are whole URIs, so images of another folder are new"
            )
        pairs = with_vectors
        if with_vectors and self.matcher.is_shuffled:
            pairs = False
            self.notes.append("the images are in other orders in the two outputs: changes of vectors are left out")
        label = self.classes[0].column.name if self.classes else None
        self.comparer = Comparer(output, self.matcher, label, pairs)
        self.sample = Reference.of(earlier, on_step=on_step) if with_vectors else None
        self._count_classes(on_step)
        self.counts = Counter(dict.fromkeys(KINDS, 0))
        self.similarity_sum, self.compared, self.moved = 0.0, 0, 0

    def _comparable(self) -> list[LabelColumn]:
        """The columns of classes that both outputs have, with the same classes."""
        ours, theirs = ([each.settings.get(name) for name in OF_CLASSES] for each in (self.output, self.earlier))
        both = []
        for column in self.images.labels:
            names = [name for name in (column.name, column.score) if name]
            if not set(names) <= set(self.earlier.columns):
                self.notes.append(f"{self.earlier.uri} has no column {column.name}: its classes are not compared")
            elif not pa.types.is_string(self.earlier.schema.field(column.name).type):
                self.notes.append(f"{self.earlier.uri} has no texts in {column.name}: its classes are not compared")
            elif column.score and ours != theirs:
                self.notes.append(f"the classes of {column.name} differ between the outputs, so they are not compared")
            else:
                both.append(column)
        return both

    def _count_classes(self, on_step: OnStep) -> None:
        names = [name for each in self.classes for name in (each.column.name, each.column.score) if name]
        done = 0
        for batch in self.earlier.batches(names) if names else ():
            rows = pa.Table.from_batches([batch])
            for tally in self.classes:
                tally.add(rows)
            done += len(rows)
            on_step("counting the earlier classes", done, self.earlier.rows)

    def add(self, rows: pa.Table, files: AnalysisFiles) -> NDArray[np.float32] | None:
        """Compare a block. Writes what has changed; returns the similarities, None without vectors."""
        compared = self.comparer.compare(rows)
        self.counts.update(compared.table["change"].to_pylist())
        files.write_changes(compared.table)
        if not self.comparer.has_vectors:
            return None
        self.similarity_sum += float(np.nansum(compared.similarity))
        self.moved += int((compared.similarity < SAME).sum())
        self.compared += int((~np.isnan(compared.similarity)).sum())
        return compared.similarity

    def add_gone(self, files: AnalysisFiles) -> None:
        """Write the images that the later output lacks."""
        for batch in self.matcher.gone():
            self.counts[GONE] += len(batch)
            columns = {"image_id": batch["image_id"], "change": pa.repeat(GONE, len(batch))}
            nulls = {each.name: pa.nulls(len(batch), each.type) for each in SCHEMA}
            files.write_changes(pa.table({**nulls, **columns}, schema=SCHEMA))

    def figures(self) -> dict[str, Any]:
        """Everything as JSON."""
        changed = sum(count for kind, count in self.counts.items() if kind in KINDS[2:])
        figures: dict[str, Any] = {
            "output": self.earlier.uri,
            "rows": self.earlier.rows,
            "is_finished": self.earlier.is_finished,
            "images": {**self.counts, "same": self.matcher.common - changed},
        }
        if self.compared:
            figures["mean_similarity"] = self.similarity_sum / self.compared
            figures["moved_images"] = self.moved
            figures["moved"] = self.images.moved.rows("image_id", "earlier_similarity", "label", "cluster")
        later = {each.column.name: each for each in self.images.classes}
        figures["classes"] = {
            each.column.name: _stability(each.counts(), later[each.column.name].counts()) for each in self.classes
        }
        if self.sample and self.images.clusters and self.images.tally:
            before, after = self._earlier_sizes(), self.images.tally.sizes()
            figures["clusters"] = _stability(before, after)
            figures["drift"] = self._drift(self.sample)
        return figures

    def _earlier_sizes(self) -> dict[int, int]:
        """Images of the earlier sample in each cluster of the later output."""
        assert self.sample
        assert self.images.clusters
        cluster, _ = self.images.clusters.assign(self.sample.vectors)
        return dict(Counter(cluster.tolist()))

    def _drift(self, sample: Reference) -> dict[str, Any]:
        later = self.images.reference
        assert later
        rows = later.some(SAMPLE)
        result = drift(sample.vectors[sample.some(SAMPLE)], later.vectors[rows])
        shown = later.positions[rows[result.typical[:EXAMPLES]]]
        return {
            "mmd": result.mmd,
            "p_value": result.p_value,
            "is_significant": result.is_significant,
            "sampled": list(result.sampled),
            "typical": self.output.take(shown, ["image_id"])["image_id"].to_pylist(),
        }

    def with_shares(self, clusters: pa.Table, classes: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The tables of clusters and classes with the column `earlier_share`, and the classes that are gone."""
        if self.sample and self.images.clusters:
            sizes = self._earlier_sizes()
            shares = [sizes.get(cluster, 0) / len(self.sample) for cluster in clusters["cluster"].to_pylist()]
            clusters = clusters.append_column("earlier_share", pa.array(shares, pa.float64()))
        before = {(each.column.name, name): count for each in self.classes for name, count in each.counts().items()}
        totals = {each.column.name: max(int(each.images.sum()), 1) for each in self.classes}
        keys = list(zip(classes["column"].to_pylist(), classes["label"].to_pylist(), strict=True))
        gone = [key for key in before if key not in set(keys)]
        rows = [{"column": column, "label": label, "images": 0, "share": 0.0} for column, label in gone]
        classes = pa.concat_tables([classes, pa.Table.from_pylist(rows, schema=classes.schema)])
        of_earlier = [before.get(key, 0) / totals[key[0]] if key[0] in totals else None for key in [*keys, *gone]]
        return clusters, classes.append_column("earlier_share", pa.array(of_earlier, pa.float64()))


def _stability(earlier: dict[Any, int], later: dict[Any, int]) -> dict[str, Any] | None:
    names = list(dict.fromkeys([*earlier, *later]))
    result = stability([earlier.get(name, 0) for name in names], [later.get(name, 0) for name in names])
    if result is None:
        return None
    return {"psi": result.psi, "psi_by_chance": result.by_chance, "verdict": result.verdict}
