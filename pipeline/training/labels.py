"""Labels of images → the labelled rows of an output.

They come from a file of names and classes, a map, the images' folders, or a column of the output.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline.errors import InputRefused, SettingRefused, message_line
from pipeline.explore.table import Output
from pipeline.storage import access, uris
from pipeline.storage.parquet import open_parquet
from pipeline.training import places

FOLDER, COLUMN = "folder", "column:"
SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".parquet")
DELIMITERS = ",;\t|"
MAX_SHOWN = 5
BACKGROUND, MIN_BACKGROUND = 20, 200
"""Random images without a label per image of a concept, and the least number of them."""
_SEPARATOR = re.compile("[/#]")

Classes = tuple[str, ...]
"""The classes of one image: one, or with `--multi-label` any number."""


class Table(Protocol):
    """The images that labels are for: an output, or decoded images."""

    @property
    def uri(self) -> str:
        """Name in messages."""

    @property
    def rows(self) -> int:
        """Number of images."""

    def require(self, columns: Sequence[str]) -> None:
        """Refuse the images if they lack one of these columns."""

    def batches(self, columns: Sequence[str], /) -> Iterator[pa.RecordBatch]:
        """The rows of all images, in order."""

    def errors(self, columns: Sequence[str], /) -> Iterator[pa.RecordBatch]:
        """The images that could not be read."""


@dataclass(frozen=True)
class Labels:
    """The labelled images of an output, in the order of its rows.

    rows: their positions among the output's rows, in ascending order. image_ids, classes: of each.
    unknown: names of the file that are no image of the output. unreadable: those of them that are in `_errors/`.
    unlabelled: number of images without a class. background: rows of random images that count as others of a concept,
    and that no label names. ambiguous: images in places of several classes, which therefore count as without label.
    """

    rows: tuple[int, ...]
    image_ids: tuple[str, ...]
    classes: tuple[Classes, ...]
    unknown: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    unlabelled: int = 0
    background: frozenset[int] = frozenset()
    ambiguous: tuple[str, ...] = ()

    @property
    def names(self) -> Classes:
        """The names of all classes, sorted."""
        return tuple(sorted({name for each in self.classes for name in each}))

    def without(self, image_ids: Iterable[str]) -> "Labels":
        """Without some images."""
        left_out = set(image_ids)
        kept = [each for each in zip(self.rows, self.image_ids, self.classes, strict=True) if each[1] not in left_out]
        rows, names, classes = zip(*kept, strict=True) if kept else ((), (), ())
        return replace(self, rows=rows, image_ids=names, classes=classes)

    def with_classes(self) -> "Labels":
        """Without the images that have no class."""
        kept = [each for each in zip(self.rows, self.image_ids, self.classes, strict=True) if each[2]]
        rows, image_ids, classes = zip(*kept, strict=True) if kept else ((), (), ())
        dropped = len(self.rows) - len(rows)
        return replace(self, rows=rows, image_ids=image_ids, classes=classes, unlabelled=self.unlabelled + dropped)


def find(
    output: Table,
    labels: str,
    *,
    name_column: str = "image",
    label_column: str = "label",
    multi_label: bool = False,
) -> Labels:
    """Find the labelled images of an output.

    labels: a CSV, JSON or Parquet file with the columns `name_column` and `label_column`; a GeoJSON file of points and
    polygons with the property `label_column`; `folder`, the name of the folder that an image is in; or `column:NAME`, a
    column of the output.
    A file names an image by its image_id or by the end of it, from a `/` or `#` on. Raises InputRefused if a name fits
    several images, if an image has two classes without `multi_label`, or if no image has a label. An image in places of
    two classes has none, without `multi_label`.
    """
    if labels == FOLDER:
        found = _of_folders(output)
    elif labels.startswith(COLUMN):
        found = _of_column(output, labels.removeprefix(COLUMN))
    elif places.is_map(labels) and isinstance(output, Output):
        found = _of_map(output, labels, label_column, multi_label)
    else:
        found = _of_file(output, labels, read_file(labels, name_column, label_column))
    found = found if multi_label else found.with_classes()
    _check(found, labels, output.uri, multi_label)
    return found


def find_concept(
    output: Table, positives: str, negatives: str | None, *, name_column: str = "image", seed: int = 0
) -> Labels:
    """Labels of one concept: the images that a file names, and images of which most are others.

    positives, negatives: files of names, one per line, or with the column `name_column`. The other images are those of
    `negatives` and BACKGROUND random ones without a label per positive. The classes are the file's name and `not` with
    that name. Raises InputRefused as `find` does.
    """
    name = concept_name(positives)
    classes = dict.fromkeys(_names(positives, "--positives", name_column), (name,))
    for image in _names(negatives, "--negatives", name_column) if negatives else ():
        if image in classes:
            raise InputRefused(f"{image} is in --positives and in --negatives: leave it in one of them")
        classes[image] = (f"not {name}",)
    found = _of_file(output, positives, classes)
    _check(found, positives, output.uri, multi_label=False)
    named = set(found.rows)
    count = min(output.rows - len(named), max(MIN_BACKGROUND, BACKGROUND * len(named)))
    others = np.setdiff1d(np.arange(output.rows), found.rows)
    background = set(np.random.default_rng(seed).choice(others, count, replace=False).tolist())
    by_row = dict(zip(found.rows, found.classes, strict=True)) | dict.fromkeys(background, (f"not {name}",))
    rows = sorted(by_row)
    image_ids = tuple(image_id for row, image_id in enumerate(_column(output, "image_id")) if row in by_row)
    classes_of_rows = tuple(by_row[row] for row in rows)
    return replace(
        found, rows=tuple(rows), image_ids=image_ids, classes=classes_of_rows, background=frozenset(background)
    )


def concept_name(positives: str) -> str:
    """The file's name without its suffix."""
    return uris.redact(positives).rstrip("/").rpartition("/")[2].partition(".")[0]


