"""Command-line flags from dataclasses, and exit codes from errors. All jobs use this module."""

import argparse
import contextlib
import difflib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
import typing
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pipeline.config import RunConfig
from pipeline.errors import Interrupted, NightshiftError, SettingRefused
from pipeline.predictors.base import Predictor
from pipeline.report import messages
from pipeline.report.messages import MessageFlags
from pipeline.storage import retry, strict_yaml, uris
from pipeline.version import __version__

LIST_FLAGS = ("input", "models")
BOOLEANS = {"true": "", "yes": "", "on": "", "false": "no-", "no": "no-", "off": "no-"}
"""Boolean in YAML, in any case → prefix of the flag's name."""
NEGATIVE = re.compile(r"-\.?\d")
"""The start of a negative number or of a range from one."""
LEADING_ZERO = re.compile(r"[+-]?0\d")
NULLS = ("", "null", "~")
MIN_WAIT_SECONDS = 1.0
RETRY_MESSAGE_SECONDS = 10.0
"""A fault that passes within MIN_WAIT_SECONDS is not shown."""


Values = dict[str, Any]
"""Given fields of a dataclass of flags."""


def job(
    predictor_class: type,
    description: str | None,
    arguments: Sequence[str] | None = None,
    more: type | None = None,
    make: Callable[[Values, Values, Values], tuple[RunConfig, Predictor]] | None = None,
) -> int:
    """Parse the flags of RunConfig and of the predictor, run the job, print its report, and return its exit code.

    more: a dataclass with further flags. make: the given fields of RunConfig, of the predictor and of `more` → the
    settings of the run and its predictor; by default each is made of its own fields.
    arguments: None for those of this process, which then exits here instead of returning; so it does after a signal.
    """

    def work() -> int:
        classes = [each for each in (MessageFlags, more) if each]
        run_values, predictor_values, message_values, *others = parse(predictor_class, description, arguments, *classes)
        speak(MessageFlags(**message_values))
        if make:
            config, predictor = make(run_values, predictor_values, others[0] if others else {})
        else:
            config, predictor = RunConfig(**run_values), predictor_class(**predictor_values)
        messages.say(f"version {__version__}: looking at the input and at {uris.redact(config.output)}")
        _divert_native_stderr()
        return _dry_run(config, predictor) if config.dry_run else _run(config, predictor)

    code = guarded(work)
    if arguments is None or code > 128:
        leave(code)
    return code


def guarded(work: Callable[[], int]) -> int:
    """Call a function that returns an exit code. An expected error becomes one line on standard error and its code."""
    try:
        return work()
    except NightshiftError as error:
        log(str(error))
        for line in "".join(traceback.format_exception(error)).splitlines():
            messages.detail(line)
        return error.exit_code
    except KeyboardInterrupt:
        log("stopped by SIGINT")
        return Interrupted(signal.SIGINT).exit_code
    except OSError as error:  # such as a full disk or a store that does not answer
        log(f"{error}; run the same command again when this is fixed")
        return NightshiftError.exit_code


def log(message: str) -> None:
    """Print one line on standard error, also with --quiet."""
    messages.error(message)


def speak(flags: MessageFlags) -> None:
    """Apply the flags of messages to this process, and show when a store does not answer."""
    messages.configure(flags)
    retry.on_retry = _Retries().show


class _Retries:
    """Shows that a request is being repeated, at most once per RETRY_MESSAGE_SECONDS."""

    def __init__(self) -> None:
        self.shown_at = -RETRY_MESSAGE_SECONDS

    def show(self, fault: str, waited_seconds: float) -> None:
        now = time.monotonic()
        if waited_seconds >= MIN_WAIT_SECONDS and now - self.shown_at >= RETRY_MESSAGE_SECONDS:
            self.shown_at = now
            messages.say(f"the store does not answer, trying again: {fault}")


def parse(
    predictor_class: type,
    description: str | None,
    arguments: Sequence[str] | None,
    *more: type,
    hidden: Container[str] = (),
) -> tuple[dict[str, Any], ...]:
    """Parse flags. They override `--config FILE.yaml`, which overrides the defaults.

    more: dataclasses with further flags of a job. hidden: fields that are accepted and not shown by `--help`. Returns
    the given fields of RunConfig, of the predictor and of each of those. Raises SettingRefused for a bad file, and
    SystemExit for a bad flag.
    """
    classes = (RunConfig, predictor_class, *more)
    return parsed(parser_of(description, classes, hidden), classes, arguments)[1:]


def parsed(parser: "Parser", classes: Sequence[type], arguments: Sequence[str] | None) -> tuple[dict[str, Any], ...]:
    """Parse flags with a parser of `parser_of`, to which arguments may have been added, and with `--config`.

    Returns the values of those arguments, then the given fields of each class.
    """
    flags = _flags(classes)
    given = vars(parser.parse_args(joined(sys.argv[1:] if arguments is None else arguments)))
    others = {name: given.pop(name) for name in list(given) if name not in flags and name != "config"}
    words = _config_words(given.pop("config", None), flags)
    in_file = vars(parser_of(None, classes).parse_args(words))
    values = {**in_file, **given}
    return others, *({each.name: values[each.name] for each in fields(cls) if each.name in values} for cls in classes)


def parsed_by_job(
    job: str, parser: "Parser", classes: Sequence[type], others: Container[str], arguments: Sequence[str] | None
) -> tuple[dict[str, Any], ...]:
    """Parse the flags of a job that shares classes with other jobs: the given fields of each class.

    others: fields that do not concern the job. Raises SettingRefused if one of them was given.
    """
    of_classes = parsed(parser, classes, arguments)[1:]
    if given := [name for values in of_classes for name in values if name in others]:
        raise SettingRefused(f"{flag_name(given[0])} is no flag of {job}: leave it out")
    return of_classes


