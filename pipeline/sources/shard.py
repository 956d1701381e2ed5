"""A shard: one object that holds many images, a part of such an object, or a run of loose images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

from pipeline.coverage import Ranges


class Payload(Protocol):
    """Fields that only the shards of one kind have. Immutable and picklable.

    A source with a payload defines such a class and names it in its `Source`.
    """

    def to_json(self) -> str:
        """The text that is stored in the plan."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The payload of a stored text."""

    def first(self, rows: int) -> Self:
        """The payload of the shard's first `rows` rows."""


class KeyedPayload(Payload, Protocol):
    """A payload whose rows have keys, by which an update finds the same image in an object that was replaced.

    An object's shards have disjoint ranges of keys.
    """

    @property
    def keys(self) -> Sequence[int]:
        """The key of each row, unique in the object. Empty if the rows cannot be read."""

    def select(self, rows: Ranges) -> Self:
        """The payload of some of the rows."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One object that holds many images, a part of such an object, or a run of consecutive loose images.

    index: place in the plan. `(index, row)` identifies an image within a run.
    kind: name of the source that reads it; see `pipeline.sources.SOURCES`.
    uri: the object, or the folder or prefix of loose images ("" if their keys are absolute).
    rows: number of images to read, None to read to the end. Images after the first `rows` are ignored.
    size_bytes, etag: of the object when it was planned. For a part of an object its share of the size, for loose images
        the total size, and "".
    payload: the fields of this kind of shard; None for most kinds.
    """

    index: int
    kind: str
    uri: str
    rows: int | None = None
    size_bytes: int = 0
    etag: str = ""
    payload: Payload | None = None

    def cut(self, rows: int) -> "Shard":
        """The shard of the first `rows` rows."""
        payload = None if self.payload is None else self.payload.first(rows)
        return replace(self, rows=rows, payload=payload)
