"""The size of a JPEG XL image from its first bytes: its plugin for Pillow decodes all pixels on open."""

import re
from fractions import Fraction

from pipeline.errors import DecodeError

CODESTREAM = b"\xff\x0a"
"""The start of a codestream (ISO/IEC 18181-1, 3.2)."""

BOX = re.compile(rb"jxlc|jxlp")
"""Types of the boxes that hold the codestream, the second one in parts (ISO/IEC 18181-2)."""

HEADER_BYTES = 32
ORIENTATION_BITS = 3
SIZE_BITS = (9, 13, 18, 30)
RATIOS = (Fraction(1), Fraction(12, 10), Fraction(4, 3), Fraction(3, 2), Fraction(16, 9), Fraction(5, 4), Fraction(2))
"""Width to height, by `ratio` - 1 (ISO/IEC 18181-1, SizeHeader)."""


def size_of(data: bytes) -> tuple[int, int]:
    """Width and height as the pixels are stored.

    Raises DecodeError: corrupt if there is no codestream, unsupported for an animation, of which the plugin decodes the
    last frame.
    """
    start = _codestream(data)
    bits = int.from_bytes(data[start : start + HEADER_BYTES], "little")

    def take(count: int) -> int:
        nonlocal bits
        value, bits = bits & ((1 << count) - 1), bits >> count
        return value

    def size() -> tuple[int, int]:
        is_small = take(1)
        height = 8 * (take(5) + 1) if is_small else take(SIZE_BITS[take(2)]) + 1
        if ratio := take(3):
            return int(height * RATIOS[ratio - 1]), height
        return 8 * (take(5) + 1) if is_small else take(SIZE_BITS[take(2)]) + 1, height

    stored = size()
    has_defaults = take(1)
    if not has_defaults and take(1):  # extra fields
        take(ORIENTATION_BITS)
        if take(1):
            size()  # at which it should be shown
        has_preview, has_animation = take(1), take(1)
        if has_preview or has_animation:
            raise DecodeError(
                "unsupported", "a JPEG XL with several frames is not supported; write its first frame as a JPEG XL"
            )
    return stored


def _codestream(data: bytes) -> int:
    """Where the header begins after the signature of the codestream."""
    if data.startswith(CODESTREAM):
        return len(CODESTREAM)
    for box in BOX.finditer(data, 0, 1 << 20):
        start = box.end() + 4 * (box[0] == b"jxlp")
        if data.startswith(CODESTREAM, start):
            return start + len(CODESTREAM)
    raise DecodeError("corrupt", "the JPEG XL image holds no codestream")
