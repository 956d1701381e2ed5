"""`jobs/submit.py` and `ray job submit` on real head nodes, with and without tokens, over connections that break."""

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import images
import pytest
from link import link
from servers import ROOT, RayCluster, start_ray_head, stop_ray_head
from whole import SLOW, TINY, count_commits, wait_for, write_folder

from jobs import submit
from jobs.submission import client
from pipeline.output.verify import verify

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def token_cluster() -> Iterator[RayCluster]:
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
        "PYTHONPATH": str(ROOT / "tests/support"),
    }
    process, cluster = start_ray_head(environment)
    yield cluster
    stop_ray_head(process)


def ray_job_submit(
    cluster: RayCluster, *entrypoint: object, options: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [
        *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster.dashboard),
        *("--working-dir", str(ROOT), "--runtime-env-json", '{"excludes": [".git", ".venv", "demo"]}', *options, "--"),
        *map(str, entrypoint),
    ]
    merged = {**os.environ, **cluster.environment, **environment}
    for _ in range(30):
        done = subprocess.run(command, env=merged, capture_output=True, text=True, timeout=240)
        if "No available agent" not in done.stderr:  # a head node that has only just started
            break
        time.sleep(1)
    return done


def test_ray_job_submit_runs_a_job_and_reports_its_status(token_cluster: RayCluster, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.jpg").write_bytes(images.encode(images.tile("forest", i)))
    job = (sys.executable, "jobs/embed.py", "--input", folder, "--model", "tiny:network", "--weights", "random")
    good = ray_job_submit(token_cluster, *job, "--output", tmp_path / "out")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "12 of 12 planned: 12 rows, 0 errors" in good.stdout
    assert verify(str(tmp_path / "out")).is_whole
    bad = ray_job_submit(token_cluster, *job, "--output", tmp_path / "other", "--batch-size", 0)
    assert bad.returncode == 1
    assert "--batch-size is 0: it must be at least 1" in bad.stdout
    assert "exit code 2" in bad.stdout + bad.stderr


def test_a_stopped_job_writes_its_report_and_can_be_resumed(token_cluster: RayCluster, tmp_path: Path) -> None:
    folder, out = write_folder(tmp_path / "images", 1_000), tmp_path / "out"
    job = (sys.executable, "jobs/embed.py", "--input", folder, "--output", out, *SLOW, "--rows-per-part", "16")
    started = ray_job_submit(token_cluster, *job, options=("--no-wait", "--submission-id", "to-be-stopped"))
    assert started.returncode == 0, started.stderr
    wait_for(lambda: count_commits(out) >= 2)
    stop = [Path(sys.executable).with_name("ray"), "job", "stop", "--address", token_cluster.dashboard, "to-be-stopped"]
    subprocess.run(stop, env={**os.environ, **token_cluster.environment}, check=True, capture_output=True, timeout=60)
    report = json.loads((out / "_report.json").read_text())
    assert report["status"] == "Interrupted"
    assert 32 <= report["rows"] < 1_000
    again = ray_job_submit(token_cluster, *job)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "images were done before, by earlier attempts" in again.stdout
    assert verify(str(out)).is_whole


def test_a_cluster_refuses_a_wrong_token(token_cluster: RayCluster) -> None:
    started = time.monotonic()
    done = ray_job_submit(token_cluster, "true", RAY_AUTH_TOKEN="f" * 32)
    assert done.returncode != 0
    assert time.monotonic() - started < 60


class Submission:
    """`python jobs/submit.py` in its own process; its output can be read while it runs."""

    def __init__(self, cluster: RayCluster, *arguments: object, **environment: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self._paths = [Path(folder) / name for name in ("out", "err")]
            self._files = [path.open("w") for path in self._paths]
            self._readers = [path.open() for path in self._paths]
        command = [sys.executable, str(ROOT / "jobs/submit.py"), *map(str, arguments)]
        if "--address" not in command:
            command[2:2] = ["--address", cluster.dashboard]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **cluster.environment, "PYTHONPATH": str(ROOT), **environment},
            stdin=subprocess.DEVNULL,
            stdout=self._files[0],
            stderr=self._files[1],
        )

    @property
    def out(self) -> str:
        return self._read(0)

    @property
    def err(self) -> str:
        return self._read(1)

    def _read(self, number: int) -> str:
        self._readers[number].seek(0)
        return self._readers[number].read()

    def end(self, code: int) -> "Submission":
        ended_with = self.process.wait(timeout=200)
        assert ended_with == code, f"ended with {ended_with}:\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err
        return self


