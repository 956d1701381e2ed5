"""Run a job of jobs/ on a Ray cluster, follow its log to the end, and exit with its exit code.

    python jobs/submit.py embed --address http://127.0.0.1:8265 -- --input 's3://bucket/*.tar' --output s3://bucket/out
    python jobs/submit.py --address http://127.0.0.1:8265 --attach ID
    python jobs/submit.py --address http://127.0.0.1:8265 --stop ID

The job's own flags come after `--`. A lost connection is opened again. If the job was stopped, the exit code is 143.
Ctrl-C asks whether to stop the job; if the job continues, or without a terminal to ask, the exit code is 130.
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
from pipeline import cli
from pipeline.config import RunConfig
from pipeline.errors import Interrupted, NightshiftError, SettingRefused
from pipeline.predictors.classify import Classifier
from pipeline.predictors.embed import Embedder
from pipeline.report.messages import MessageFlags
from pipeline.storage import uris

ROOT = Path(__file__).resolve().parents[1]
PREDICTORS = {"embed": Embedder, "classify": Classifier}


def parser() -> cli.Parser:
    submit_parser = cli.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="submit.py [JOB] [flags] [-- the job's flags]",
    )
    add = submit_parser.add_argument
    add("job", metavar="JOB", nargs="?", help="embed, classify, or another script of jobs/")
    add("--address", metavar="URL", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, "
        "else http://127.0.0.1:8265)")  # fmt: skip
    add("--working-dir", metavar="FOLDER", type=Path, default=ROOT, help="folder to send to the cluster, "
        "without what its .gitignore names; at most 100 MB (default: this project)")  # fmt: skip
    add("--pip", action=argparse.BooleanOptionalAction, help="install all requirements of the project on every node "
        "first, or none (default: those that the cluster lacks)")  # fmt: skip
    add("--requirement", metavar="REQ", action="append", default=[], help="one more package that the job needs")
    add("--env", metavar="NAME[=VALUE]", action="append", default=[], help="a variable for the job and its workers")
    add("--submission-id", metavar="ID", help="the job's name on the cluster (default: generated)")
    add("--wait", action=argparse.BooleanOptionalAction, default=True, help="follow the job to its end")
    add("--reconnect-minutes", metavar="M", type=float, default=10.0, help="how long the cluster may be unreachable")
    ids = submit_parser.add_mutually_exclusive_group()
    ids.add_argument("--attach", metavar="ID", help="follow a job that was submitted before")
    ids.add_argument("--stop", metavar="ID", help="stop a job, as Ctrl-C does")
    return submit_parser


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the flags before `--`; also return the job's own, after it."""
    end = list(words).index("--") if "--" in words else len(words)
    return parser().parse_args(words[:end]), list(words[end + 1 :])


def main(arguments: Sequence[str] | None = None) -> int:
    flags, job_arguments = parse(sys.argv[1:] if arguments is None else arguments)
    return cli.guarded(lambda: work(flags, job_arguments))


def work(flags: argparse.Namespace, job_arguments: Sequence[str]) -> int:
    """Submit, follow or stop a job, as the flags say; return the exit code."""
    addresses = (flags.address, os.environ.get("RAY_API_SERVER_ADDRESS"), os.environ.get("RAY_ADDRESS"))
    address = next(filter(None, addresses), "http://127.0.0.1:8265")
    existing = flags.attach or flags.stop
    if bool(existing) == bool(flags.job):
        raise SettingRefused("name a job to run (embed, classify, …), or a submitted one with --attach ID or --stop ID")
    try:
        if not existing:
            check(flags.job, job_arguments, flags.working_dir)
            variables = environment.variables(flags.env)
            required = environment.required(flags.working_dir, flags.requirement)
        client = connect(address)
        if flags.stop:
            return stop(client, flags.stop)
        submission_id = flags.attach or send(client, flags, job_arguments, variables, required)
        attach_command = f"python jobs/submit.py --address {uris.redact(address)} --attach {submission_id}"
        if not flags.wait:
            cli.log(f"the job runs; follow it with: {attach_command}")
            return 0
        return follow(Follower(client, submission_id, flags.reconnect_minutes * 60, attach_command))
    except AuthenticationError as error:
        raise SettingRefused(
            f"{uris.redact(address)} refuses access ({error.message.splitlines()[0]}): set RAY_AUTH_MODE=token and, "
            "unless the cluster's token is in ~/.ray/auth_token, RAY_AUTH_TOKEN"
        ) from error
    except RuntimeError as error:  # a response that Ray's client does not expect
        raise NightshiftError(f"{uris.redact(address)}: {error}") from error
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None


