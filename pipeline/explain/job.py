"""`nightshift explain`: why images of an output have their class, as pictures."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputRefused, SettingRefused
from pipeline.explore.table import Output, ends_of, open_output
from pipeline.explore.target import check_target
from pipeline.storage import uris

if TYPE_CHECKING:
    from pipeline.explain.restore import Restored
    from pipeline.explain.saliency import Explainer

MAX_IDS = 1000
MAX_SHOWN = 5
SAME_SCORE = 0.02
"""Scores of one image that differ by less are the same, but for rounding on other hardware."""
NATURAL_BANDS = (("B4", "B3", "B2"), ("B04", "B03", "B02"), ("red", "green", "blue"))


@dataclass(frozen=True)
class Explanation:
    """An explained image.

    file: the PNG. label, score: of the explained class, as the network gives it here. row_label, row_score: of the
    output's row, or None. note: how the network's class here differs from the row's, or "".
    """

    image_id: str
    file: Path
    label: str
    score: float
    row_label: str | None
    row_score: float | None
    note: str = ""

    def describe(self) -> str:
        """One line: the image, the class and its score."""
        return f"{self.image_id}: {self.label} {self.score:.3f}" + (f"; {self.note}" if self.note else "")


def explain(
    output: str,
    image_ids: Sequence[str],
    to: Path,
    *,
    label: str | None = None,
    head: str | None = None,
    weights: str | None = None,
    overwrite: bool = False,
) -> Iterator[Explanation]:
    """Explain images of an output by Grad-CAM, and write one PNG for each into a folder.

    image_ids: of the output, or the ends of them from a `/` or `#` on. label: name or number of the class to explain;
    None for the class that the row has. head: the file of the head that gave the classes. weights: the file of weights
    if it was moved since. Raises SettingRefused, InputRefused, OutputRefused and WeightsRefused, before any picture is
    written if the settings are at fault.
    """
    if not image_ids:
        raise SettingRefused("--id is missing: name the images to explain")
    if len(image_ids) > MAX_IDS:
        raise SettingRefused(f"--id was given {len(image_ids)} times: it can be at most {MAX_IDS}")
    opened = open_output(output)
    prefix = _prefix(opened, head)
    rows = _rows(opened, image_ids, prefix)
    _check_classes(opened, rows, label, head)
    files = _files(to, rows, overwrite)
    from pipeline.explain.restore import restore  # imports torch
    from pipeline.explain.saliency import Explainer

    restored = restore(opened, [head] if head else [], weights)
    names = _names(restored)
    class_id = None if label is None else _class_id(opened, prefix, label, names)
    explainer = Explainer(restored.predictor.spec, _head(restored))
    to.mkdir(parents=True, exist_ok=True)
    return (_explain(restored, explainer, names, row, file, class_id) for row, file in zip(rows, files, strict=True))


@dataclass(frozen=True)
class _Row:
    """A row of the output. label, label_id, score: None if it has no class."""

    image_id: str
    shard: int
    row: int
    label: str | None
    label_id: int | None
    score: float | None


def _prefix(output: Output, head: str | None) -> str:
    """What the names of the columns of the classes begin with. Raises SettingRefused if a head is needed."""
    heads = output.settings.get("heads") or {}
    if heads and not head:
        raise SettingRefused(
            f"the classes of {output.uri} are those of the head {' or '.join(heads)}: give its file with --head"
        )
    name = uris.redact(head).rpartition("/")[2].removesuffix(".safetensors") if head else ""
    if len(heads) > 1 and name not in heads:
        raise SettingRefused(f"--head {name} is none of the heads of {output.uri}: {', '.join(heads)}")
    return f"{name}_" if len(heads) > 1 else ""


def _rows(output: Output, image_ids: Sequence[str], prefix: str) -> list[_Row]:
    """The rows of some images, in the order of `image_ids`. Raises InputRefused for unknown and ambiguous ones."""
    output.require(["image_id", "shard", "row"])
    classes = [name for name in ("label", "label_id", "score") if f"{prefix}{name}" in output.columns]
    has_classes = len(classes) == 3 and not (prefix == "" and "heads" not in output.settings and _is_embedder(output))
    columns = ["image_id", "shard", "row", *([f"{prefix}{name}" for name in classes] if has_classes else [])]
    found: dict[str, list[_Row]] = {name: [] for name in image_ids}
    for batch in output.batches(columns):
        for place, image_id in enumerate(batch.column(0).to_pylist()):
            for name in found:
                if image_id.endswith(name) and _is_called(image_id, name):
                    values = [column[place].as_py() for column in batch.columns[1:]]
                    found[name].append(_Row(image_id, *values, *([None] * (5 - len(values)))))
    return [_only(output, name, [row for row in rows if row.image_id == name] or rows) for name, rows in found.items()]


def _is_embedder(output: Output) -> bool:
    return output.settings.get("predictor") == "Embedder"


def _is_called(image_id: str, name: str) -> bool:
    return image_id == name or image_id.endswith(ends_of(name))


def _only(output: Output, name: str, rows: list[_Row]) -> _Row:
    if len(rows) == 1:
        return rows[0]
    if rows:
        shown = ", ".join(row.image_id for row in rows[:MAX_SHOWN])
        raise InputRefused(f"--id {name} fits {len(rows)} images: {shown}; write more of the path")
    for batch in output.errors(["image_id", "error_type", "message"]):
        for error in batch.to_pylist():
            if _is_called(error["image_id"], name):
                raise InputRefused(f"--id {name} has no class: it is an error row, {error['error_type']}")
    raise InputRefused(f"--id {name} is no image of {output.uri}: write its image_id, or the part after a / or #")


def _check_classes(output: Output, rows: Sequence[_Row], label: str | None, head: str | None) -> None:
    if label is None and head is None and any(row.label_id is None for row in rows):
        raise SettingRefused(
            f"{output.uri} has no classes: name the one to explain with --label, or a head with --head"
        )


def _files(to: Path, rows: Sequence[_Row], overwrite: bool) -> list[Path]:
    """One file per image, named by the image; with a few digits of its image_id's hash if two have one name."""
    if "://" in str(to):
        raise SettingRefused(f"--to {to} is a URI: give a local folder, and copy it to its place afterwards")
    if to.exists() and not to.is_dir():
        raise SettingRefused(f"--to {to} is a file: name a folder")
    stems = [re.sub(r"[^\w.\-]+", "_", re.split("[/#]", row.image_id)[-1])[:80] for row in rows]
    files = []
    for row, stem in zip(rows, stems, strict=True):
        digits = f"-{hashlib.sha256(row.image_id.encode()).hexdigest()[:8]}" if stems.count(stem) > 1 else ""
        files.append(to / f"{stem}{digits}.png")
        if to.is_dir():
            check_target(files[-1], "--to", (".png",), overwrite)
    return files


