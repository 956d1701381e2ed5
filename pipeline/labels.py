"""A file → class names."""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.errors import WeightsRefused, first_line
from pipeline.fetch import file_name

_ID_COLUMNS = ("id", "index", "idx", "label_id", "class_id")
_LABEL_COLUMNS = ("label", "name", "class_name", "label_name", "class", "category", "description")


def read_labels(uri: str, num_classes: int) -> tuple[str, ...]:
    """Class names in order, from a text file of one a line, JSON, or CSV with a header.

    JSON: a list; {"0": "name"}, {"0": ["n01440764", "name"]}, {"name": 0}, or any of them under id2label. CSV: columns
    of ids and labels, or one column alone. Raises WeightsRefused unless there are num_classes of them.
    """
    try:
        text = storage.read(storage.normalize(uri)).decode("utf-8-sig")
        if text.lstrip()[:1] in ("[", "{"):
            names = _labels_of_json(json.loads(text))
        elif file_name(uri).endswith((".csv", ".tsv")):
            names = _labels_of_csv(text, "\t" if uri.endswith(".tsv") else ",")
        else:
            names = [line.strip() for line in text.rstrip().splitlines()]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise WeightsRefused(f"--labels {storage.redact(uri)} cannot be read: {first_line(error)}") from error
    if len(names) != num_classes:
        raise WeightsRefused(
            f"--labels {storage.redact(uri)} names {len(names)} classes and the network has {num_classes}: "
            "bring the list that the weights were trained with"
        )
    return tuple(names)


def _labels_of_json(found: Any) -> list[str]:
    found = found.get("id2label", found) if isinstance(found, dict) else found
    if isinstance(found, list):
        return [str(name) for name in found]
    if all(isinstance(value, int) for value in found.values()):
        return _in_order({index: name for name, index in found.items()}, len(found))
    return _in_order({int(k): v[-1] if isinstance(v, list) else v for k, v in found.items()}, len(found))


def _labels_of_csv(text: str, delimiter: str) -> list[str]:
    rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    columns = {name.strip().lower(): name for name in rows[0]}
    if len(columns) == 1:
        return [next(iter(row.values())).strip() for row in rows]
    ids = next((columns[name] for name in _ID_COLUMNS if name in columns), None)
    names = next((columns[name] for name in _LABEL_COLUMNS if name in columns), None)
    if ids is None or names is None or ids == names:
        raise ValueError(f"its columns are {', '.join(columns)}; call them id and label")
    return _in_order({int(row[ids]): row[names].strip() for row in rows}, len(rows))


def _in_order(names: Mapping[int, Any], count: int) -> list[str]:
    if sorted(names) != list(range(count)):
        raise ValueError(f"its ids must be 0 to {count - 1}, each once")
    return [str(names[index]) for index in range(count)]
