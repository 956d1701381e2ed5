"""The classes of an output: images and scores of each, and how much two sets of shares differ."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import OutputRefused, SettingRefused
from pipeline.explore.table import Output

BINS = 20
MAX_CLASSES = 10_000
LABEL, SCORE = "label", "score"
SCHEMA = pa.schema(
    [
        ("column", pa.string()),
        ("label", pa.string()),
        ("images", pa.int64()),
        ("share", pa.float64()),
        ("mean_score", pa.float32()),
        ("scores", pa.list_(pa.int64())),
    ]
)
"""scores: number of images in BINS bins of equal width from 0 to 1; null without scores."""
STABLE, SHIFTED = 0.1, 0.25
"""The usual limits of a PSI: below the first the shares are stable, above the second they have shifted."""


@dataclass(frozen=True)
class LabelColumn:
    """A column of classes, and the column of their scores; None without one."""

    name: str
    score: str | None


def label_columns(output: Output, label: str | None = None) -> tuple[LabelColumn, ...]:
    """The columns of classes: those of `classify`, with any prefix of a head. label: a further one, which comes first.

    Raises OutputRefused if there is no such column, SettingRefused if it has no texts.
    """
    found = [
        LabelColumn(name, f"{name.removesuffix(LABEL)}{SCORE}")
        for name in output.columns
        if name.endswith(LABEL) and f"{name.removesuffix(LABEL)}{SCORE}" in output.columns
        if pa.types.is_string(output.schema.field(name).type)
    ]
    if label is None:
        return tuple(found)
    if label not in output.columns:
        raise OutputRefused(f"--label {label}: {output.uri} has no such column; there are {', '.join(output.columns)}")
    if not pa.types.is_string(output.schema.field(label).type):
        raise SettingRefused(f"--label {label} is {output.schema.field(label).type}: it must be a column of texts")
    known = {each.name: each for each in found}
    first = known.pop(label, LabelColumn(label, None))
    return (first, *known.values())


class ClassTally:
    """Images and scores by class of one column, of all blocks seen so far. Nulls are no class."""

    def __init__(self, column: LabelColumn) -> None:
        self.column = column
        self.numbers: dict[str, int] = {}
        self.images = np.zeros(0, np.int64)
        self.sums = np.zeros(0)
        self.bins = np.zeros((0, BINS), np.int64)
        self.outside = 0
        """Scores that are not from 0 to 1, and are in no bin."""

    def add(self, rows: pa.Table) -> None:
        """Add a block with the columns. Raises SettingRefused for more than MAX_CLASSES classes."""
        encoded = rows[self.column.name].combine_chunks().dictionary_encode()
        codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        is_class = codes >= 0
        for name in encoded.dictionary.to_pylist():
            self.numbers.setdefault(name, len(self.numbers))
        if len(self.numbers) > MAX_CLASSES:
            raise SettingRefused(
                f"the column {self.column.name} has more than {MAX_CLASSES:,} different values: it holds no classes"
            )
        self._grow(len(self.numbers))
        of_code = np.array([self.numbers[name] for name in encoded.dictionary.to_pylist()], np.int64)
        numbers = of_code[codes[is_class]]
        self.images += np.bincount(numbers, minlength=len(self.images))
        if self.column.score:
            self._add_scores(numbers, rows[self.column.score].to_numpy()[is_class])

    def _add_scores(self, numbers: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        self.sums += np.bincount(numbers, scores, minlength=len(self.sums))
        is_inside = (scores >= 0) & (scores <= 1)
        self.outside += int((~is_inside).sum())
        bins = np.minimum((scores[is_inside] * BINS).astype(np.int64), BINS - 1)
        cells = np.bincount(numbers[is_inside] * BINS + bins, minlength=self.bins.size)
        self.bins += cells.reshape(self.bins.shape)

    def _grow(self, count: int) -> None:
        more = count - len(self.images)
        self.images, self.sums = np.pad(self.images, (0, more)), np.pad(self.sums, (0, more))
        self.bins = np.pad(self.bins, ((0, more), (0, 0)))

    def counts(self) -> dict[str, int]:
        """Images of each class."""
        return {name: int(self.images[number]) for name, number in self.numbers.items()}

    def table(self) -> pa.Table:
        """The classes with SCHEMA, the most frequent first."""
        names, total, has_scores = list(self.numbers), max(int(self.images.sum()), 1), self.column.score is not None
        rows = [
            {
                "column": self.column.name,
                "label": names[number],
                "images": int(self.images[number]),
                "share": self.images[number] / total,
                "mean_score": self.sums[number] / self.images[number] if has_scores else None,
                "scores": self.bins[number].tolist() if has_scores else None,
            }
            for number in sorted(range(len(names)), key=lambda number: (-self.images[number], names[number]))
        ]
        return pa.Table.from_pylist(rows, schema=SCHEMA)


@dataclass(frozen=True)
class Stability:
    """The population stability index of two sets of counts, and its mean if only chance made them differ."""

    psi: float
    by_chance: float

    @property
    def verdict(self) -> str:
        """stable, moved or shifted, by the usual limits, above what chance explains."""
        limits = STABLE + self.by_chance, SHIFTED + self.by_chance
        return "stable" if self.psi < limits[0] else "moved" if self.psi < limits[1] else "shifted"


def stability(earlier: Sequence[int], later: Sequence[int]) -> Stability | None:
    """PSI: the sum over classes of (q - p) ln(q / p). None if one side has no images.

    Half an image is added to each class, so that an empty one counts and is not infinite. For equal distributions of B
    classes its mean is about (B - 1)(1/N + 1/M).
    """
    before, after = np.asarray(earlier, float), np.asarray(later, float)
    if not before.sum() or not after.sum():
        return None
    by_chance = max(len(before) - 1, 0) * (1 / before.sum() + 1 / after.sum())
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (before, after))
    return Stability(float(((q - p) * np.log(q / p)).sum()), by_chance)


def strings(column: pa.ChunkedArray) -> pa.Array:
    """A column of texts as one array of strings."""
    return pc.cast(column, pa.string()).combine_chunks()
