"""Run a job of jobs/ on a Ray cluster, follow its log to the end, and end with its exit code.

    python jobs/submit.py embed --address http://127.0.0.1:8265 -- --input 's3://bucket/*.tar' --output s3://bucket/out
    python jobs/submit.py --address http://127.0.0.1:8265 --attach ID
    python jobs/submit.py --address http://127.0.0.1:8265 --stop ID

The job's own flags come after `--`. A connection that is lost is taken up again. A job that was stopped ends this with
143. Ctrl-C asks whether to stop the job; where nobody can be asked, it goes on and this ends with 130.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails

from jobs.submission import environment
from jobs.submission.client import Client, connect, submit
from jobs.submission.follow import Follower, exit_code
from jobs.submission.package import pack
from pipeline import cli, storage
from pipeline.config import RunConfig
from pipeline.errors import Interrupted, NightshiftError, SettingRefused
from pipeline.predictors import Classifier, Embedder

ROOT = Path(__file__).resolve().parents[1]
PREDICTORS = {"embed": Embedder, "classify": Classifier}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="submit.py [JOB] [flags] [-- the job's flags]",
    )
    add = found.add_argument
    add("job", metavar="JOB", nargs="?", help="embed, classify, or another script of jobs/")
    add("--address", metavar="URL", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, "
        "else http://127.0.0.1:8265)")  # fmt: skip
    add("--working-dir", metavar="FOLDER", type=Path, default=ROOT, help="what the cluster gets, less what its "
        ".gitignore names; at most 100 MB (default: this project)")  # fmt: skip
    add("--pip", action=argparse.BooleanOptionalAction, help="install the project's requirements on every node first "
        "(default: those that the cluster turns out to lack)")  # fmt: skip
    add("--requirement", metavar="REQ", action="append", default=[], help="one more package that the job needs")
    add("--env", metavar="NAME[=VALUE]", action="append", default=[], help="a variable for the job and its workers")
    add("--submission-id", metavar="ID", help="the job's name on the cluster (default: made up)")
    add("--wait", action=argparse.BooleanOptionalAction, default=True, help="follow the job to its end")
    add("--reconnect-minutes", metavar="M", type=float, default=10.0, help="how long the cluster may be out of reach")
    ids = found.add_mutually_exclusive_group()
    ids.add_argument("--attach", metavar="ID", help="follow a job that was submitted before")
    ids.add_argument("--stop", metavar="ID", help="stop a job, as Ctrl-C does")
    return found


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags before `--`, and the job's own after it."""
    end = list(words).index("--") if "--" in words else len(words)
    return parser().parse_args(words[:end]), list(words[end + 1 :])


def main(arguments: Sequence[str] | None = None) -> int:
    given, job_arguments = parse(sys.argv[1:] if arguments is None else arguments)
    return cli.guarded(lambda: work(given, job_arguments))


