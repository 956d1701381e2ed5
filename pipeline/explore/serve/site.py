"""What each address of the page answers: rows, pictures, neighbours, plots and errors of one output.

Requests name rows by their numbers in a snapshot of the output. A run in progress changes these numbers, so each
request also names its snapshot, and one of an older snapshot is refused (409).
"""

import base64
import hashlib
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import NightshiftError, OutputRefused
from pipeline.explore.colors import PALETTE
from pipeline.explore.pictures import SIDE
from pipeline.explore.search import find_queries, nearest
from pipeline.explore.serve import plots
from pipeline.explore.serve.parameters import Parameters, RequestRefused
from pipeline.explore.serve.pictures import LARGE_SIDE, Pictures
from pipeline.explore.serve.rows import MAX_ERRORS, SORTS, Errors, Filter, Rows, finite
from pipeline.explore.table import Output, open_output
from pipeline.explore.vectors import COLUMN, Vectors, dim_of, view_vectors
from pipeline.output.geoparquet import has_footprints
from pipeline.storage import uris

MAX_ROWS = 200
"""Rows of one answer."""
MAX_PICTURES = 64
MAX_NEIGHBOURS = 500
UPLOAD_NAME = "picture"

Answer = dict[str, Any]
IsWanted = Callable[[], bool]


@dataclass(frozen=True)
class Snapshot:
    """The output as it was when it was opened. id: the same for the same rows."""

    id: str
    output: Output
    rows: Rows
    pictures: Pictures
    errors: Errors

    @staticmethod
    def of(output: Output, column: str | None) -> "Snapshot":
        parts = [(part.path, part.rows) for part in (*output.parts, *output.error_parts)]
        digest = hashlib.sha256(repr((output.uri, parts, output.is_finished)).encode()).hexdigest()
        rows = Rows(output, column)
        return Snapshot(digest[:16], output, rows, Pictures(rows), Errors(output))

    @property
    def has_vectors(self) -> bool:
        return COLUMN in self.output.columns

    @property
    def takes_uploads(self) -> bool:
        """Whether pictures of the user can be embedded: not for outputs of raster scenes."""
        return self.has_vectors and "tiling" not in self.output.settings

    @property
    def has_places(self) -> bool:
        return has_footprints(self.output.schema)

    @cached_property
    def places(self) -> plots.Places:
        return plots.places(self.rows)


