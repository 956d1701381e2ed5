"""The pairs that earlier calls of `nightshift duplicates` found, in OUTPUT/_duplicates/.

A pair is two places, each a part and a row in it, because positions in an output change with an `--update`. Parts are
never changed: what is replaced becomes a part of another name.
"""

import errno
import io
import json
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.explore.pairs import Pairs
from pipeline.explore.table import Output
from pipeline.explore.vectors import space_of
from pipeline.storage import access, uris

FOLDER, RECORD = "_duplicates", "known.json"
FORMAT = 1
ARRAYS = ("first_part", "first_row", "second_part", "second_row", "similarity")


@dataclass(frozen=True)
class KnownPairs:
    """All pairs among the rows of some parts whose cosine is at least a threshold.

    file: name of the file with the pairs. threshold: its fields; `value` is the cosine. parts: path → number of rows,
    in the order of the numbers in `places`. places: the arrays of ARRAYS.
    """

    file: str
    threshold: Mapping[str, Any]
    parts: Mapping[str, int]
    places: Mapping[str, NDArray[Any]] = field(repr=False)

    def unchanged(self, output: Output) -> frozenset[str]:
        """Paths of the known parts that the output still has."""
        return frozenset(part.path for part in output.parts if self.parts.get(part.path) == part.rows)

    def pairs(self, output: Output) -> Pairs:
        """The pairs of unchanged parts, with positions of the output."""
        unchanged, firsts = self.unchanged(output), first_positions(output)
        first_of = np.array([firsts[path] if path in unchanged else -1 for path in self.parts], np.int64)
        starts = first_of[self.places["first_part"]], first_of[self.places["second_part"]]
        is_here = (starts[0] >= 0) & (starts[1] >= 0)
        a, b = (
            (start + self.places[name])[is_here]
            for start, name in zip(starts, ("first_row", "second_row"), strict=True)
        )
        return Pairs(np.minimum(a, b), np.maximum(a, b), self.places["similarity"][is_here])


def first_positions(output: Output) -> dict[str, int]:
    """Position of the first row of each part."""
    starts = np.concatenate([[0], np.cumsum([part.rows for part in output.parts])])
    return {part.path: int(start) for part, start in zip(output.parts, starts[:-1], strict=True)}


def load(output: Output) -> KnownPairs | None:
    """The known pairs of an output; None if there are none that can be used, such as those of another space."""
    try:
        record = json.loads(access.read(_uri(output, RECORD)))
        if record["format"] != FORMAT or record["space"] != space_of(output).id:
            return None
        with np.load(io.BytesIO(access.read(_uri(output, record["file"])))) as stored:
            places = {name: stored[name] for name in ARRAYS}
        return KnownPairs(record["file"], record["threshold"], dict(record["parts"]), places)
    except (FileNotFoundError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def save(output: Output, threshold: Mapping[str, Any], pairs: Pairs) -> None:
    """Replace the known pairs of an output. Does nothing if it is read-only: the next call then compares all rows."""
    firsts = np.array([*first_positions(output).values()], np.int64)
    places: dict[str, NDArray[Any]] = {"similarity": pairs.similarity}
    for name, positions in (("first", pairs.first), ("second", pairs.second)):
        part = np.searchsorted(firsts, positions, side="right") - 1
        places |= {f"{name}_part": part.astype(np.int32), f"{name}_row": positions - firsts[part]}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **places)  # type: ignore[arg-type]
    file = f"known-{uuid.uuid4().hex[:12]}.npz"
    record = {
        "format": FORMAT,
        "space": space_of(output).id,
        "file": file,
        "threshold": dict(threshold),
        "parts": [(part.path, part.rows) for part in output.parts],
    }
    try:
        access.write(_uri(output, file), buffer.getvalue())
        access.write(_uri(output, RECORD), json.dumps(record, indent=1).encode())
    except OSError as error:
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            return
        raise
    for info in list(access.list_objects(uris.join(output.uri, FOLDER))):
        if (name := info.uri.rpartition("/")[2]).startswith("known-") and name != file:
            access.delete(info.uri)


def _uri(output: Output, name: str) -> str:
    return uris.join(output.uri, f"{FOLDER}/{name}")