TALK = """
import sys, time

lines, code = int(sys.argv[1]), int(sys.argv[2])
for number in range(lines):
    print("line", number, flush=True)
    time.sleep(0.1)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with one job: `talk LINES CODE`, which prints ten lines per second."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "jobs").mkdir()
    (folder / "jobs/talk.py").write_text(TALK)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


@pytest.fixture
def talk(token_cluster: RayCluster, project: Path) -> Callable[..., Submission]:
    """A function that submits `talk` with options, lines and exit code."""

    def start(*options: object, lines: int, code: int = 0) -> Submission:
        return Submission(token_cluster, "talk", "--no-pip", "--working-dir", project, *options, "--", lines, code)

    return start


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^line (\d+)$", text, re.MULTILINE)]


@pytest.mark.parametrize(
    ("kind", "code", "message"), [("good", 0, "12 rows, 0 errors"), ("bad", 3, "--max-error-rate")]
)
def test_submit_ends_with_the_exit_code_of_the_job(
    token_cluster: RayCluster, tmp_path: Path, kind: str, code: int, message: str
) -> None:
    folder = write_folder(tmp_path / "images", 12)
    if kind == "bad":
        for path in sorted(folder.iterdir())[:9]:
            path.write_bytes(b"no image")
    job = ("--input", folder, "--output", tmp_path / "out", *TINY)
    ended = Submission(token_cluster, "embed", "--", *job).end(code)
    assert message in ended.out
    assert f"exit code {code}" in ended.err
    assert "installs" not in ended.err, "the cluster has all packages"


def test_an_input_that_only_the_cluster_can_refuse_ends_with_2(token_cluster: RayCluster, tmp_path: Path) -> None:
    job = ("--input", tmp_path / "nothing", "--output", tmp_path / "out", *TINY)
    ended = Submission(token_cluster, "embed", "--no-pip", "--", *job).end(2)
    assert f"nightshift: --input {tmp_path}/nothing does not exist" in ended.out


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "Missing authentication token"),
        ({"RAY_AUTH_TOKEN": "f" * 32}, "Invalid authentication token"),
    ],
)
def test_a_missing_or_wrong_token_ends_with_one_line(
    token_cluster: RayCluster, project: Path, environment: dict[str, str], message: str
) -> None:
    arguments = ("talk", "--working-dir", project, "--", 1, 0)
    ended = Submission(token_cluster, *arguments, **environment).end(2)
    assert message in ended.err
    assert "set RAY_AUTH_MODE=token and" in ended.err
    assert ended.err.count("\n") == 1


def test_no_wait_then_attach_then_stop(token_cluster: RayCluster, talk: Callable[..., Submission]) -> None:
    started = talk("--submission-id", "long-talk", "--no-wait", lines=3000).end(0)
    assert "--attach long-talk" in started.err
    attached = Submission(token_cluster, "--attach", "long-talk")
    wait_for(lambda: len(numbers(attached.out)) > 20)
    assert "long-talk stopped" in Submission(token_cluster, "--stop", "long-talk").end(0).err
    attached.end(143)
    printed = numbers(attached.out)
    assert printed == list(range(len(printed)))
    assert "long-talk stopped, exit code 143" in attached.err
    assert "is the id of an earlier job" in talk("--submission-id", "long-talk", lines=1).end(2).err
    assert "has no job unknown" in Submission(token_cluster, "--attach", "unknown").end(1).err


def test_a_connection_that_is_cut_and_restored(token_cluster: RayCluster, talk: Callable[..., Submission]) -> None:
    with link(token_cluster.dashboard) as line:
        following = talk("--address", line.address, lines=150, code=7)
        wait_for(lambda: len(numbers(following.out)) > 20)
        line.cut()
        wait_for(lambda: "is unreachable" in following.err)
        line.restore()
        wait_for(lambda: "connected again" in following.err)
        line.cut()
        line.restore()
        following.end(7)
    assert numbers(following.out) == list(range(150))
    assert following.out.count("Running entrypoint") == 1


@pytest.mark.long
def test_a_connection_that_freezes_is_closed_and_opened_again(
    bare_cluster: RayCluster, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Runs in this process, with a shorter timeout for requests."""
    for name, value in {**bare_cluster.environment, "RAY_API_SERVER_ADDRESS": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(client, "REQUEST_TIMEOUT_SECONDS", 2.0)
    with link(bare_cluster.dashboard) as line:
        threading.Timer(8, line.freeze).start()
        threading.Timer(20, line.restore).start()
        arguments = ["talk", "--no-pip", "--working-dir", str(project), "--address", line.address, "--", "250", "7"]
        assert submit.main(arguments) == 7
    printed = capsys.readouterr()
    assert numbers(printed.out) == list(range(250))
    assert "is unreachable" in printed.err
    assert "connected again" in printed.err


@pytest.mark.long
def test_a_cluster_that_stays_unreachable(token_cluster: RayCluster, talk: Callable[..., Submission]) -> None:
    with link(token_cluster.dashboard) as line:
        following = talk("--address", line.address, "--reconnect-minutes", "0.05", lines=100, code=7)
        wait_for(lambda: len(numbers(following.out)) > 10)
        line.cut()
        following.end(1)
    (submission_id,) = re.findall(
        r"follow it again with: python jobs/submit\.py .* --attach (\S+)$", following.err, re.M
    )
    again = Submission(token_cluster, "--attach", submission_id).end(7)
    assert numbers(again.out) == list(range(100))


def test_an_interrupt_without_a_terminal_leaves_the_job_running(
    token_cluster: RayCluster, talk: Callable[..., Submission]
) -> None:
    following = talk("--submission-id", "left", lines=60, code=7)
    wait_for(lambda: len(numbers(following.out)) > 5)
    following.process.send_signal(signal.SIGINT)
    assert "the job continues; follow it with: python jobs/submit.py" in following.end(130).err
    Submission(token_cluster, "--attach", "left").end(7)


class Terminal:
    """`python jobs/submit.py` on its own terminal."""

    def __init__(self, cluster: RayCluster, *arguments: object) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, **cluster.environment, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, str(ROOT / "jobs/submit.py"), "--address", cluster.dashboard]
            os.execve(sys.executable, [*command, *map(str, arguments)], environment)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Wait until the text is shown, after the text of the last call."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.shown += os.read(self._terminal, 1 << 16).decode()
        self.shown = self.shown.partition(text)[2]

    def end(self) -> int:
        with contextlib.suppress(OSError):  # Linux raises it when the other end is closed
            while data := os.read(self._terminal, 1 << 16):
                self.shown += data.decode()
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.long
def test_an_interrupt_on_a_terminal_asks_whether_to_stop(
    token_cluster: RayCluster, talk: Callable[..., Submission]
) -> None:
    talk("--submission-id", "asked", "--no-wait", lines=3000).end(0)
    first = Terminal(token_cluster, "--attach", "asked")
    first.wait_for("line 5\r\n")
    first.type("\x03")
    first.wait_for("stop the job? [y/N]")
    first.type("n\n")
    first.wait_for("line 60\r\n")
    first.type("\x03")
    first.wait_for("stop the job? [y/N]")
    first.type("\x03")
    assert first.end() == 130
    assert "the job continues; follow it with" in first.shown
    second = Terminal(token_cluster, "--attach", "asked")
    second.wait_for("line 61\r\n")
    second.type("\x03")
    second.wait_for("stop the job? [y/N]")
    second.type("y\n")
    assert second.end() == 143
    assert "asked stopped, exit code 143" in second.shown


