"""A shard: one object that holds many images, or a run of loose images."""

from dataclasses import dataclass, replace
from typing import Protocol, Self


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


@dataclass(frozen=True, slots=True)
class Shard:
    """One object that holds many images, or a run of consecutive loose images.

    index: place in the plan. `(index, row)` identifies an image within a run.
    kind: name of the source that reads it; see `pipeline.sources.SOURCES`.
    uri: the object, or the folder or prefix of loose images ("" if their keys are absolute).
    rows: number of images to read, None to read to the end. Images after the first `rows` are ignored.
    size_bytes, etag: of the object when it was planned. For loose images the total size, and "".
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