def work(given: argparse.Namespace, job_arguments: Sequence[str]) -> int:
    names = (given.address, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS"))
    address = next(filter(None, names), "http://127.0.0.1:8265")
    existing = given.attach or given.stop
    if bool(existing) == bool(given.job):
        raise SettingRefused("name a job to run (embed, classify, …), or one that runs with --attach ID or --stop ID")
    try:
        if not existing:
            check(given.job, job_arguments, given.working_dir)
            variables = environment.variables(given.env)
            required = environment.required(given.working_dir, given.requirement)
        client = connect(address)
        if given.stop:
            return stop(client, given.stop)
        submission_id = given.attach or send(client, given, job_arguments, variables, required)
        how_to_attach = f"python jobs/submit.py --address {storage.redact(address)} --attach {submission_id}"
        if not given.wait:
            cli.tell(f"it runs; follow it with: {how_to_attach}")
            return 0
        return attend(Follower(client, submission_id, given.reconnect_minutes * 60, how_to_attach))
    except AuthenticationError as error:
        raise SettingRefused(
            f"{storage.redact(address)} does not let this in ({error.message.splitlines()[0]}): set "
            "RAY_AUTH_MODE=token and, unless it is in ~/.ray/auth_token, RAY_AUTH_TOKEN to that cluster's token"
        ) from error
    except RuntimeError as error:  # of an answer that Ray's client does not expect
        raise NightshiftError(f"{storage.redact(address)}: {error}") from error
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None


def check(job: str, arguments: Sequence[str], folder: Path) -> None:
    """Refuse here what the job would refuse on the cluster, as far as its flags alone tell."""
    if not (folder / "jobs" / f"{job}.py").is_file():
        raise SettingRefused(f"{folder} has no jobs/{job}.py: name one of its jobs, or another --working-dir")
    if not (folder / "pyproject.toml").is_file():  # an installed package
        raise SettingRefused(f"--working-dir {folder} is no checkout of Nightshift: name one")
    if job not in PREDICTORS:
        return
    with contextlib.chdir(folder):  # where the job will look for --config
        run_values, predictor_values = cli.parse(PREDICTORS[job], "", arguments)
        RunConfig(**run_values)
        PREDICTORS[job](**predictor_values)
    output = run_values["output"]
    if storage.is_local(output) and not os.path.isabs(output):
        raise SettingRefused(
            f"--output {output} would be in the job's own copy of the project, which the cluster removes: name a "
            "bucket, or the absolute path of a folder that all nodes share"
        )


def send(
    client: Client,
    given: argparse.Namespace,
    arguments: Sequence[str],
    variables: dict[str, str],
    required: Sequence[str],
) -> str:
    """Submit the job; returns its id."""
    folder = given.working_dir.resolve()
    submission_id = given.submission_id or f"nightshift-{given.job}-{uuid.uuid4().hex[:8]}"
    entrypoint, secrets = environment.without_secrets(["python", f"jobs/{given.job}.py", *arguments])
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "project.zip"
        pack(folder, archive)
        runtime_env = {"working_dir": str(archive), "env_vars": {**variables, **secrets}}
        if needed := lacking(client, given, required, archive):
            runtime_env["pip"] = environment.pip(needed, folder)
            names = ", ".join(map(environment.without_url, needed))
            cli.tell(f"each node installs {names} first, which may take minutes")
        submit(client, submission_id, entrypoint, runtime_env)
    cli.tell(f"submitted {submission_id}: {entrypoint}")
    return submission_id


def lacking(client: Client, given: argparse.Namespace, required: Sequence[str], archive: Path) -> list[str]:
    """Which of the requirements the nodes have to install first."""
    if given.pip is False:
        return list(given.requirement)
    if given.pip:
        return [text for text in required if environment.is_installable(text)]
    return environment.missing(client, required, {"working_dir": str(archive)})


def attend(follower: Follower) -> int:
    """Follow the job to its end; Ctrl-C asks whether to stop it. Returns the exit code."""
    try:
        while True:
            try:
                return report(follower.submission_id, follower.follow())
            except KeyboardInterrupt:
                if wants_to_stop():
                    ask_to_stop(follower)
    except KeyboardInterrupt:
        cli.tell(f"the job goes on; follow it with: {follower.how_to_attach}")
        return Interrupted(signal.SIGINT).exit_code


def ask_to_stop(follower: Follower) -> None:
    try:
        follower.client.stop_job(follower.submission_id)
    except (OSError, RuntimeError) as error:
        how = follower.how_to_attach.replace("--attach", "--stop")
        cli.tell(f"the job could not be asked to stop ({error}) and goes on; ask it later with: {how}")


def wants_to_stop() -> bool:
    """Raises KeyboardInterrupt where there is nobody to ask, or the answer is another Ctrl-C."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise KeyboardInterrupt
    print("\nnightshift: stop the job? [y/N] (Ctrl-C again leaves it running) ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def stop(client: Client, submission_id: str) -> int:
    client.stop_job(submission_id)
    while not (details := client.get_job_info(submission_id)).status.is_terminal():
        time.sleep(0.3)
    report(submission_id, details)
    return 0


def report(submission_id: str, details: JobDetails) -> int:
    """Say how the job ended; returns its exit code."""
    code = exit_code(details)
    reason = f": {details.message}" if details.driver_exit_code is None and code == 1 else ""
    cli.tell(f"{submission_id} {details.status.lower()}, exit code {code}{reason}")
    return code


if __name__ == "__main__":
    sys.exit(main())