class Parser(argparse.ArgumentParser):
    """argparse's parser, which names the nearest flag or command for an unknown one."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._nearest(unknown)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += _did_you_mean(found[1], re.findall(r"[\w-]+", found[2]))
        super().error(message)

    def _nearest(self, unknown: Sequence[str]) -> str:
        flags = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        known = [word for action in self._actions for word in action.option_strings if action.help != argparse.SUPPRESS]
        return _did_you_mean(flags[0], known) if flags else ""


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _flags(classes: Iterable[type]) -> dict[str, "Field[Any]"]:
    return {field.name: field for cls in classes for field in fields(cls) if "help" in field.metadata}


def parser_of(description: str | None, classes: Sequence[type], hidden: Container[str] = ()) -> Parser:
    """A parser of the flags of dataclasses. hidden: fields that are accepted and not shown by `--help`."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="file with any of these flags; those given here override it"
    )
    for name, field in _flags(classes).items():
        _add_flag(parser, name, field, is_hidden=name in hidden)
    return parser


def joined(arguments: Sequence[str]) -> list[str]:
    """Join a flag and a value such as -1:1 with "=". argparse takes the value for a flag."""
    words: list[str] = []
    for word in arguments:
        if NEGATIVE.match(word) and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def flag_name(field_name: str) -> str:
    """`--name` of a field; a field ends in `_` if its name would be a word of Python."""
    return f"--{field_name.rstrip('_').replace('_', '-')}"


def _add_flag(parser: argparse.ArgumentParser, name: str, field: "Field[Any]", *, is_hidden: bool) -> None:
    flag = flag_name(name)
    more = {key: value for key, value in field.metadata.items() if key in ("metavar", "choices")}
    default = field.default if field.default is not MISSING else None
    help_text = argparse.SUPPRESS if is_hidden else field.metadata["help"]
    if isinstance(default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
        return
    if default not in (None, "", ()) and not is_hidden:
        help_text += f" (default: {default})"
    if name in LIST_FLAGS:
        more["nargs"] = "+"
    elif default == ():
        more["action"] = "append"
    parser.add_argument(flag, dest=name, type=_scalar(field), help=help_text, **more)


def _scalar(field: "Field[Any]") -> Callable[[str], Any]:
    """The type of a field's values: int, float or str, from an annotation with or without `| None`."""
    kinds = [kind for kind in typing.get_args(field.type) or (field.type,) if kind in (int, float, str)]
    return kinds[0] if kinds else str


def _config_words(path: str | None, flags: dict[str, "Field[Any]"]) -> list[str]:
    """The flags of a YAML file as words of a command line, so that one parser checks both."""
    if path is None:
        return []
    try:
        values = strict_yaml.load_texts(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingRefused(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise SettingRefused(f"--config {path} must have one flag per line, such as `model: resnet50`")
    words: list[str] = []
    seen: dict[str, str] = {}
    for name, value in values.items():
        field = flags.get(name.replace("-", "_")) or flags.get(f"{name}_")
        if field is None:
            raise SettingRefused(f"--config {path}: there is no flag {name}; --help lists the flags")
        if field.name in seen:
            raise SettingRefused(f"--config {path}: {name} is given twice, as {seen[field.name]} and as {name}")
        seen[field.name] = name
        try:
            words += _words(field, value)
        except ValueError as error:
            raise SettingRefused(f"--config {path}: {name} is {value!r}: it must be {error}") from error
    return words


def _words(field: "Field[Any]", value: Any) -> list[str]:
    """The words for a flag and its value in YAML. Raises ValueError with a description of the values that it takes."""
    flag, takes_several = flag_name(field.name).removeprefix("--"), field.default == ()
    texts = value if isinstance(value, list) and takes_several else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("one value or a list of them" if takes_several else "one value")
    if not texts or (isinstance(value, str) and value.lower() in NULLS):
        return []
    if isinstance(field.default, bool):
        if texts[0].lower() not in BOOLEANS:
            raise ValueError("true or false")
        return [f"--{BOOLEANS[texts[0].lower()]}{flag}"]
    if field.name in LIST_FLAGS:
        return [f"--{flag}", *texts]
    if _scalar(field) is int and any(LEADING_ZERO.match(text) for text in texts):
        raise ValueError("a number without a leading zero, which YAML reads as octal")
    return [f"--{flag}={text}" for text in texts]


def _run(config: RunConfig, predictor: Any) -> int:
    from pipeline.runner import run  # imports Ray, which takes seconds

    run(config, predictor).show()
    return 0


def _dry_run(config: RunConfig, predictor: Predictor) -> int:
    from pipeline.runner import preview

    print(json.dumps(preview(config, predictor), indent=1))
    return 0


def _divert_native_stderr() -> None:
    """Discard what C++ libraries write to descriptor 2; keep Python's standard error.

    Ray and torch have no setting for these lines. Ray also writes them to its log files.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.stderr.fileno() == 2:
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 2)
            os.close(devnull)


def leave(code: int) -> NoReturn:
    """Exit at once, without the interpreter's own shutdown.

    A background thread may still import torch; the shutdown would stop it inside C++, which aborts the process (134).
    A local cluster ends with its driver; to stop it first would take 1.5 seconds.
    """
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        _disconnect(0.5 if code > 128 else 10.0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # such as a closed pipe
            stream.flush()
    os._exit(code)


def _disconnect(timeout_seconds: float) -> None:
    """Disconnect from the cluster. Otherwise its metrics would show the run as killed."""
    shutdown = getattr(sys.modules.get("ray"), "shutdown", None)  # missing while a thread imports Ray
    if shutdown:
        thread = threading.Thread(target=shutdown, daemon=True)
        thread.start()
        thread.join(timeout_seconds)
