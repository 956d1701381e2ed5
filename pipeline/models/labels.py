"""Read class names from text, JSON or CSV."""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from pipeline.errors import WeightsRefused, first_line
from pipeline.models.download import file_name
from pipeline.storage import access, uris

_ID_COLUMNS = ("id", "index", "idx", "label_id", "class_id")
_LABEL_COLUMNS = ("label", "name", "class_name", "label_name", "class", "category", "description")


def read_labels(uri: str, num_classes: int) -> tuple[str, ...]:
    """Read num_classes class names, in the order of their ids 0, 1, ….

    Text: one name per line. JSON: a list, {"0": "name"}, {"0": ["n01440764", "name"]} or {"name": 0}, each also under
    the key id2label. CSV or TSV with a header: a column of ids and one of names, or only a column of names.
    Raises WeightsRefused if the file cannot be read or has another number of names.
    """
    try:
        text = access.read(uris.normalize(uri)).decode("utf-8-sig")
        if text.lstrip()[:1] in ("[", "{"):
            names = _labels_of_json(json.loads(text))
        elif file_name(uri).endswith((".csv", ".tsv")):
            names = _labels_of_csv(text, "\t" if uri.endswith(".tsv") else ",")
        else:
            names = [line.strip() for line in text.rstrip().splitlines()]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise WeightsRefused(f"--labels {uris.redact(uri)} cannot be read: {first_line(error)}") from error
    if len(names) != num_classes:
        raise WeightsRefused(
            f"--labels {uris.redact(uri)} has {len(names)} class names, but the network has {num_classes} classes: "
            "use the list that the weights were trained with"
        )
    return tuple(names)


def _labels_of_json(content: Any) -> list[str]:
    content = content.get("id2label", content) if isinstance(content, dict) else content
    if isinstance(content, list):
        return [str(name) for name in content]
    if all(isinstance(value, int) for value in content.values()):
        return _in_order({index: name for name, index in content.items()}, len(content))
    return _in_order({int(k): v[-1] if isinstance(v, list) else v for k, v in content.items()}, len(content))


def _labels_of_csv(text: str, delimiter: str) -> list[str]:
    rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    columns = {name.strip().lower(): name for name in rows[0]}
    if len(columns) == 1:
        return [next(iter(row.values())).strip() for row in rows]
    ids = next((columns[name] for name in _ID_COLUMNS if name in columns), None)
    names = next((columns[name] for name in _LABEL_COLUMNS if name in columns), None)
    if ids is None or names is None or ids == names:
        raise ValueError(f"its columns are {', '.join(columns)}; name them id and label")
    return _in_order({int(row[ids]): row[names].strip() for row in rows}, len(rows))


def _in_order(names: Mapping[int, Any], count: int) -> list[str]:
    if sorted(names) != list(range(count)):
        raise ValueError(f"the ids must be 0 to {count - 1}, each once")
    return [str(names[index]) for index in range(count)]