class Site:
    """One output, opened again when its run goes on. Raises InputRefused and OutputRefused if it cannot be opened.

    column: of the labels; None to choose one.
    """

    def __init__(self, uri: str, column: str | None = None) -> None:
        self._uri, self._column = uri, column
        self._lock = threading.Lock()
        self._slow = threading.Lock()  # one search or projection at a time, because each may take the memory of a part
        self._projections: dict[tuple[str, str], plots.Projection] = {}
        self._is_stale = False
        self._snapshot = Snapshot.of(open_output(uri), column)

    @property
    def output(self) -> Output:
        return self._snapshot.output

    def answer(self, name: str, parameters: Parameters, is_wanted: IsWanted = lambda: True) -> Answer:
        """The answer of an address of JSON. Raises RequestRefused, also for what an output refuses (422)."""
        try:
            if name == "summary":
                return self.summary()
            snapshot = self._at(parameters)
            if name in NEED_ROWS:
                snapshot.output.require([COLUMN] if name in NEED_VECTORS else [])
                _require_rows(snapshot)
            if name == "pictures":
                return self.pictures(snapshot, parameters, is_wanted)
            return JSON[name](self, snapshot, parameters)
        except NightshiftError as error:
            self._is_stale = True
            raise RequestRefused(422, str(error)) from error

    def summary(self) -> Answer:
        """What the page needs to know first: numbers of rows, and what can be shown. Opens a run in progress again."""
        snapshot = self._current()
        output, rows = snapshot.output, snapshot.rows
        return {
            "v": snapshot.id,
            "uri": uris.redact(output.uri),
            "title": uris.redact(output.uri).rstrip("/").rpartition("/")[2],
            "rows": output.rows,
            "errors": output.error_rows,
            "max_errors": MAX_ERRORS,
            "finished": output.is_finished,
            "model": str(output.settings.get("model", "")),
            "label": rows.label_column,
            "score": rows.score_column,
            "vectors": snapshot.has_vectors,
            "places": snapshot.has_places,
            "upload": snapshot.takes_uploads,
            "methods": [method for method in plots.METHODS if method != plots.TSNE or plots.has_tsne()],
            "archive": ", ".join(uris.redact(str(each)) for each in output.settings.get("input", ())[:3]),
            "palette": ["#{:02x}{:02x}{:02x}".format(*color) for color in PALETTE],
        }

    def labels(self, snapshot: Snapshot, _: Parameters) -> Answer:
        """The labels with their numbers of rows, and the range of the scores."""
        index = snapshot.rows.index
        scores = index.scores[np.isfinite(index.scores)] if index.scores is not None else np.empty(0)
        return {
            "names": index.names,
            "counts": index.counts,
            "range": [finite(scores.min()), finite(scores.max())] if len(scores) else None,
        }

    def rows(self, snapshot: Snapshot, parameters: Parameters) -> Answer:
        """Rows `start` to `stop` of those that a filter chooses, and the number of all of these."""
        positions = snapshot.rows.matching(_filter(snapshot, parameters))
        total = snapshot.output.rows if positions is None else len(positions)
        start = parameters.integer("start", 0, max(total, 0), 0)
        stop = min(parameters.integer("stop", start, start + MAX_ROWS, start + MAX_ROWS), total)
        shown = range(start, stop) if positions is None else positions[start:stop].tolist()
        return {"total": total, "rows": snapshot.rows.to_list(list(shown))}

    def some(self, snapshot: Snapshot, parameters: Parameters) -> Answer:
        """Rows by their numbers."""
        return {"rows": snapshot.rows.to_list(parameters.rows("rows", snapshot.output.rows, MAX_ROWS))}

    def pictures(self, snapshot: Snapshot, parameters: Parameters, is_wanted: IsWanted) -> Answer:
        """Pictures of rows in base64; "" for those that cannot be read."""
        wanted = parameters.rows("rows", snapshot.output.rows, MAX_PICTURES)
        side = LARGE_SIDE if parameters.choice("size", ("small", "large")) == "large" else SIDE
        made = snapshot.pictures.get(wanted, side, is_wanted)
        return {"pictures": {row: base64.b64encode(picture).decode() for row, picture in made.items()}}

    def row(self, snapshot: Snapshot, parameters: Parameters) -> Answer:
        """All columns of one row."""
        return {"columns": snapshot.rows.details(_row(snapshot, parameters))}

    def neighbours(self, snapshot: Snapshot, parameters: Parameters) -> Answer:
        """The most similar rows of a row, the best first."""
        output, row = snapshot.output, _row(snapshot, parameters)
        column = output.take(np.array([row]), [COLUMN])[COLUMN]
        queries = find_queries(output, (), (), view_vectors(column, dim_of(output)))
        return self._nearest(snapshot, queries.vectors, parameters)

    def search(self, parameters: Parameters, picture: bytes) -> Answer:
        """The most similar rows of a picture that the user gives, the best first. Raises as `answer` does."""
        snapshot = self._at(parameters)
        _require_rows(snapshot)
        if not snapshot.takes_uploads:  # a raster may name other files, which the server would open
            raise RequestRefused(422, "This output takes no pictures: find images that are similar to one of its own.")
        try:
            with tempfile.TemporaryDirectory(prefix="nightshift-") as folder, self._slow:
                file = Path(folder, UPLOAD_NAME)
                file.write_bytes(picture)
                queries = find_queries(snapshot.output, [str(file)], (), None)
        except NightshiftError as error:
            raise RequestRefused(422, str(error).replace(f"--image {file}", "this picture")) from error
        return self._nearest(snapshot, queries.vectors, parameters)

    def projection(self, snapshot: Snapshot, parameters: Parameters) -> Answer:
        """Points of a sample of the vectors."""
        method = parameters.choice("method", plots.METHODS)
        if method == plots.TSNE and not plots.has_tsne():
            raise RequestRefused(422, "t-SNE needs scikit-learn: pip install 'nightshift[fit]'")
        key = (snapshot.id, method)
        with self._slow:
            if key not in self._projections:
                self._projections = {known: each for known, each in self._projections.items() if known[0] == key[0]}
                self._projections[key] = plots.project(snapshot.rows, method)
            made = self._projections[key]
        return {
            **plots.drawn(snapshot.rows, made.rows),
            "x": made.points[:, 0].round(4).tolist(),
            "y": made.points[:, 1].round(4).tolist(),
            "explained": None if made.explained is None else round(made.explained, 3),
        }

    def places(self, snapshot: Snapshot, _: Parameters) -> Answer:
        """Boxes of a sample of the footprints."""
        if not snapshot.has_places:
            raise RequestRefused(422, "This output has no footprints, so there is no map.")
        with self._slow:
            made = snapshot.places
        return {
            **plots.drawn(snapshot.rows, made.rows),
            "boxes": made.boxes.round(6).tolist(),
            "without": made.without,
        }

    def errors(self, snapshot: Snapshot, parameters: Parameters) -> Answer:
        """Errors `start` to `stop` of a type and with a text."""
        table = snapshot.errors.matching(parameters.text("type"), parameters.text("text"))
        start = parameters.integer("start", 0, max(len(table), 0), 0)
        stop = parameters.integer("stop", start, start + MAX_ROWS, start + MAX_ROWS)
        return {
            "total": len(table),
            "types": snapshot.errors.types(),
            "rows": table.slice(start, stop - start).to_pylist(),
        }

    def _nearest(self, snapshot: Snapshot, queries: Vectors, parameters: Parameters) -> Answer:
        count = parameters.integer("count", 1, MAX_NEIGHBOURS, 60)
        with self._slow:
            similarities, positions = nearest(snapshot.output, queries, count)
        is_hit = positions[0] >= 0
        return {
            "rows": positions[0][is_hit].tolist(),
            "similarities": [finite(value) for value in similarities[0][is_hit].tolist()],
        }

    def _current(self) -> Snapshot:
        """The latest snapshot. A finished output is not opened again, unless something of it could not be read."""
        with self._lock:
            if self._is_stale or not self._snapshot.output.is_finished:
                self._is_stale = False
                try:
                    fresh = Snapshot.of(open_output(self._uri), self._column)
                except OutputRefused as error:
                    raise RequestRefused(422, str(error)) from error
                if fresh.id != self._snapshot.id:
                    self._snapshot = fresh
            return self._snapshot

    def _at(self, parameters: Parameters) -> Snapshot:
        snapshot = self._snapshot
        if parameters.text("v") != snapshot.id:
            raise RequestRefused(409, "The output has changed since this page was opened: reload the page.")
        return snapshot