def check(job: str, arguments: Sequence[str], folder: Path) -> None:
    """Check the flags before the job is submitted. Raises SettingRefused, as the job would on the cluster."""
    if not (folder / "jobs" / f"{job}.py").is_file():
        raise SettingRefused(f"{folder} has no jobs/{job}.py: use one of its jobs, or another --working-dir")
    if not (folder / "pyproject.toml").is_file():  # such as an installed package
        raise SettingRefused(f"--working-dir {folder} is not a checkout of Nightshift: use a checkout")
    if job not in PREDICTORS:
        return
    with contextlib.chdir(folder):  # the job will look for --config there
        run_values, predictor_values, _ = cli.parse(PREDICTORS[job], "", arguments, MessageFlags)
        RunConfig(**run_values)
        PREDICTORS[job](**predictor_values)
    output = run_values["output"]
    if uris.is_local(output) and not os.path.isabs(output):
        raise SettingRefused(
            f"--output {output} would be in the job's own copy of the project, which the cluster removes: use a "
            "bucket, or the absolute path of a folder that all nodes share"
        )


def send(
    client: Client,
    flags: argparse.Namespace,
    arguments: Sequence[str],
    variables: dict[str, str],
    required: Sequence[str],
) -> str:
    """Submit the job; return its id."""
    folder = flags.working_dir.resolve()
    submission_id = flags.submission_id or f"nightshift-{flags.job}-{uuid.uuid4().hex[:8]}"
    entrypoint, secrets = environment.extract_secrets(["python", f"jobs/{flags.job}.py", *arguments])
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "project.zip"
        pack(folder, archive)
        runtime_env = {"working_dir": str(archive), "env_vars": {**variables, **secrets}}
        if to_install := requirements_to_install(client, flags, required, archive):
            runtime_env["pip"] = environment.pip(to_install, folder)
            names = ", ".join(map(environment.hide_url, to_install))
            cli.log(f"each node installs {names} first, which may take minutes")
        submit(client, submission_id, entrypoint, runtime_env)
    cli.log(f"submitted {submission_id}: {entrypoint}")
    return submission_id


def requirements_to_install(
    client: Client, flags: argparse.Namespace, required: Sequence[str], archive: Path
) -> list[str]:
    """The requirements that the nodes have to install first."""
    if flags.pip is False:
        return list(flags.requirement)
    if flags.pip:
        return [text for text in required if environment.is_installable(text)]
    return environment.missing(client, required, {"working_dir": str(archive)})


def follow(follower: Follower) -> int:
    """Follow the job to its end; Ctrl-C asks whether to stop it. Return the exit code."""
    try:
        while True:
            try:
                return report(follower.submission_id, follower.follow())
            except KeyboardInterrupt:
                if confirm_stop():
                    request_stop(follower)
    except KeyboardInterrupt:
        cli.log(f"the job continues; follow it with: {follower.attach_command}")
        return Interrupted(signal.SIGINT).exit_code


def request_stop(follower: Follower) -> None:
    """Ask the cluster to stop the job, without waiting for its end."""
    try:
        follower.client.stop_job(follower.submission_id)
    except (OSError, RuntimeError) as error:
        stop_command = follower.attach_command.replace("--attach", "--stop")
        cli.log(f"the request to stop the job failed ({error}), and the job continues; stop it with: {stop_command}")


def confirm_stop() -> bool:
    """Ask on the terminal whether to stop the job. Raises KeyboardInterrupt without a terminal, and at Ctrl-C."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise KeyboardInterrupt
    print("\nnightshift: stop the job? [y/N] (Ctrl-C again leaves it running) ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def stop(client: Client, submission_id: str) -> int:
    """Stop a job and wait for its end."""
    client.stop_job(submission_id)
    while not (details := client.get_job_info(submission_id)).status.is_terminal():
        time.sleep(0.3)
    report(submission_id, details)
    return 0


def report(submission_id: str, details: JobDetails) -> int:
    """Print how the job ended; return its exit code."""
    code = exit_code(details)
    reason = f": {details.message}" if details.driver_exit_code is None and code == 1 else ""
    cli.log(f"{submission_id} {details.status.lower()}, exit code {code}{reason}")
    return code


if __name__ == "__main__":
    cli.leave(main())
