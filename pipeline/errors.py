"""Every error that Nightshift raises on purpose.

NightshiftError                    ends a job with a sentence and an exit code, never a traceback
├── Refused                     2  a setting, an input or weights that cannot work; raised before any work
│   ├── SettingRefused             a flag or a field of a config
│   ├── InputRefused               an input that is not there, is empty or cannot be read
│   ├── StorageRefused             a store that takes no credentials, lacks the bucket or does not answer, at any time
│   ├── WeightsRefused             weights, labels or a network that do not fit together
│   └── OutputRefused              an output directory that is another run's, is damaged, or cannot be written
├── TooManyErrors               3  more bad images than --max-error-rate allows
├── OutputLocked                4  another driver works on this output, or took it over
├── NotWhole                    5  verify found the output incomplete or inconsistent
└── Interrupted           130/143  SIGINT or SIGTERM; the same command goes on

ImageError                         one bad image: becomes a row of _errors/, never ends a job
├── ReadError                      stage "read": its bytes could not be had
├── DecodeError                    stage "decode": its bytes are not an image that can be shown
└── PredictError                   stage "predict": the network gave no usable answer
"""

import signal


def printable(text: str) -> str:
    """Text with everything escaped that a terminal would obey or hide: control characters, line ends, bidi overrides.

    Names of files and of archives' members stand in messages, and may hold anything.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class NightshiftError(Exception):
    """Ends a job. `str()` is a sentence for the user: what, which value, what to do."""

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
    """A signal asked the driver to stop. Exit code 128 + the signal, as a shell reports it."""

    def __init__(self, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; run the same command again to go on")


def first_line(error: Exception) -> str:
    """The error's type and the beginning of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def message_line(error: Exception) -> str:
    """The beginning of what the error says, its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def is_out_of_memory(error: Exception) -> bool:
    """As Python, torch on CUDA, torch on the CPU, cuBLAS and cuDNN say it; the last one too where it tries kernels."""
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


class ImageError(Exception):
    """One bad image.

    `error_type` is one word of a small stable vocabulary, to count and filter by: empty, truncated, corrupt,
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
