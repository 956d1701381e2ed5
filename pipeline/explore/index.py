"""`nightshift index`: an approximate index of an output's vectors, kept in OUTPUT/_index/.

It is FAISS's inverted file (IVF): k-means cells, of which a search looks at some. It stores vectors as float16, so that
similarities are those of the parts within 0.001, and no part is read. Rows that the index lacks, such as those of a
later `--update`, are searched exactly.
"""

import json
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputRefused, OutputRefused, SettingRefused
from pipeline.explore.choices import as_mask, need_search
from pipeline.explore.pairs import sample_vectors
from pipeline.explore.search import Best, nearest
from pipeline.explore.table import Choice, OnStep, Output, Part, no_step
from pipeline.explore.vectors import COLUMN, Vectors, dim_of, scaled, space_of, view_vectors
from pipeline.storage import access, uris

FOLDER, RECORD = "_index", "index.json"
FORMAT = 1
MAX_SAMPLE = 250_000
SAMPLE_PER_CELL = 64
RECALL_COUNT, RECALL_QUERIES = 10, 100
TARGET_RECALL = 0.95
MAX_GROWTH = 2.0
"""An index whose output has grown more than this since its cells were found is built anew."""
PART_BITS = 40
"""An id in the index is the number of its part, shifted by this, and its row in the part."""


@dataclass(frozen=True)
class IndexRecord:
    """The content of `_index/index.json`.

    file: name of FAISS's file. space: id of the vectors' embedding space. parts: paths of the indexed parts, in the
    order of their numbers. rows: of each. trained_rows: of the output when the cells were found. cells: their number.
    probes: cells that a search looks at. recall: at 10, against exact search, of a sample.
    """

    file: str
    space: str
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    trained_rows: int
    cells: int
    probes: int
    recall: float

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **vars(self)}, indent=1).encode()

    def describe(self) -> str:
        """One line for the user."""
        return (
            f"{sum(self.rows):,} vectors in {self.cells:,} cells, {self.probes} of them per query; recall@10 is "
            f"{self.recall:.3f} against exact search, on a sample"
        )


def build(output: Output, *, overwrite: bool = False, on_step: OnStep = no_step) -> IndexRecord:
    """Build the index of an output, or add the parts that it lacks. Returns its record, with its recall.

    overwrite: build it anew. on_step: called with the progress. Raises InputRefused for an output without rows,
    SettingRefused without FAISS.
    """
    need_search("nightshift index", "faiss")
    dim_of(output)
    earlier = None if overwrite else _load(output)
    if earlier and (_gone(output, earlier) or earlier.space != space_of(output).id):
        earlier = None
    if earlier and output.rows > MAX_GROWTH * earlier.trained_rows:
        earlier = None
    if earlier and not _lacking(output, earlier):
        return earlier
    index = _read(output, earlier) if earlier else _trained(output, on_step)
    indexed = earlier.parts if earlier else ()
    parts = [*indexed, *(part.path for part in output.parts if part.path not in set(indexed))]
    _add(output, index, parts, indexed, on_step)
    rows = {part.path: part.rows for part in output.parts}
    probes, recall = _tuned(output, index, parts, on_step)
    record = IndexRecord(
        file=f"{uuid.uuid4().hex[:12]}.faiss",
        space=space_of(output).id,
        parts=tuple(parts),
        rows=tuple(rows[path] for path in parts),
        trained_rows=earlier.trained_rows if earlier else output.rows,
        cells=int(index.nlist),
        probes=probes,
        recall=recall,
    )
    _write(output, index, record)
    return record


