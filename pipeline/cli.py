"""Command-line flags from dataclasses, and exit codes from errors. All jobs use this module."""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pipeline.config import RunConfig
from pipeline.errors import Interrupted, NightshiftError, SettingRefused, printable
from pipeline.predictors.base import Predictor

LIST_FLAGS = ("input",)
BOOLEANS = {"true": "", "yes": "", "on": "", "false": "no-", "no": "no-", "off": "no-"}
"""Boolean in YAML, in any case → prefix of the flag's name."""
NULLS = ("", "null", "~")


def job(predictor_class: type, description: str, arguments: Sequence[str] | None = None) -> int:
    """Parse the flags of RunConfig and of the predictor, run the job, print its report, and return its exit code.

    arguments: None for those of this process. After a signal, or if this process started its own Ray cluster for them,
    it exits here instead of returning.
    """

    def work() -> int:
        _divert_native_stderr()
        run_values, predictor_values = parse(predictor_class, description, arguments)
        config, predictor = RunConfig(**run_values), predictor_class(**predictor_values)
        return _dry_run(config, predictor) if config.dry_run else _run(config, predictor)

    code = guarded(work)
    is_own_cluster = "ray" in sys.modules and os.environ.get("RAY_ADDRESS", "local") == "local"
    if code > 128 and "ray" in sys.modules and not is_own_cluster:
        _disconnect()
    if code > 128 or (is_own_cluster and arguments is None):
        _exit(code)
    return code


def guarded(work: Callable[[], int]) -> int:
    """Call a function that returns an exit code. An expected error becomes one line on standard error and its code."""
    try:
        return work()
    except NightshiftError as error:
        log(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        log("stopped by SIGINT")
        return Interrupted(signal.SIGINT).exit_code
    except OSError as error:  # such as a full disk or a store that does not answer
        log(f"{error}; run the same command again when this is fixed")
        return NightshiftError.exit_code


def log(message: str) -> None:
    """Print one line on standard error."""
    print(f"nightshift: {printable(message)}", file=sys.stderr, flush=True)


def parse(
    predictor_class: type, description: str, arguments: Sequence[str] | None, *more: type
) -> tuple[dict[str, Any], ...]:
    """Parse flags. They override `--config FILE.yaml`, which overrides the defaults.

    more: dataclasses with further flags of a job. Returns the given fields of RunConfig, of the predictor and of each
    of those. Raises SettingRefused for a bad file, and SystemExit for a bad flag.
    """
    classes = (RunConfig, predictor_class, *more)
    flags = {field.name: field for cls in classes for field in fields(cls) if "help" in field.metadata}
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="file with any of these flags; those given here override it"
    )
    for name, field in flags.items():
        _add_flag(parser, name, field)
    given = vars(parser.parse_args(arguments))
    values = {**vars(parser.parse_args(_config_words(given.pop("config", None), flags))), **given}
    return tuple({field.name: values[field.name] for field in fields(cls) if field.name in values} for cls in classes)


def _add_flag(parser: argparse.ArgumentParser, name: str, field: "Field[Any]") -> None:
    flag = f"--{name.replace('_', '-')}"
    more = {key: value for key, value in field.metadata.items() if key in ("metavar", "choices")}
    default = field.default if field.default is not MISSING else None
    help_text = field.metadata["help"]
    if isinstance(default, bool):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
        return
    if default not in (None, "", ()):
        help_text += f" (default: {default})"
    if name in LIST_FLAGS:
        more["nargs"] = "+"
    elif default == ():
        more["action"] = "append"
    parser.add_argument(flag, type=_scalar(field), help=help_text, **more)


def _scalar(field: "Field[Any]") -> Callable[[str], Any]:
    """The type of a field's values: int, float or str, from an annotation with or without `| None`."""
    kinds = [kind for kind in typing.get_args(field.type) or (field.type,) if kind in (int, float, str)]
    return kinds[0] if kinds else str


def _config_words(path: str | None, flags: dict[str, "Field[Any]"]) -> list[str]:
    """The flags of a YAML file as words of a command line, so that one parser checks both."""
    if path is None:
        return []
    try:
        values = yaml.load(Path(path).read_text(), yaml.BaseLoader) or {}  # as text: YAML reads 1:8 as 68
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingRefused(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise SettingRefused(f"--config {path} must have one flag per line, such as `model: resnet50`")
    words: list[str] = []
    for name, value in values.items():
        field = flags.get(name.replace("-", "_"))
        if field is None:
            raise SettingRefused(f"--config {path}: there is no flag {name}; --help lists the flags")
        try:
            words += _words(field, value)
        except ValueError as error:
            raise SettingRefused(f"--config {path}: {name} is {value!r}: it must be {error}") from error
    return words


def _words(field: "Field[Any]", value: Any) -> list[str]:
    """The words for a flag and its value in YAML. Raises ValueError with a description of the values that it takes."""
    flag, takes_several = field.name.replace("_", "-"), field.default == ()
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
    return [f"--{flag}={text}" for text in texts]


def _run(config: RunConfig, predictor: Any) -> int:
    from pipeline.runner import run  # imports Ray, which takes seconds

    run(config, predictor).show()
    return 0


def _dry_run(config: RunConfig, predictor: Predictor) -> int:
    from pipeline.output import directory
    from pipeline.output.run_record import RunRecord
    from pipeline.planning.archive import Archive
    from pipeline.stages.load import check_settings

    predictor.prepare()
    check_settings(config, predictor)
    record = RunRecord.of(config, predictor)
    print(json.dumps(directory.preview(Archive(config), record, predictor.columns.names), indent=1))
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


def _disconnect() -> None:
    """Disconnect from the cluster, in at most half a second. Otherwise its metrics would show the run as killed."""
    shutdown = threading.Thread(target=sys.modules["ray"].shutdown, daemon=True)
    shutdown.start()
    shutdown.join(0.5)


def _exit(code: int) -> NoReturn:
    """Exit at once. A local cluster ends with its driver; to stop it first would take 1.5 seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