JSON: dict[str, Callable[[Site, Snapshot, Parameters], Answer]] = {
    "labels": Site.labels,
    "rows": Site.rows,
    "some": Site.some,
    "row": Site.row,
    "neighbours": Site.neighbours,
    "projection": Site.projection,
    "places": Site.places,
    "errors": Site.errors,
}


NEED_VECTORS = ("neighbours", "projection")
NEED_ROWS = ("row", "places", *NEED_VECTORS)


def _require_rows(snapshot: Snapshot) -> None:
    if not snapshot.output.rows:
        raise RequestRefused(422, f"{snapshot.output.uri} has no rows yet: see its errors, or wait for its first part")


def _row(snapshot: Snapshot, parameters: Parameters) -> int:
    return parameters.integer("row", 0, max(snapshot.output.rows - 1, 0))


def _filter(snapshot: Snapshot, parameters: Parameters) -> Filter:
    label = parameters.integer("label", -1, len(snapshot.rows.index.names) - 1) if parameters.text("label") else -1
    has_score = snapshot.rows.score_column is not None
    return Filter(
        label=None if label < 0 else label,
        low=parameters.number("low") if has_score else None,
        high=parameters.number("high") if has_score else None,
        text=parameters.text("text"),
        sort=parameters.choice("sort", SORTS) if has_score else SORTS[0],
    )
