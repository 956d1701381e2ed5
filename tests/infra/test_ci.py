"""CI, `make lint` and the pre-commit hooks run the same checks, and CI runs the tests as the README does."""

import re
import shlex
from typing import Any

import yaml
from servers import ROOT


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile."""
    (body,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in body.splitlines()]


def hooks() -> list[dict[str, Any]]:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local", "another repository would be downloaded"
    return list(local["hooks"])


def tool(command: str) -> tuple[str, ...]:
    """Program and subcommand."""
    words = shlex.split(command)
    return tuple(words[:2] if words[0].endswith("ruff") else words[:1])


def test_ci_lints_and_runs_the_test_command_of_the_readme() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make lint", "make test"]
    assert "\nmake test " in (ROOT / "README.md").read_text()


def test_the_hooks_run_the_tools_of_make_lint() -> None:
    assert [tool(hook["entry"]) for hook in hooks()] == [tool(command) for command in recipe("lint")]
    assert {hook["language"] for hook in hooks()} == {"system"}


def test_lint_changes_no_file() -> None:
    for command in [*recipe("lint"), *(hook["entry"] for hook in hooks())]:
        assert "--fix" not in command
        assert "--check" in command or "ruff format" not in command