def search_index(
    output: Output, queries: Vectors, count: int, choices: Sequence[Choice] = ()
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """As `search.nearest`, with the index. Raises OutputRefused without an index, or with one that is stale."""
    need_search("search --index", "faiss")
    record = _load(output)
    if record is None:
        raise OutputRefused(f"{output.uri} has no index: run nightshift index {output.uri}, or leave out --index")
    if record.space != space_of(output).id or _gone(output, record):
        raise OutputRefused(
            f"the index of {output.uri} is of other rows than the output has now: run nightshift index {output.uri}"
        )
    index = _read(output, record)
    index.nprobe = record.probes
    best = Best(len(queries), count)
    _merge(best, *_find(output, index, record.parts, queries, count, as_mask(choices, output)))
    if lacking := _lacking(output, record):
        similarities, positions = nearest(output, queries, count, choices, lacking)
        _merge(best, similarities, positions)
    return best.similarities, best.positions


def _merge(best: Best, similarities: NDArray[np.float32], positions: NDArray[np.int64]) -> None:
    """Add hits of each query. Places without a hit have the position -1."""
    for number, (values, rows) in enumerate(zip(similarities, positions, strict=True)):
        best.merge_exact(number, values[rows >= 0], rows[rows >= 0])


def _find(
    output: Output,
    index: Any,
    parts: Sequence[str],
    queries: Vectors,
    count: int,
    mask: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Similarities and positions of the rows that the index finds, both [N, count]; positions of -1 for none."""
    firsts = _firsts(output)
    first_of = np.array([firsts[path] for path in parts], np.int64)
    more: dict[str, Any] = {}
    if mask is not None:
        numbers = {path: number for number, path in enumerate(parts)}
        ids = [
            np.flatnonzero(mask[firsts[part.path] :][: part.rows]) + (numbers[part.path] << PART_BITS)
            for part in output.parts
            if part.path in numbers
        ]
        chosen = np.concatenate([np.empty(0, np.int64), *ids])
        if not len(chosen):
            return np.full((len(queries), 1), -np.inf, np.float32), np.full((len(queries), 1), -1, np.int64)
        more["params"] = _only(chosen, _probes_for(index, len(chosen)))
    similarities, found = index.search(queries, count, **more)
    number, row = found >> PART_BITS, found & ((1 << PART_BITS) - 1)
    positions = np.where(found >= 0, first_of[np.maximum(number, 0)] + row, -1)
    return np.clip(similarities, -1, 1), positions


def _only(ids: NDArray[np.int64], probes: int) -> Any:
    """FAISS's parameters of a search among some ids."""
    import faiss

    made: Any = faiss.SearchParametersIVF
    return made(sel=faiss.IDSelectorBatch(ids), nprobe=probes)


def _probes_for(index: Any, chosen: int) -> int:
    """More cells if few rows are chosen: near ones may be in any of them."""
    return int(min(index.nlist, math.ceil(index.nprobe * index.ntotal / max(chosen, 1))))


def _trained(output: Output, on_step: OnStep) -> Any:
    import faiss

    on_step("finding cells", 0, 0)
    dim, cells = dim_of(output), max(1, min(round(4 * math.sqrt(output.rows)), output.rows // 39))
    sample = sample_vectors(output, min(MAX_SAMPLE, SAMPLE_PER_CELL * cells))
    if not len(sample):
        raise InputRefused(f"{output.uri} has no rows: there is nothing to index")
    index: Any = faiss.index_factory(dim, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(sample)
    return index


def _add(output: Output, index: Any, parts: Sequence[str], indexed: Sequence[str], on_step: OnStep) -> None:
    """Add the parts that are not indexed yet. Their numbers are their places in `parts`."""
    numbers, firsts, dim = {path: number for number, path in enumerate(parts)}, _firsts(output), dim_of(output)
    for part in output.parts:
        if part.path in set(indexed):
            continue
        for block in output.blocks([COLUMN], parts=[part]):
            ids = (block.positions - firsts[part.path]) + (numbers[part.path] << PART_BITS)
            index.add_with_ids(scaled(view_vectors(block.table[COLUMN], dim)), ids)
            on_step("adding vectors", int(block.positions[-1]) + 1, output.rows)


def _tuned(output: Output, index: Any, parts: Sequence[str], on_step: OnStep) -> tuple[int, float]:
    """The least number of cells per query with a recall of TARGET_RECALL, and the recall."""
    queries = sample_vectors(output, RECALL_QUERIES)[:RECALL_QUERIES]
    _, truth = nearest(
        output, queries, RECALL_COUNT, on_step=lambda _, done, total: on_step("measuring recall", done, total)
    )
    probes = 1
    while True:
        index.nprobe = probes
        _, candidates = _find(output, index, parts, queries, RECALL_COUNT)
        shares = [np.isin(row[row >= 0], found).mean() for row, found in zip(truth, candidates, strict=True)]
        if (recall := float(np.mean(shares))) >= TARGET_RECALL or probes >= index.nlist:
            return probes, recall
        probes = min(2 * probes, int(index.nlist))


def _firsts(output: Output) -> dict[str, int]:
    starts = np.concatenate([[0], np.cumsum([part.rows for part in output.parts])])
    return {part.path: int(start) for part, start in zip(output.parts, starts[:-1], strict=True)}


def _gone(output: Output, record: IndexRecord) -> bool:
    """Whether the output lacks a part that is indexed, or has other rows in it."""
    rows = {part.path: part.rows for part in output.parts}
    return any(rows.get(path) != count for path, count in zip(record.parts, record.rows, strict=True))


def _lacking(output: Output, record: IndexRecord) -> list[Part]:
    return [part for part in output.parts if part.path not in set(record.parts)]


def _load(output: Output) -> IndexRecord | None:
    try:
        record = access.read_record(_uri(output, RECORD))
    except FileNotFoundError:
        return None
    if record.pop("format", None) != FORMAT:
        raise OutputRefused(f"the index of {output.uri} is of another version: run nightshift index --overwrite")
    values: dict[str, Any] = {name: tuple(each) if isinstance(each, list) else each for name, each in record.items()}
    return IndexRecord(**values)


def _uri(output: Output, name: str) -> str:
    return uris.join(output.uri, f"{FOLDER}/{name}")


def _read(output: Output, record: IndexRecord) -> Any:
    import faiss

    try:
        data = np.frombuffer(access.read(_uri(output, record.file)), np.uint8)
        return faiss.deserialize_index(data)
    except (FileNotFoundError, RuntimeError) as error:
        raise OutputRefused(
            f"the index of {output.uri} is damaged: run nightshift index {output.uri} --overwrite"
        ) from error


def _write(output: Output, index: Any, record: IndexRecord) -> None:
    """Write the index, then its record, then remove earlier files: a search sees the old index or the new one."""
    import faiss

    data = faiss.serialize_index(index).tobytes()
    try:
        access.write(_uri(output, record.file), data)
        access.write(_uri(output, RECORD), record.to_json())
    except PermissionError as error:
        raise SettingRefused(f"{output.uri} cannot be written, so it can have no index: {error}") from error
    for info in list(access.list_objects(uris.join(output.uri, FOLDER))):
        if info.uri.rpartition("/")[2] not in (record.file, RECORD):
            access.delete(info.uri)
