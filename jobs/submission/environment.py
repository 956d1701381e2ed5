"""What a job finds on the cluster: the project, variables, and packages that the machines' image lacks."""

import json
import os
import re
import shlex
import time
import tomllib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from jobs.submission.client import Client, submit
from pipeline import storage
from pipeline.errors import NightshiftError, SettingRefused

PROBE = "jobs/submission/probe.py"
PROBE_PATIENCE_S = 300.0
THE_CLUSTERS_OWN = {"ray", "python"}
NOT_NEEDED_THERE = {"pathspec"}
CONSTRAINTS = "constraints.txt"


def variables(settings: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, or NAME alone for this process's own value, which then stands in no command line."""
    found = {}
    for setting in settings:
        name, is_given, value = setting.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise SettingRefused(f"--env {name}: it is NAME=VALUE, or the NAME of a variable that is set here")
        if not is_given and name not in os.environ:
            raise SettingRefused(f"--env {name}: no variable of that name is set here; set it, or give {name}=VALUE")
        found[name] = value if is_given else os.environ[name]
    return found


def without_secrets(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A shell's command in which URIs with credentials stand as variables, and these.

    Everyone who sees the dashboard or the log sees the command; the variables' values are not shown.
    """
    secrets: dict[str, str] = {}
    shown = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if storage.redact(value) == value:
            shown.append(shlex.quote(word))
        else:
            name = f"NIGHTSHIFT_URI_{len(secrets)}"
            secrets[name] = value
            shown.append(f'{flag}{equals}"${name}"')
    return " ".join(shown), secrets


def required(folder: Path, more: Sequence[str] = ()) -> list[str]:
    """The requirements of the project in a folder, and more. Raises SettingRefused if one cannot be read."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    found = [f"python{project['requires-python']}", *project["dependencies"], *more]
    try:
        return [text for text in found if Requirement(text).name not in NOT_NEEDED_THERE]
    except InvalidRequirement as error:
        raise SettingRefused(f"--requirement: {error}; it is what pip takes, as in timm>=1.0") from error


def is_installable(requirement: str) -> bool:
    """False for what the cluster itself runs on: another one of these is another cluster."""
    return Requirement(requirement).name not in THE_CLUSTERS_OWN


def without_url(requirement: str) -> str:
    """As it may be shown: a URL may bear credentials."""
    asked = Requirement(requirement)
    return f"{asked.name} from a URL" if asked.url else requirement


def missing(client: Client, requirements: Sequence[str], runtime_env: dict[str, Any]) -> list[str]:
    """Those that the Python of the cluster's drivers does not meet, and those from URLs, of which no version tells.

    It is asked with a job that ends at once, whose command everyone sees.
    """
    submission_id = f"nightshift-probe-{uuid.uuid4().hex[:8]}"
    from_urls = [text for text in requirements if Requirement(text).url]
    named = [text for text in requirements if text not in from_urls]
    submit(client, submission_id, shlex.join(["python", PROBE, *named]), runtime_env)
    deadline = time.monotonic() + PROBE_PATIENCE_S
    while not (details := client.get_job_info(submission_id)).status.is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(submission_id)
            raise NightshiftError(
                f"the cluster did not say in {PROBE_PATIENCE_S:g} seconds which packages it has ({details.message}); "
                "--pip or --no-pip submits without asking"
            )
        time.sleep(0.3)
    lines = client.get_job_logs(submission_id).splitlines()
    client.delete_job(submission_id)
    if details.driver_exit_code != 0:
        raise NightshiftError(f"the cluster cannot run Python for this job: {' '.join(lines[-1:]) or details.message}")
    return [*json.loads(lines[-1]), *from_urls]


def pip(requirements: Sequence[str], folder: Path) -> dict[str, Any]:
    """A runtime_env's `pip` for requirements: at the project's pins, and what they bring along too.

    Raises SettingRefused for what only another cluster can meet, and for what contradicts a pin.
    """
    if fixed := [text for text in requirements if not is_installable(text)]:
        raise SettingRefused(f"the cluster does not have {' and '.join(fixed)}: start it from an image that has")
    constraints = folder / CONSTRAINTS
    if not constraints.is_file():
        return {"packages": list(requirements)}
    lines = [line for line in constraints.read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}
    packages = [_pinned(text, pins) for text in requirements]
    return {"packages": [*packages, f"--constraint ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{CONSTRAINTS}"]}


def _pinned(text: str, pins: Mapping[str, Requirement]) -> str:
    """A requirement at its pin, extras and marker as they are; itself where nothing pins it."""
    asked = Requirement(text)
    pin = pins.get(canonicalize_name(asked.name))
    if pin is None:
        return text
    versions = [each.version for each in pin.specifier]
    if asked.url or not all(asked.specifier.contains(version, prereleases=True) for version in versions):
        raise SettingRefused(
            f"--requirement {without_url(text)}: the project's {CONSTRAINTS} pins {pin}; "
            "ask for it without a version, or change the pin"
        )
    asked.specifier = pin.specifier
    return str(asked)
