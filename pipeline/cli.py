"""Dataclass → flags; errors → sentences and exit codes. The jobs and the `nightshift` command are made of this."""

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

LIST_FLAGS = ("input",)
BOOLEANS = {"true": "", "yes": "", "on": "", "false": "no-", "no": "no-", "off": "no-"}
"""As YAML writes them, in any case → what comes before the flag's name."""
NOTHING = ("", "null", "~")


def job(predictor_class: type, description: str, arguments: Sequence[str] | None = None) -> int:
    """Parse the flags of RunConfig and of the predictor, run, print; return the exit code."""

    def work() -> int:
        _divert_native_stderr()
        run_values, predictor_values = parse(predictor_class, description, arguments)
        config, predictor = RunConfig(**run_values), predictor_class(**predictor_values)
        return _dry_run(config, predictor) if config.dry_run else _run(config, predictor)

    code = guarded(work)
    is_own_cluster = "ray" in sys.modules and os.environ.get("RAY_ADDRESS", "local") == "local"
    if code > 128 and "ray" in sys.modules and not is_own_cluster:
        _say_goodbye()
    if code > 128 or (is_own_cluster and arguments is None):  # without arguments the process is this job's own
        _leave(code)
    return code


def guarded(work: Callable[[], int]) -> int:
    """Run; an error made on purpose ends as one sentence on standard error and its exit code."""
    try:
        return work()
    except NightshiftError as error:
        tell(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        tell("stopped by SIGINT")
        return Interrupted(signal.SIGINT).exit_code
    except OSError as error:  # a full disk, a store that is out of reach: no fault of the code
        tell(f"{error}; run the same command again once that is mended")
        return NightshiftError.exit_code


def tell(message: str) -> None:
    """One line on standard error."""
    print(f"nightshift: {printable(message)}", file=sys.stderr, flush=True)


def parse(
    predictor_class: type, description: str, arguments: Sequence[str] | None, *own: type
) -> tuple[dict[str, Any], ...]:
    """Flags win over `--config FILE.yaml`, which wins over the defaults.

    own: dataclasses with further flags of a job. Returns the fields of RunConfig, of the predictor and of each of them.
    """
    classes = (RunConfig, predictor_class, *own)
    flags = {field.name: field for cls in classes for field in fields(cls) if "help" in field.metadata}
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="any of these flags as YAML; flags given here win")
    for name, field in flags.items():
        _add_flag(parser, name, field)
    given = vars(parser.parse_args(arguments))
    values = {**vars(parser.parse_args(_config_words(given.pop("config", None), flags))), **given}
    return tuple({field.name: values[field.name] for field in fields(cls) if field.name in values} for cls in classes)


def _add_flag(parser: argparse.ArgumentParser, name: str, field: "Field[Any]") -> None:
    flag = f"--{name.replace('_', '-')}"
    more = {key: value for key, value in field.metadata.items() if key != "help"}
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
    """int, float or str, as the field is annotated (with or without `| None`)."""
    kinds = [kind for kind in typing.get_args(field.type) or (field.type,) if kind in (int, float, str)]
    return kinds[0] if kinds else str


def _config_words(path: str | None, flags: dict[str, "Field[Any]"]) -> list[str]:
    """The flags in a YAML file as the words of a command line, so that one parser checks both."""
    if path is None:
        return []
    try:
        values = yaml.load(Path(path).read_text(), yaml.BaseLoader) or {}  # all of it text: YAML reads 1:8 as 68
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingRefused(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise SettingRefused(f"--config {path}: it must hold one flag a line, as in `model: resnet50`")
    words: list[str] = []
    for name, value in values.items():
        field = flags.get(name.replace("-", "_"))
        if field is None:
            raise SettingRefused(f"--config {path}: no flag is called {name}")
        try:
            words += _words(field, value)
        except ValueError as error:
            raise SettingRefused(f"--config {path}: {name} is {value!r}: it must be {error}") from error
    return words


def _words(field: "Field[Any]", value: Any) -> list[str]:
    """A flag with what YAML says of it, a text, or several where it takes them. Raises ValueError: what it must be."""
    flag, takes_several = field.name.replace("_", "-"), field.default == ()
    texts = value if isinstance(value, list) and takes_several else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("one value or a list of them" if takes_several else "one value")
    if not texts or (isinstance(value, str) and value.lower() in NOTHING):
        return []
    if isinstance(field.default, bool):
        if texts[0].lower() not in BOOLEANS:
            raise ValueError("true or false")
        return [f"--{BOOLEANS[texts[0].lower()]}{flag}"]
    if field.name in LIST_FLAGS:
        return [f"--{flag}", *texts]
    return [f"--{flag}={text}" for text in texts]


def _run(config: RunConfig, predictor: Any) -> int:
    from pipeline.runner import run  # imports Ray, which --help and a refused flag need not wait for

    run(config, predictor).show()
    return 0


def _dry_run(config: RunConfig, predictor: Any) -> int:
    from pipeline import output

    predictor.prepare()
    print(json.dumps(output.preview(config, predictor), indent=1))
    return 0


def _divert_native_stderr() -> None:
    """Keep what C++ libraries write to descriptor 2 off the screen; Python's own standard error stays.

    Ray and torch have no setting for these lines, and log the same to their files.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.stderr.fileno() == 2:
            sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)


def _say_goodbye() -> None:
    """Let the cluster's metrics know that the run has ended: they would call it killed. Within half a second."""
    goodbye = threading.Thread(target=sys.modules["ray"].shutdown, daemon=True)
    goodbye.start()
    goodbye.join(0.5)


def _leave(code: int) -> NoReturn:
    """Leave at once: a local cluster ends with its driver, and to end it first would take 1.5 of the three seconds that
    there are after a signal."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
