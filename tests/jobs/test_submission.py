"""`jobs/submit.py` without a cluster: flags, packages, requirements, and a dashboard that fails."""

import asyncio
import os
import threading
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from ray.job_submission import JobStatus
from servers import free_port
from whole import wait_for

from jobs import submit
from jobs.submission import environment, follow, package, probe
from jobs.submission.client import connect
from jobs.submission.client import submit as submit_job
from pipeline.errors import SettingRefused

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "--address", "--working-dir", "--pip", "--requirement", "--env", "--submission-id", "--wait",
    "--reconnect-minutes", "--attach", "--stop",
}  # fmt: skip


def test_the_flags() -> None:
    """A snapshot, like that of the jobs' flags."""
    shown = {flag for action in submit.parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert {flag for flag in shown if not flag.startswith("--no-")} - {"--help"} == FLAGS


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_the_package_has_the_files_that_git_tracks(tmp_path: Path) -> None:
    tree(
        tmp_path, "jobs/a.py", "jobs/b.log", "jobs/kept.log", "data/x.jpg", "pipeline/data/y.py", ".git/config",
        ".venv/bin/python", "jobs/__pycache__/a.pyc", "demo/z.jpg", "deep/demo/w.py", ".github/ci.yml",
    )  # fmt: skip
    (tmp_path / ".gitignore").write_text("*.log\n/demo/\n")
    (tmp_path / "jobs/.gitignore").write_text("!kept.log\n")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    package.pack(tmp_path, tmp_path.parent / "package.zip")
    with zipfile.ZipFile(tmp_path.parent / "package.zip") as archive:
        assert archive.namelist() == [
            *(".github/ci.yml", ".gitignore", "deep/demo/w.py"),
            *("jobs/.gitignore", "jobs/a.py", "jobs/kept.log", "pipeline/data/y.py"),
        ]
        assert archive.read("jobs/a.py") == b"jobs/a.py"


def test_equal_files_make_equal_packages(tmp_path: Path) -> None:
    folder = tree(tmp_path / "project", "a.py", "b.py")
    package.pack(folder, tmp_path / "1.zip")
    os.utime(folder / "a.py", (0, 0))
    package.pack(folder, tmp_path / "2.zip")
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()


def test_a_large_package_is_refused_before_it_is_written(tmp_path: Path) -> None:
    folder = tree(tmp_path / "project", "a.py")
    with (folder / "weights.pt").open("wb") as file:
        file.truncate(package.MAX_BYTES)
    with pytest.raises(SettingRefused, match=r"more than 100 MB.*\.gitignore"):
        package.pack(folder, tmp_path / "p.zip")
    assert not (tmp_path / "p.zip").exists()


def test_the_project_itself_is_small_and_has_its_jobs() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in package.files(ROOT)}
    assert {
        "jobs/embed.py",
        "pipeline/runner.py",
        "pyproject.toml",
        environment.CONSTRAINTS,
        environment.PROBE,
    } <= names
    assert sum((ROOT / name).stat().st_size for name in names) < 5 << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a job to run"),
        (["embed", "--attach", "x"], "name a job to run"),
        (["nosuch"], "has no jobs/nosuch.py"),
        (["embed", "--working-dir", "{empty}"], "has no jobs/embed.py"),
        (["embed", "--", "--input", "a", "--output", "s3://b/c", "--batch-size", "0"], "--batch-size is 0"),
        (["embed", "--", "--input", "a", "--output", "s3://b/c", "--actors", "4:2"], "--actors is '4:2'"),
        (["classify", "--", "--input", "a", "--output", "vectors"], "--output vectors would be in the job's own copy"),
        (["embed", "--env", "NOT_SET_ANYWHERE", "--", "--input", "a", "--output", "/b"], "--env NOT_SET_ANYWHERE"),
        (["embed", "--env", "a b=c", "--", "--input", "a", "--output", "/b"], "--env a b: it must be NAME=VALUE"),
        (["embed", "--requirement", "no such", "--", "--input", "a", "--output", "/b"], "--requirement: "),
        (["embed", "--no-pip", "--requirement", "=", "--", "--input", "a", "--output", "/b"], "--requirement: "),
        (["embed", "--address", "http://127.0.0.1:{port}", "--", "--input", "a", "--output", "/b"], "no Ray dashboard"),
    ],
)
def test_bad_flags_are_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")  # restored after the test
    places = {"empty": str(tmp_path), "port": str(free_port())}
    assert submit.main([word.format(**places) for word in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("nightshift: ")
    assert err.count("\n") == 1


class Lossy:
    """A client that accepts every job, but raises one of `losses` instead of each of the first responses."""

    def __init__(self, losses: list[Exception]) -> None:
        self.losses = losses
        self.jobs: dict[str, dict[str, str]] = {}

    def submit_job(self, submission_id: str, metadata: dict[str, str], **_: object) -> None:
        if submission_id in self.jobs:
            raise RuntimeError(f"Request failed with status code 500: job {submission_id} already exists.")
        self.jobs[submission_id] = metadata
        if self.losses:
            raise self.losses.pop(0)

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        return SimpleNamespace(metadata=self.jobs[submission_id])


@pytest.mark.parametrize("loss", [ConnectionError("lost"), RuntimeError("No available agent to submit job")])
def test_a_job_is_recognized_after_a_lost_response_but_another_one_is_not(
    loss: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    client: Any = Lossy([loss])
    submit_job(client, "night", "python job.py", {})
    with pytest.raises(SettingRefused, match="--submission-id night is the id of an earlier job"):
        submit_job(client, "night", "python job.py", {})


class Silent:
    """A client whose job logs nothing, ends after `polls` requests for its state, and cannot be stopped."""

    def __init__(self, polls: int) -> None:
        self.polls = polls
        self.streams = 0

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        self.streams += 1
        try:
            await asyncio.sleep(600)
            yield ""
        finally:
            self.streams -= 1

    def get_job_info(self, _: str) -> SimpleNamespace:
        self.polls -= 1
        status = JobStatus.RUNNING if self.polls else JobStatus.SUCCEEDED
        return SimpleNamespace(status=status, driver_exit_code=0, message="")

    def get_job_logs(self, _: str) -> str:
        return ""

    def stop_job(self, _: str) -> None:
        raise ConnectionError("no route")


def test_a_job_without_output_is_followed_over_one_connection_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "IDLE_TIMEOUT_SECONDS", 0.0)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    client: Any = Silent(20)
    assert follow.Follower(client, "night", 1.0, "").follow().status == JobStatus.SUCCEEDED
    wait_for(lambda: not client.streams and not any(map(is_log_stream, threading.enumerate())))


def is_log_stream(thread: threading.Thread) -> bool:
    return isinstance(thread, follow.LogStream)


def test_a_failed_request_to_stop_keeps_following_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = Silent(2)
    follower = follow.Follower(client, "night", 1.0, "python jobs/submit.py --attach night")
    monkeypatch.setattr(follower, "follow", Mock(side_effect=[KeyboardInterrupt, client.get_job_info("")]))
    monkeypatch.setattr(submit, "confirm_stop", lambda: True)
    client.get_job_info("")
    submit.follow(follower)
    printed = capsys.readouterr().err
    assert "failed (no route), and the job continues; stop it with: python jobs/submit.py --stop night" in printed


def test_a_requirements_url_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    entrypoints: list[str] = []
    monkeypatch.setattr(environment, "submit", lambda client, name, entrypoint, env: entrypoints.append(entrypoint))
    client: Any = SimpleNamespace(
        get_job_info=lambda _: SimpleNamespace(status=JobStatus.SUCCEEDED, driver_exit_code=0),
        get_job_logs=lambda _: '["timm"]\n',
        delete_job=lambda _: None,
    )
    wheel = "mine @ https://user:token@host/mine.whl"
    assert environment.missing(client, ["timm", wheel], {}) == ["timm", wheel]
    assert "token" not in entrypoints[0]
    assert [environment.hide_url(text) for text in ("timm>=1", wheel)] == ["timm>=1", "mine from a URL"]


def test_the_address_flag_overrides_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    port = free_port()
    with pytest.raises(SettingRefused, match=rf"at address: http://127\.0\.0\.1:{port}\."):
        connect(f"http://127.0.0.1:{port}")


def test_credentials_are_not_in_the_command() -> None:
    signed = "https://user:pass@host/list.csv?X-Amz-Signature=abc"
    shown, secrets = environment.extract_secrets(
        ["python", "jobs/embed.py", "--input", signed, f"--labels={signed}", "a b"]
    )
    assert shown == 'python jobs/embed.py --input "$NIGHTSHIFT_URI_0" --labels="$NIGHTSHIFT_URI_1" \'a b\''
    assert secrets == {"NIGHTSHIFT_URI_0": signed, "NIGHTSHIFT_URI_1": signed}


def test_variables_have_a_given_value_or_the_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_HERE", "secret")
    assert environment.variables(["A=b=c", "EMPTY=", "FROM_HERE"]) == {"A": "b=c", "EMPTY": "", "FROM_HERE": "secret"}


def test_requirements_are_those_of_the_project_with_its_pins() -> None:
    required = environment.required(ROOT, ["timm>=1.0"])
    assert {"python>=3.11", "braceexpand>=0.1.7", "timm>=1.0"} <= set(required)
    packages = environment.pip(["braceexpand>=0.1.7", "nosuch>=2"], ROOT)["packages"]
    assert packages[:2] == ["braceexpand==0.1.7", "nosuch>=2"]
    assert packages[2].startswith("--constraint ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/")
    with pytest.raises(SettingRefused, match=r"does not have ray\[data\]<2: start it from an image that has them"):
        environment.pip(["ray[data]<2"], ROOT)
    with pytest.raises(SettingRefused, match="--requirement: "):
        environment.required(ROOT, ["no such"])


def project(folder: Path, pins: str) -> Path:
    (folder / environment.CONSTRAINTS).write_text(f"# tested together\n{pins}")
    return folder


@pytest.mark.parametrize(
    ("requirement", "installed"),
    [
        ("timm", "timm==1.0.31"),
        ("Timm>=1.0", "Timm==1.0.31"),
        ("timm==1.0.31", "timm==1.0.31"),
        ("typing-extensions>=4", "typing-extensions==4.16.0"),
        ("timm[extra]>=1.0", "timm[extra]==1.0.31"),
        ("timm>=1; python_version > '3'", 'timm==1.0.31; python_version > "3"'),
        ("mine @ https://host/mine.whl", "mine @ https://host/mine.whl"),
        ("mine[extra]==2", "mine[extra]==2"),
    ],
)
def test_a_requirement_keeps_its_extras_and_marker(requirement: str, installed: str, tmp_path: Path) -> None:
    folder = project(tmp_path, "timm==1.0.31\ntyping_extensions==4.16.0\n")
    assert environment.pip([requirement], folder)["packages"][0] == installed


@pytest.mark.parametrize(
    ("requirement", "shown"),
    [("timm==1.0.9", "timm==1.0.9"), ("timm @ https://user:pass@host/timm.whl", "timm from a URL")],
)
def test_a_requirement_that_contradicts_a_pin_is_refused(requirement: str, shown: str, tmp_path: Path) -> None:
    with pytest.raises(SettingRefused, match=f"^--requirement {shown}: .*constraints.txt pins timm==1.0.31; "):
        environment.pip([requirement], project(tmp_path, "timm==1.0.31\n"))


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("python>=3.11", True), ("python>=4", False), ("numpy>=2", True), ("numpy>=99", False), ("nosuch", False),
        ("nosuch; sys_platform == 'other'", True),
    ],
)  # fmt: skip
def test_the_probe(text: str, met: bool) -> None:
    assert probe.is_met(probe.Requirement(text)) is met


class Dashboard:
    """Ray's dashboard, which enters a deleted job again once if it had not seen its end."""

    def __init__(self, enters_again: bool) -> None:
        self.jobs, self.again = {"probe"}, enters_again

    def delete_job(self, submission_id: str) -> None:
        self.jobs.remove(submission_id)

    def get_job_info(self, submission_id: str) -> None:
        if self.again:
            self.again = False
            self.jobs.add(submission_id)
        if submission_id not in self.jobs:
            raise RuntimeError("does not exist")


@pytest.mark.parametrize("enters_again", [True, False])
def test_a_probe_that_ray_enters_again_is_deleted_again(enters_again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "REENTRY_SECONDS", 0.5)
    dashboard = Dashboard(enters_again)
    environment.delete(dashboard, "probe")  # type: ignore[arg-type]
    assert not dashboard.jobs