@pytest.fixture(scope="module")
def bare_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A cluster without tokens whose Python lacks this package and braceexpand, which pip can install from a folder.

    Its Python is a virtual environment of links, because Ray copies it before it runs pip.
    """
    folder = tmp_path_factory.mktemp("bare")
    packages = Path(sysconfig.get_path("purelib"))
    (folder / "packages").mkdir()
    (folder / "wheels").mkdir()
    for path in packages.iterdir():
        if not path.name.startswith(("braceexpand", "nightshift", "__editable__", "__pycache__")):
            (folder / "packages" / path.name).symlink_to(path)
    with zipfile.ZipFile(folder / "wheels/braceexpand-0.1.7-py2.py3-none-any.whl", "w") as wheel:
        for path in sorted(packages.glob("braceexpand*/**/*")):
            if path.is_file() and path.suffix != ".pyc":
                wheel.write(path, path.relative_to(packages))
    python = folder / "environment/bin/python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python.parents[1]], check=True)
    (site_packages,) = python.parents[1].glob("lib/python*/site-packages")
    (site_packages / "packages.pth").write_text(f"{folder / 'packages'}\n")
    environment = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": ""}
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheels")}
    process, cluster = start_ray_head({**environment, **pip}, python=python)
    yield RayCluster(cluster.address, cluster.dashboard, environment)
    stop_ray_head(process)


def test_a_cluster_without_the_package_installs_it_and_its_requirements(
    bare_cluster: RayCluster, tmp_path: Path
) -> None:
    folder, out = write_folder(tmp_path / "images", 12), tmp_path / "out"
    job = ("--input", folder / "{0000..0011}.jpg", "--output", out, *TINY)
    lacking = Submission(
        bare_cluster, "embed", "--no-pip", "--env", f"PYTHONPATH={ROOT / 'tests/support'}", "--", *job
    ).end(1)
    assert "No module named 'braceexpand'" in lacking.out
    ended = Submission(bare_cluster, "embed", "--env", f"PYTHONPATH={ROOT / 'tests/support'}", "--", *job).end(0)
    assert "each node installs braceexpand>=0.1.7 first" in ended.err
    assert verify(str(out)).is_whole


def test_a_secret_in_the_flags_reaches_only_the_job(bare_cluster: RayCluster, project: Path) -> None:
    uri = "https://user:planted@127.0.0.1:9/out?sig=planted"
    (project / "jobs/length.py").write_text("import sys; print(len(sys.argv[1]), 'characters')")
    ended = Submission(bare_cluster, "length", "--no-pip", "--working-dir", project, "--", uri).end(0)
    assert f"{len(uri)} characters" in ended.out
    assert "planted" not in ended.out + ended.err
    with urllib.request.urlopen(f"{bare_cluster.dashboard}/api/jobs/", timeout=30) as response:
        assert "planted" not in json.dumps([job["entrypoint"] for job in json.load(response)])
