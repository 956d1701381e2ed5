"""Counts of files and members that are not read, by suffix."""

from collections import Counter
from dataclasses import dataclass, field

MAX_SUFFIXES = 100
MAX_SUFFIX_CHARACTERS = 16
MAX_FOLDER_CHARACTERS = 32
FOLDER = "folder"
NO_SUFFIX = "without a suffix"
OTHERS = "with other suffixes"
NO_END_MARK = "no end mark"
"""Beside the counts of a tar's members: 1 if the tar ends without its end mark, and so may be cut."""
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2", ".lz4", ".br", ".z")


@dataclass
class LeftOut:
    """Numbers of files by suffix. Memory is flat: files beyond MAX_SUFFIXES suffixes are counted together."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, uri: str, note: str = "") -> None:
        """Count a file or a folder that is not read. note: why, if not because of its suffix."""
        suffix = " ".join(filter(None, (_folder_of(uri) or suffix_of(uri), note)))
        self.counts[suffix if suffix in self.counts or len(self.counts) < MAX_SUFFIXES else OTHERS] += 1

    def clear(self) -> None:
        """Forget all files, before the archive is listed again."""
        self.counts.clear()


def _folder_of(uri: str) -> str:
    """The name of a folder with its slash, "" for a file."""
    name = uri[:-1].rpartition("/")[2] if uri.endswith("/") else ""
    return f"{name}/" if 0 < len(name) <= MAX_FOLDER_CHARACTERS else FOLDER if name else ""


def suffix_of(uri: str) -> str:
    """The suffix in lower case, with that before a compression: `.npy`, `.tar.xz`."""
    stem, dot, last = uri.rpartition("/")[2].lower().rpartition(".")
    suffix = dot + last
    if not stem or not _is_suffix(suffix):
        return NO_SUFFIX
    before = "." + stem.rpartition(".")[2] if "." in stem else ""
    return before + suffix if suffix in COMPRESSIONS and _is_suffix(before) else suffix


def _is_suffix(text: str) -> bool:
    return 1 < len(text) <= MAX_SUFFIX_CHARACTERS and text[1:].isascii() and text[1:].isalnum()
