"""Client of a Ray dashboard: Ray's own, with a timeout for every request and readable errors."""

import logging
import os
import time
import uuid
from typing import Any

from ray.job_submission import JobSubmissionClient

from pipeline.errors import NightshiftError, SettingRefused
from pipeline.storage import uris

REQUEST_TIMEOUT_SECONDS = 30.0
"""Of one request: to connect, and to wait for each piece of the response."""

START_TIMEOUT_SECONDS = 60.0
"""How long to retry `submit` on a cluster that has just started and does not accept jobs yet."""

REQUEST = "nightshift_request"
"""Key in a job's metadata. Its value identifies the call of `submit` that started the job."""


class Client(JobSubmissionClient):
    """Ray's client with a timeout. Without one, a request waits for ever after its connection is lost silently."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": REQUEST_TIMEOUT_SECONDS, **options})


def connect(address: str) -> Client:
    """Connect to a dashboard. Raises SettingRefused if none answers, Ray's AuthenticationError for a wrong token."""
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # in Ray the environment overrides the argument
    try:
        client = Client(address)
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingRefused(
            f"--address {uris.redact(address)}: no Ray dashboard answers there ({error}); use http://HOST:8265, and "
            "forward the port if the cluster is not in your network"
        ) from error
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they log each upload and each end of a stream
    return client


def submit(client: Client, submission_id: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
    """Submit a job exactly once, and retry if a response is lost or the cluster has just started.

    Raises SettingRefused if another job has the id, and NightshiftError if the cluster does not accept the job.
    """
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    request = {REQUEST: uuid.uuid4().hex}  # identifies the job if the response to its request is lost
    while True:
        try:
            return _submit_once(client, submission_id, request, entrypoint=entrypoint, runtime_env=runtime_env)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "No available agent" not in str(error):
                raise NightshiftError(f"the cluster does not accept the job: {error}") from error
            if time.monotonic() > deadline:
                raise NightshiftError(
                    f"the cluster accepted no job for {START_TIMEOUT_SECONDS:g} seconds: {error}; try again later"
                ) from error
            time.sleep(1)


def _submit_once(client: Client, submission_id: str, request: dict[str, str], **job: Any) -> None:
    """Send one request. If the job exists with the same request id, an earlier response was lost."""
    try:
        client.submit_job(submission_id=submission_id, metadata=request, **job)
    except RuntimeError as error:
        if f"{submission_id} already exists" not in str(error):
            raise
        if not request.items() <= (client.get_job_info(submission_id).metadata or {}).items():
            raise SettingRefused(
                f"--submission-id {submission_id} is the id of an earlier job: use another one"
            ) from error
