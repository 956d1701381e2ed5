"""Environment of a submitted job: its variables, and the packages that the cluster lacks."""

import contextlib
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
from packaging.utils import NormalizedName, canonicalize_name

from jobs.submission.client import Client, submit
from pipeline.errors import NightshiftError, SettingRefused
from pipeline.storage import uris

PROBE = "jobs/submission/probe.py"
PROBE_TIMEOUT_SECONDS = 300.0
REENTRY_SECONDS = 3.0
FIXED_BY_CLUSTER = {"ray", "python"}
"""Requirements that pip cannot change on a running cluster."""

LOCAL_ONLY = {"argcomplete", "pathspec"}
"""Requirements of jobs/submit.py and of the shell alone."""

CONSTRAINTS = "constraints.txt"


def variables(settings: Sequence[str]) -> dict[str, str]:
    """Parse NAME=VALUE, or NAME for the value in this process's environment. Raises SettingRefused."""
    values = {}
    for setting in settings:
        name, is_given, value = setting.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise SettingRefused(f"--env {name}: it must be NAME=VALUE, or the NAME of a variable that is set here")
        if not is_given and name not in os.environ:
            raise SettingRefused(f"--env {name}: this variable is not set here; set it, or write {name}=VALUE")
        values[name] = value if is_given else os.environ[name]
    return values


def extract_secrets(words: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Replace URIs with credentials by environment variables. Returns the shell command and the variables.

    The dashboard and the log show the command but not the values of variables.
    """
    secrets: dict[str, str] = {}
    shown = []
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if uris.redact(value) == value:
            shown.append(shlex.quote(word))
        else:
            name = f"NIGHTSHIFT_URI_{len(secrets)}"
            secrets[name] = value
            shown.append(f'{flag}{equals}"${name}"')
    return " ".join(shown), secrets


def required(folder: Path, more: Sequence[str] = ()) -> list[str]:
    """The requirements of the project in a folder, and more. Raises SettingRefused if one cannot be parsed."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    requirements = [f"python{project['requires-python']}", *project["dependencies"], *more]
    try:
        return [text for text in requirements if Requirement(text).name not in LOCAL_ONLY]
    except InvalidRequirement as error:
        raise SettingRefused(f"--requirement: {error}; write it as for pip, such as timm>=1.0") from error


def is_installable(requirement: str) -> bool:
    """False for Ray and Python, which pip cannot change on a running cluster."""
    return Requirement(requirement).name not in FIXED_BY_CLUSTER


def hide_url(requirement: str) -> str:
    """The requirement for messages, without its URL, which may have credentials."""
    parsed = Requirement(requirement)
    return f"{parsed.name} from a URL" if parsed.url else requirement


def missing(client: Client, requirements: Sequence[str], runtime_env: dict[str, Any]) -> list[str]:
    """The requirements that the cluster's Python does not meet, and all with a URL, which have no version to compare.

    Runs a short job on the cluster, which does not get the URLs. Raises NightshiftError if that job fails or does not
    end within PROBE_TIMEOUT_SECONDS.
    """
    submission_id = f"nightshift-probe-{uuid.uuid4().hex[:8]}"
    from_urls = [text for text in requirements if Requirement(text).url]
    named = [text for text in requirements if text not in from_urls]
    submit(client, submission_id, shlex.join(["python", PROBE, *named]), runtime_env)
    deadline = time.monotonic() + PROBE_TIMEOUT_SECONDS
    while not (details := client.get_job_info(submission_id)).status.is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(submission_id)
            raise NightshiftError(
                f"the cluster did not report its packages within {PROBE_TIMEOUT_SECONDS:g} seconds "
                f"({details.message}); use --pip or --no-pip to submit without this check"
            )
        time.sleep(0.3)
    lines = client.get_job_logs(submission_id).splitlines()
    delete(client, submission_id)
    if details.driver_exit_code != 0:
        raise NightshiftError(f"the cluster cannot run Python for this job: {' '.join(lines[-1:]) or details.message}")
    return [*json.loads(lines[-1]), *from_urls]


def delete(client: Client, submission_id: str) -> None:
    """Remove an ended job from Ray's list.

    Ray looks at each of its jobs once per second. If a job was deleted before Ray saw its end, Ray enters it again, as
    FAILED; then it is deleted again.
    """
    client.delete_job(submission_id)
    deadline = time.monotonic() + REENTRY_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.3)
        with contextlib.suppress(RuntimeError):  # it does not exist
            client.get_job_info(submission_id)
            client.delete_job(submission_id)
            return


def pip(requirements: Sequence[str], folder: Path) -> dict[str, Any]:
    """The `pip` entry of a runtime_env: the requirements, and their own requirements, in the project's pinned versions.

    Raises SettingRefused for another Ray or Python than the cluster's, and for a version that contradicts a pin.
    """
    if fixed := [text for text in requirements if not is_installable(text)]:
        raise SettingRefused(f"the cluster does not have {' and '.join(fixed)}: start it from an image that has them")
    constraints = folder / CONSTRAINTS
    if not constraints.is_file():
        return {"packages": list(requirements)}
    lines = [line for line in constraints.read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, lines)}
    packages = [_pinned(text, pins) for text in requirements]
    return {"packages": [*packages, f"--constraint ${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/{CONSTRAINTS}"]}


def _pinned(text: str, pins: Mapping[NormalizedName, Requirement]) -> str:
    """The requirement in its pinned version, with its extras and marker; unchanged if it has no pin."""
    requirement = Requirement(text)
    pin = pins.get(canonicalize_name(requirement.name))
    if pin is None:
        return text
    versions = [each.version for each in pin.specifier]
    if requirement.url or not all(requirement.specifier.contains(version, prereleases=True) for version in versions):
        raise SettingRefused(
            f"--requirement {hide_url(text)}: the project's {CONSTRAINTS} pins {pin}; "
            "omit the version, or change the pin"
        )
    requirement.specifier = pin.specifier
    return str(requirement)