def _names(uri: str, flag: str, name_column: str) -> list[str]:
    if not uri.lower().endswith(".txt"):
        return list(read_file(uri, name_column, name_column))
    try:
        lines = access.read(uris.normalize(uri)).decode("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise InputRefused(f"{flag} {uris.redact(uri)} does not exist") from error
    except (OSError, ValueError) as error:
        raise InputRefused(f"{flag} {uris.redact(uri)} cannot be read: {message_line(error)}") from error
    return [line.strip().removeprefix("./") for line in lines if line.strip()]


def read_file(uri: str, name_column: str = "image", label_column: str = "label") -> dict[str, Classes]:
    """Read a file of labels: name → its classes, in the order of the file. A name may occur several times.

    JSON: a list of objects, one object per line, or one object of names and classes. Raises InputRefused.
    """
    name = uris.redact(uri)
    if places.is_map(uri):
        raise SettingRefused(
            f"--labels {name} labels places on a map, which only `nightshift fit` reads: name the images in a CSV file"
        )
    if not uri.lower().endswith(SUFFIXES):
        raise SettingRefused(
            f"--labels is {name!r}: it must be a file that ends in {', '.join((*SUFFIXES, places.SUFFIX))}, or "
            f"{FOLDER}, or {COLUMN}NAME"
        )
    labels: dict[str, Classes] = {}
    try:
        for number, row in enumerate(_rows(uri, name_column, label_column), start=1):
            image, classes = _entry(name, number, row, name_column, label_column)
            labels[image] = tuple(dict.fromkeys([*labels.get(image, ()), *classes]))
    except FileNotFoundError as error:
        raise InputRefused(f"--labels {name} does not exist") from error
    except (OSError, ValueError, RecursionError, csv.Error, pa.ArrowException) as error:
        raise InputRefused(f"--labels {name} cannot be read: {message_line(error)}") from error
    if not labels:
        raise InputRefused(f"--labels {name} has no entry")
    return labels


def _entry(name: str, number: int, row: Mapping[str, Any], name_column: str, label_column: str) -> tuple[str, Classes]:
    """The image and the classes of one entry. Raises InputRefused."""
    for column, flag in ((name_column, "--name-column"), (label_column, "--label-column")):
        if column not in row:
            raise InputRefused(
                f"--labels {name}: entry {number} has no {column!r}, only {', '.join(map(str, row))}; name the "
                f"column with {flag}"
            )
    try:
        image, classes = _text(row[name_column]).removeprefix("./"), _classes(row[label_column])
    except UnicodeError as error:
        raise InputRefused(f"--labels {name}: entry {number} is no valid text: {message_line(error)}") from error
    if not image:
        raise InputRefused(f"--labels {name}: entry {number} has no name of an image in {name_column!r}")
    return image, classes


def _rows(uri: str, name_column: str, label_column: str) -> Iterator[Mapping[str, Any]]:
    """The entries of a file, by column."""
    if uri.lower().endswith(".parquet"):
        with access.open_read(uris.normalize(uri)) as file:
            for batch in open_parquet(file).iter_batches(use_threads=False):
                yield from batch.to_pylist()
        return
    text = access.read(uris.normalize(uri)).decode("utf-8-sig")
    if uri.lower().endswith(".jsonl"):
        content: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
    elif uri.lower().endswith(".json"):
        content = json.loads(text)
    else:
        header = text.partition("\n")[0]
        delimiter = max(DELIMITERS, key=header.count)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        names = reader.fieldnames or []
        if twice := next((name for name in (name_column, label_column) if names.count(name) > 1), None):
            raise ValueError(f"it has two columns {twice!r}")
        yield from reader
        return
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        raise ValueError(f"it is GeoJSON: rename it to end in {places.SUFFIX}")
    if isinstance(content, dict):
        content = [{name_column: name, label_column: value} for name, value in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError("it must be a list of objects, or one object of names and classes")
    yield from content


def _classes(value: Any) -> Classes:
    """The classes of a cell: text, a number, a list of these, or nothing."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(dict.fromkeys(text for text in map(_text, values) if text))


def _text(value: Any) -> str:
    """A value as text: 3.0 is "3", and None and NaN are "". Raises UnicodeError for what is not valid Unicode."""
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        return value.decode().strip()
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()
    text.encode()
    return text


def _of_file(output: Table, uri: str, labels: Mapping[str, Classes]) -> Labels:
    matches = _match(_column(output, "image_id"), labels)
    ambiguous = {name: found for name, found in matches.items() if len(found) > 1}
    if ambiguous:
        shown = "; ".join(
            f"{name} fits {' and '.join(image_id for _, image_id in found[:2])}"
            for name, found in list(ambiguous.items())[:MAX_SHOWN]
        )
        raise InputRefused(
            f"--labels {uris.redact(uri)}: {len(ambiguous)} names fit several images: {shown}; write more of their "
            "paths, or their image_id"
        )
    by_row: dict[int, tuple[str, Classes]] = {}
    for name in labels:
        for row, image_id in matches.get(name, ()):
            classes = by_row.get(row, ("", ()))[1]
            by_row[row] = image_id, tuple(dict.fromkeys([*classes, *labels[name]]))
    rows = sorted(by_row)
    unknown = tuple(name for name in labels if name not in matches)
    in_errors = (each for batch in output.errors(["image_id"]) for each in batch.column(0).to_pylist())
    unreadable = _match(in_errors, unknown) if unknown else {}
    return Labels(
        tuple(rows),
        tuple(by_row[row][0] for row in rows),
        tuple(by_row[row][1] for row in rows),
        unknown,
        tuple(name for name in unknown if name in unreadable),
    )


def matcher(names: Iterable[str]) -> Callable[[str], bool]:
    """A function that says whether one of some names fits an image_id. It is for one image, so not for unique names."""
    wanted = set(names)
    ends = {_SEPARATOR.split(name)[-1] for name in wanted}

    def fits(image_id: str) -> bool:
        is_near = image_id[_last_separator(image_id) + 1 :] in ends
        return is_near and any(suffix in wanted for suffix in _suffixes(image_id))

    return fits


def _of_map(output: Output, uri: str, label_column: str, multi_label: bool) -> Labels:
    """The images that points and polygons label. Features that label no image are the unknown names."""
    on_map = places.read_places(uri, label_column, _classes)
    labelled: list[tuple[int, str, Classes]] = []
    ambiguous: list[str] = []
    used: set[int] = set()
    for row, image_id, numbers in places.match(output, uri, on_map):
        used.update(numbers)
        classes = tuple(dict.fromkeys(name for number in numbers for name in on_map.classes[number]))
        if len(classes) > 1 and not multi_label:
            ambiguous.append(image_id)
        else:
            labelled.append((row, image_id, classes))
    if not labelled:
        reason = f"{len(ambiguous)} are in places of several classes" if ambiguous else "all images are elsewhere"
        raise InputRefused(f"--labels {uris.redact(uri)} labels no image of {output.uri}: {reason}")
    rows, image_ids, classes_of_rows = zip(*labelled, strict=True)
    unknown = tuple(name for number, name in enumerate(on_map.names) if number not in used)
    return Labels(rows, image_ids, classes_of_rows, unknown, ambiguous=tuple(ambiguous))


def _match(image_ids: Iterable[str], names: Iterable[str]) -> dict[str, list[tuple[int, str]]]:
    """Name → the rows that it fits, with their image_ids. A whole image_id fits only its own image."""
    wanted = set(names)
    fits = matcher(wanted)
    matches: dict[str, list[tuple[int, str]]] = {}
    for row, image_id in enumerate(image_ids):
        if not fits(image_id):
            continue
        for suffix in _suffixes(image_id):
            if suffix in wanted:
                matches.setdefault(suffix, []).append((row, image_id))
    return {name: [match for match in found if match[1] == name] or found for name, found in matches.items()}


def _last_separator(image_id: str) -> int:
    return max(image_id.rfind("/"), image_id.rfind("#"))


def _suffixes(image_id: str) -> Iterator[str]:
    """The image_id, and its ends from each `/` or `#` on."""
    yield image_id
    for separator in _SEPARATOR.finditer(image_id):
        yield image_id[separator.end() :]


def _of_folders(output: Table) -> Labels:
    """The class of an image is the name of its folder, in the archive file that holds it or in the file system."""
    return _of_all((image_id, _folder(image_id)) for image_id in _column(output, "image_id"))


def _folder(image_id: str) -> str:
    path = image_id.partition("#")[2] or image_id
    return path.rpartition("/")[0].rpartition("/")[2]


def _of_column(output: Table, column: str) -> Labels:
    output.require([column])
    batches = output.batches(["image_id", column])
    pairs = (pair for batch in batches for pair in zip(*(values.to_pylist() for values in batch.columns), strict=True))
    return _of_all(pairs)


def _of_all(pairs: Iterable[tuple[str, Any]]) -> Labels:
    """Labels of all rows that have one."""
    labelled = [(row, image_id, _classes(value)) for row, (image_id, value) in enumerate(pairs)]
    rows, image_ids, classes = zip(*labelled, strict=True) if labelled else ((), (), ())
    return Labels(rows, image_ids, classes).with_classes()


def _column(output: Table, name: str) -> Iterator[str]:
    return (value for batch in output.batches([name]) for value in batch.column(0).to_pylist())


def _check(labels: Labels, given: str, output: str, multi_label: bool) -> None:
    given = uris.redact(given)
    if not labels.rows:
        shown = f": it knows no {', '.join(labels.unknown[:MAX_SHOWN])}" if labels.unknown else ""
        raise InputRefused(
            f"--labels {given} labels no image of {output}{shown}; names must be the image_id of an image or its end, "
            "such as the file's name"
        )
    if multi_label:
        return
    for image_id, classes in zip(labels.image_ids, labels.classes, strict=True):
        if len(classes) > 1:
            raise InputRefused(
                f"--labels {given}: {image_id} has {len(classes)} classes, {' and '.join(classes[:MAX_SHOWN])}: keep "
                "one of them, or use --multi-label"
            )
