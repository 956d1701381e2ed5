"""The page of an evaluation: every name is escaped, and it needs no other file."""

import io
import re
from html.parser import HTMLParser

from PIL import Image

from pipeline.training import page
from pipeline.training.evaluate import ClassResult, Evaluation, Example

EVIL = "<script>alert(1)</script>&\"'"


def evaluation(classes: int = 3) -> Evaluation:
    names = [EVIL, *(f"class {number}" for number in range(1, classes))]
    confusion = tuple(tuple(9 if a == b else a * b % 4 for b in range(classes)) for a in range(classes))
    example = Example(f"/photos/{EVIL}.jpg", EVIL, "class 1", 0.97)
    return Evaluation(
        how="5-fold cross-validation", images=30, accuracy=0.9, balanced_accuracy=0.8, macro_f1=0.7, baseline=EVIL,
        baseline_accuracy=0.4, classes=tuple(ClassResult(name, 10, 0.9, 0.8, 0.85, 0.9) for name in names),
        confusion=confusion, ece_before=0.1, ece_after=0.02, curve=((5, 0.5, 0.4), (10, 0.8, 0.7)),
        mistakes=(example,), doubtful=(example,), warnings=(f"{EVIL} has 3 labels",),
    )  # fmt: skip


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_names_are_escaped_and_nothing_is_loaded() -> None:
    made = evaluation()
    text = page.html(f"head: {EVIL}", EVIL, made, 1.3, {made.mistakes[0].image_id: jpeg()})
    tags = Tags()
    tags.feed(text)
    assert "script" not in tags.names
    assert tags.text.count(EVIL) >= 8
    assert len(tags.links) == 2, "the picture, in both groups"
    assert all(link.startswith("data:image/jpeg;base64,") for link in tags.links)
    assert not re.search(r"https?://", text)


def test_a_picture_that_cannot_be_read_leaves_its_place() -> None:
    tags = Tags()
    tags.feed(page.html("t", "s", evaluation(), 1.0, {}))
    assert tags.names.count("img") == 0
    assert tags.names.count("figure") == 2


def test_of_many_classes_the_matrix_has_the_worst() -> None:
    text = page.html("t", "s", evaluation(60), 1.0, {})
    assert text.count("predicted as") == page.MAX_MATRIX**2
    assert "The 30 classes with the most mistakes" in text
