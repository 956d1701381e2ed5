"""What the user should know of some objects of an archive: one line per kind of notice, not per object."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass
class Notices:
    """Texts, each with the number of objects that it concerns and the first of them."""

    objects: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, uri: str, texts: Iterable[str]) -> None:
        for text in texts:
            count, first = self.objects.get(text, (0, uri))
            self.objects[text] = count + 1, first

    def clear(self) -> None:
        """Forget all objects, before the archive is listed again."""
        self.objects.clear()

    def lines(self) -> Iterator[str]:
        for text, (count, first) in self.objects.items():
            yield f"{first}{f' and {count - 1:,} more' if count > 1 else ''}: {text}"
