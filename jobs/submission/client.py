"""Ray's client of a cluster's dashboard, with an end to every request and sentences for errors."""

import logging
import os
import time
import uuid
from typing import Any

from ray.job_submission import JobSubmissionClient

from pipeline import storage
from pipeline.errors import NightshiftError, SettingRefused

REQUEST_TIMEOUT_S = 30.0
"""Of one request, for each piece of its answer."""

START_PATIENCE_S = 60.0
"""A cluster that has only just started takes no jobs yet."""


REQUEST = "nightshift_request"
"""Of a job's metadata: which call of `submit` it comes from."""


class Client(JobSubmissionClient):
    """Ray sets no limit, and waits for ever where a connection was lost without a word."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": REQUEST_TIMEOUT_S, **options})


def connect(address: str) -> Client:
    """Raises SettingRefused where no dashboard answers, and Ray's AuthenticationError where it wants another token."""
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers the environment to what it is given
    try:
        client = Client(address)
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingRefused(
            f"--address {storage.redact(address)}: no Ray dashboard answers there ({error}); name it as "
            "http://HOST:8265, and forward the port if the cluster is not in your network"
        ) from error
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of each upload and each end of a stream
    return client


def submit(client: Client, submission_id: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
    """Submit once, however many requests that takes. Raises SettingRefused if the id is another job's."""
    deadline = time.monotonic() + START_PATIENCE_S
    mark = {REQUEST: uuid.uuid4().hex}  # by it a job is known that an unanswered request has started
    while True:
        try:
            return _submit_once(client, submission_id, mark, entrypoint=entrypoint, runtime_env=runtime_env)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "No available agent" not in str(error):
                raise NightshiftError(f"the cluster does not take the job: {error}") from error
            if time.monotonic() > deadline:
                raise NightshiftError(f"the cluster took no job for {START_PATIENCE_S:g} seconds: {error}") from error
            time.sleep(1)


def _submit_once(client: Client, submission_id: str, mark: dict[str, str], **job: Any) -> None:
    """One request. A job that is there already is this one if it bears its mark: the answer was lost."""
    try:
        client.submit_job(submission_id=submission_id, metadata=mark, **job)
    except RuntimeError as error:
        if f"{submission_id} already exists" not in str(error):
            raise
        if not mark.items() <= (client.get_job_info(submission_id).metadata or {}).items():
            raise SettingRefused(f"--submission-id {submission_id} is an earlier job's: name another") from error
