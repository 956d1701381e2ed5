"""What to label next, and the images that a concept fits best: a head applied to all vectors of an output."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.explore.table import Output
from pipeline.explore.vectors import COLUMN, as_vectors, scaled
from pipeline.models.heads import Head

CANDIDATES = 3
"""Most uncertain images per suggestion, of which those that differ most are suggested."""
Floats = NDArray[np.float32]
_Row = tuple[str, int, float, Floats]
"""image_id, number of the best class, its score, vector."""
LIKELY, UNCERTAIN = "likely", "uncertain"


@dataclass(frozen=True)
class Suggestion:
    """An image to look at. label, score: of the head. reason: likely (of one concept) or uncertain."""

    image_id: str
    label: str
    score: float
    reason: str


class _Best:
    """The `count` images with the highest values, of all batches seen so far."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.values = np.empty(0, np.float32)
        self.rows: list[_Row] = []

    def add(self, values: Floats, ids: pa.Array, scores: Floats, x: Floats) -> None:
        """Add a batch. Rows whose value is -inf never count."""
        lowest = self.values.min() if len(self.values) == self.count else -np.inf
        chosen = np.flatnonzero(values > lowest)
        chosen = chosen[np.argsort(-values[chosen], kind="stable")][: self.count]
        best = scores[chosen].argmax(axis=1)
        self.rows += [
            (ids[int(row)].as_py(), int(c), float(scores[row, c]), x[row].copy())
            for row, c in zip(chosen, best, strict=True)
        ]
        self.values = np.concatenate([self.values, values[chosen]])
        order = np.argsort(-self.values, kind="stable")[: self.count]
        self.values, self.rows = self.values[order], [self.rows[place] for place in order]


def suggest(
    output: Output, head: Head, labelled: Sequence[int], count: int, concept: str | None = None
) -> list[Suggestion]:
    """The images without a label whose labels would help most.

    They are those between whose best two classes the head decides least, and of these the ones that differ most. For
    one `concept`, half of them are those with its highest score.
    labelled: positions of the labelled rows among the output's rows, in ascending order.
    """
    likely = 0 if concept is None else count // 2
    uncertain, best = _Best(CANDIDATES * (count - likely)), _Best(likely)
    for first, ids, x, scores in _scored(output, head):
        new = _unlabelled(first, len(ids), labelled)
        uncertain.add(np.where(new, -_margin(scores, head.multi_label), -np.inf).astype(np.float32), ids, scores, x)
        if likely:
            values = scores[:, head.classes.index(str(concept))]
            best.add(np.where(new, values, -np.inf).astype(np.float32), ids, scores, x)
    taken = {row[0] for row in best.rows}
    different = _differing([row for row in uncertain.rows if row[0] not in taken], count - likely)
    return [
        Suggestion(image_id, head.classes[c], score, reason)
        for rows, reason in ((best.rows, LIKELY), (different, UNCERTAIN))
        for image_id, c, score, _ in rows
    ]


def rank(output: Output, head: Head, concept: str, count: int) -> list[Suggestion]:
    """The images with the highest scores of a class, the best first."""
    c, best = head.classes.index(concept), _Best(count)
    for _, ids, x, scores in _scored(output, head):
        best.add(scores[:, c], ids, scores, x[:, :0])
    return [
        Suggestion(image_id, concept, float(value), LIKELY)
        for (image_id, *_), value in zip(best.rows, best.values, strict=True)
    ]


def as_csv(suggestions: Sequence[Suggestion]) -> bytes:
    """The columns image, label, score and reason. Correct the labels, and the file is one for `--labels`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "label", "score", "reason"])
    writer.writerows([each.image_id, each.label, f"{each.score:.4f}", each.reason] for each in suggestions)
    return text.getvalue().encode()


def _scored(output: Output, head: Head) -> Iterator[tuple[int, pa.Array, Floats, Floats]]:
    """Batches of the output: first row, image_ids, vectors and scores."""
    first = 0
    for batch in output.batches(["image_id", COLUMN]):
        x = as_vectors(batch.column(1), head.dim)
        with torch.inference_mode():
            yield first, batch.column(0), x, head.scores(torch.from_numpy(x)).numpy()
        first += len(batch)


def _margin(scores: Floats, multi_label: bool) -> Floats:
    """How clearly the head decides: the distance of the best two scores, or of the nearest one from 0.5."""
    if multi_label:
        return np.asarray(np.abs(scores - 0.5).min(axis=1), np.float32)
    best = np.sort(scores, axis=1)[:, -2:]
    return np.asarray(best[:, 1] - best[:, 0], np.float32)


def _unlabelled(first: int, count: int, labelled: Sequence[int]) -> NDArray[np.bool_]:
    rows = np.asarray(labelled, np.int64) - first
    new = np.ones(count, bool)
    new[rows[(rows >= 0) & (rows < count)]] = False
    return new


def _differing(rows: list[_Row], count: int) -> list[_Row]:
    """Rows that differ most: each is the one least similar to those taken before it (k-centre, greedy)."""
    if not rows:
        return []
    x = scaled(np.stack([row[3] for row in rows]))
    taken = [0]
    nearest = x @ x[0]
    while len(taken) < min(count, len(rows)):
        nearest[taken] = np.inf
        taken.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, x @ x[taken[-1]])
    return [rows[place] for place in taken]
