"""The errors that Nightshift raises on purpose.

NightshiftError                    ends a job with one sentence and an exit code, without a traceback
├── Refused                     2  a setting, an input or weights that cannot work; raised before any work
│   ├── SettingRefused             a flag or a field of a config
│   ├── InputRefused               an input that does not exist, is empty or cannot be read
│   ├── StorageRefused             a store that rejects the credentials, lacks the bucket or is down; raised at any time
│   ├── WeightsRefused             weights, labels or a network that do not match
│   └── OutputRefused              an output directory of another run, or one that is damaged or not writable
├── TooManyErrors               3  more bad images than --max-error-rate allows
├── OutputLocked                4  another driver is writing this output, or has taken it over
├── NotWhole                    5  verify found the output incomplete or inconsistent
└── Interrupted           130/143  SIGINT or SIGTERM; the same command continues the run

ImageError                         one bad image: becomes a row of _errors/, never ends a job
├── ReadError                      stage "read": its bytes could not be read
├── DecodeError                    stage "decode": its bytes could not be decoded
└── PredictError                   stage "predict": the network gave no usable result
"""

import signal


def printable(text: str) -> str:
    """Escape the characters that a terminal executes or hides: control characters, line ends, bidirectional overrides.

    Messages contain the names of files and of archive members, which may hold any character.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class NightshiftError(Exception):
    """Ends a job. `str()` is one sentence for the user: the problem, the value and the remedy."""

    exit_code = 1


class Refused(NightshiftError):
    exit_code = 2


class SettingRefused(Refused):
    pass


class InputRefused(Refused):
    pass


class StorageRefused(Refused):
    pass


class WeightsRefused(Refused):
    pass


class OutputRefused(Refused):
    pass


class TooManyErrors(NightshiftError):
    exit_code = 3


class OutputLocked(NightshiftError):
    exit_code = 4


class NotWhole(NightshiftError):
    exit_code = 5


class Interrupted(NightshiftError):
    """A signal asked the driver to stop. The exit code is 128 + the signal's number, as shells report it."""

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; run the same command again to continue")


def first_line(error: Exception) -> str:
    """The error's type and the first line of its message, up to 200 characters."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def message_line(error: Exception) -> str:
    """The first line of the error's message, or its type if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 worker", "2,000 workers"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def is_out_of_memory(error: Exception) -> bool:
    """True for the out-of-memory errors of Python, torch (CPU and CUDA), cuBLAS and cuDNN.

    cuDNN also reports "unable to find an engine" if no kernel fits into the free memory.
    """
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


class ImageError(Exception):
    """One bad image.

    `error_type` is one word of a small, stable vocabulary for counting and filtering: empty, truncated, corrupt,
    not_an_image, unsupported, too_large, null, not_found, changed, unreadable, not_finite, out_of_memory, failed.
    """

    stage = ""

    def __init__(self, error_type: str, message: str) -> None:
        self.error_type = error_type
        self.message = message
        super().__init__(f"{error_type}: {message}")

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.error_type, self.message)


class ReadError(ImageError):
    stage = "read"


class DecodeError(ImageError):
    stage = "decode"


class PredictError(ImageError):
    stage = "predict"