def _head(restored: "Restored") -> Any:
    """The head of the predictor, or None."""
    heads = restored.predictor.heads
    return heads[0].head if heads else None


def _names(restored: "Restored") -> tuple[str, ...]:
    head = _head(restored)
    return tuple(head.classes) if head else restored.predictor.spec.labels


def _class_id(output: Output, prefix: str, label: str, names: Sequence[str]) -> int:
    """The number of a class by its name, also by that of the run's `--labels`, or number. Raises SettingRefused."""
    if {f"{prefix}label", f"{prefix}label_id"} <= set(output.columns):
        for batch in output.batches([f"{prefix}label_id"], equal={f"{prefix}label": label}):
            if len(batch):
                return int(batch.column(0)[0].as_py())
    if label in names:
        return list(names).index(label)
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    shown = ", ".join(names[:MAX_SHOWN]) + (", …" if len(names) > MAX_SHOWN else "")
    raise SettingRefused(
        f"--label {label} is no class of the network: choose one of {shown}, or a number from 0 to {len(names) - 1}"
    )


def _explain(
    restored: "Restored",
    explainer: "Explainer",
    names: Sequence[str],
    row: _Row,
    file: Path,
    wanted: int | None,
) -> Explanation:
    from pipeline.explain.picture import draw

    pixels = restored.pixels(row.shard, row.row, row.image_id)
    columns: Mapping[str, Any] = restored.predictor.predict(pixels)
    here, best_score = int(columns["label_id"][0]), float(columns["score"][0])
    class_id = next(each for each in (wanted, row.label_id, here) if each is not None)
    score = best_score if class_id == here else explainer.score(pixels, class_id)
    name = row.label if class_id == row.label_id and row.label is not None else names[class_id]
    note = _note(row, here, best_score, names)
    saliency = explainer.saliency(pixels, class_id)
    if not saliency.any():
        note = "; ".join(filter(None, [note, "no place of the picture speaks for this class"]))
    spec = restored.predictor.spec
    lines = (row.image_id, f"{spec.model}, Grad-CAM at {explainer.layer_name}, {spec.transform.crop} × "
             f"{spec.transform.crop} pixels as the network saw them", *([note] if note else []))  # fmt: skip
    draw(file, pixels[0].cpu().numpy(), saliency, f"{name}  {score:.3f}", lines, _bands(restored))
    return Explanation(row.image_id, file, name, score, row.label, row.score, note)


def _note(row: _Row, here: int, score: float, names: Sequence[str]) -> str:
    """How the class here differs from that of the row, "" if it does not."""
    if row.label_id is None or row.score is None:
        return ""
    if here != row.label_id:
        return (
            f"the network says {names[here]} {score:.3f} here, and the row says {row.label} {row.score:.3f}: the image "
            "or the hardware is another one"
        )
    if abs(score - row.score) > SAME_SCORE:
        return f"the score is {score:.3f} here, and {row.score:.3f} in the row"
    return ""


def _bands(restored: "Restored") -> tuple[int, ...]:
    """The bands to show as red, green and blue: by their names if the network's specification has them."""
    specification = restored.predictor.specification
    names = list(specification.band_names) if specification else []
    for natural in NATURAL_BANDS:
        if set(natural) <= set(names):
            return tuple(names.index(name) for name in natural)
    return 0, 1, 2
