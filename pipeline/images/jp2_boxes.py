"""The boxes of a JPEG 2000 file that say what its channels mean (T.800, annex I). Pillow reads some of them."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.errors import DecodeError

COLOUR, ALPHA, PREMULTIPLIED_ALPHA = 0, 1, 2
"""Types of a channel (I.5.3.6). 65535 means no type."""
NO_COLOUR = 65535
"""A channel that belongs to no colour; 0 is all of them."""
YCC = 18
COLOUR_SPACES = {0: "unspecified", 16: "sRGB", 17: "grey", YCC: "sYCC"}
"""Enumerated colour spaces that are read (I.5.3.3)."""
ENUMERATED = 1
"""Method of a colour specification that has a number of a colour space. Others have an ICC profile."""
SIGNATURE = b"\0\0\0\x0cjP  "


@dataclass(frozen=True, slots=True)
class Channels:
    """The meaning of the channels of a file.

    colours: channels of the colours, in the order of red, green and blue. alpha: the channel that is the opacity.
    premultiplied: the colours are multiplied by it. others: channels without a meaning. is_palette: the channel is an
    index of colours. is_ycc: the colours are luma and chroma.
    """

    colours: tuple[int, ...]
    alpha: int | None = None
    premultiplied: bool = False
    others: tuple[int, ...] = ()
    is_palette: bool = False
    is_ycc: bool = False

    @property
    def are_in_order(self) -> bool:
        """Whether the colours come first and the alpha last, as Pillow takes them."""
        return self.colours == tuple(range(len(self.colours))) and not self.others and not self.premultiplied


def read_channels(data: bytes, samples: int) -> Channels:
    """The channels as the file defines them; without a definition they are colours, in order.

    Raises DecodeError (unsupported) for a colour space that is not read, and for definitions that are not understood.
    """
    definition, space = None, 0
    for kind, content in _boxes(data) if data.startswith(SIGNATURE) else ():
        if kind != b"jp2h":
            continue
        for inner, payload in _boxes(content):
            if inner == b"colr" and payload[:1] == bytes([ENUMERATED]) and len(payload) >= 7:
                space = int.from_bytes(payload[3:7], "big")
                _check_colour_space(space)
            elif inner == b"cdef":
                definition = payload
            elif inner == b"pclr":
                return Channels(tuple(range(samples)), is_palette=True)
    channels = Channels(tuple(range(samples))) if definition is None else _channels(definition, samples)
    return replace(channels, is_ycc=space == YCC)


def _check_colour_space(number: int) -> None:
    if number not in COLOUR_SPACES:
        names = ", ".join(COLOUR_SPACES.values())
        raise DecodeError(
            "unsupported", f"a JPEG 2000 in the colour space {number} is not supported; write it as one of {names}"
        )


def _channels(definition: bytes, samples: int) -> Channels:
    (count,) = struct.unpack(">H", definition[:2])
    entries = [struct.unpack(">HHH", definition[2 + 6 * n : 8 + 6 * n]) for n in range(count)]
    alphas = [(channel, kind) for channel, kind, _ in entries if kind in (ALPHA, PREMULTIPLIED_ALPHA)]
    ordered = sorted((of, channel) for channel, kind, of in entries if kind == COLOUR and of not in (0, NO_COLOUR))
    colours = tuple(channel for _, channel in ordered)
    known = [*colours, *(channel for channel, _ in alphas)]
    others = tuple(sorted(channel for channel, _, _ in entries if channel not in known))
    is_complete = sorted([*known, *others]) == list(range(samples)) and len(entries) == samples
    if not is_complete or len(alphas) > 1 or [of for of, _ in ordered] != list(range(1, len(colours) + 1)):
        raise DecodeError("unsupported", f"a JPEG 2000 with the channels {entries} is not supported")
    alpha, kind = alphas[0] if alphas else (None, None)
    return Channels(colours, alpha, kind == PREMULTIPLIED_ALPHA, others)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each box."""
    start = 0
    while start + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[start : start + 8])
        header = 8
        if length == 1 and start + 16 <= len(data):
            (length,), header = struct.unpack(">Q", data[start + 8 : start + 16]), 16
        end = start + length if length else len(data)
        if end < start + header:
            return
        yield kind, data[start + header : end]
        start = end
