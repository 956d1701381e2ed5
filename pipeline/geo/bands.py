"""Bands by name: those that a network was trained on, and those that a file has. No I/O."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import DecodeError

FILLED = -1
"""Stands for a band that the file lacks and that has a declared value."""
NUMBERED_BAND = re.compile(r"b0*(\d+)(a?)")
NO_NAME = re.compile(r"band[ _]?(\d+)|")
"""Names that only count the bands."""


@dataclass(frozen=True, slots=True)
class Band:
    """A band of an input specification.

    names: that files give it, without regard to case and to zeros as in B02; the first one is shown. filler: the stored
    value to use if a file lacks the band; None if it must not.
    """

    names: tuple[str, ...]
    filler: float | None = None

    def is_called(self, name: str) -> bool:
        """Whether a file's band description, such as "B02" or "B2, central wavelength 490 nm", names this band."""
        return _canonical(name) in map(_canonical, self.names)


def _canonical(name: str) -> str:
    short = name.partition(",")[0].strip().lower()
    return NUMBERED_BAND.sub(r"b\1\2", short) if NUMBERED_BAND.fullmatch(short) else short


def are_named(names: Sequence[str]) -> bool:
    """Whether a file names its bands, and does not only count them from 1, in order."""
    return not all(_counts(name, number) for number, name in enumerate(names, 1))


def _counts(name: str, number: int) -> bool:
    """Whether a name is empty or says only which band of the file it is."""
    counted = NO_NAME.fullmatch(name.strip().lower())
    return counted is not None and counted[1] in (None, str(number))


def match(names: Sequence[Sequence[str]], wanted: Sequence[Band], subject: str) -> list[int]:
    """The place of each wanted band among the bands of a file; FILLED for one that the file may lack.

    names: of each band of the file, which may have several. subject: the file, for messages. Raises DecodeError
    (unsupported) if a band is missing, or if two have its name.
    """
    found = [[place for place, each in enumerate(names) if any(map(band.is_called, each))] for band in wanted]
    for band, places in zip(wanted, found, strict=True):
        if len(places) > 1:
            raise DecodeError("unsupported", f"{subject} has {len(places)} bands that are called {band.names[0]}")
    missing = [band.names[0] for band, places in zip(wanted, found, strict=True) if not places and band.filler is None]
    if missing:
        known = ", ".join(name for each in names for name in each[:1] if name)
        raise DecodeError(
            "unsupported",
            f"{subject} lacks {', '.join(missing)} of the input specification (its bands: {known}); choose "
            "the bands in the order of the specification with --bands, or declare the value of a band that your files "
            f"lack in a copy of it, as in missing: {{{missing[0]}: 0}}",
        )
    return [places[0] if places else FILLED for places in found]


def with_fillers(chosen: Sequence[int], wanted: Sequence[Band]) -> list[int]:
    """Insert FILLED where a wanted band has a declared value. chosen: the others, in their order."""
    places = iter(chosen)
    return [next(places) if band.filler is None else FILLED for band in wanted]
