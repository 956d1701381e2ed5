"""Which faults pass, which last, which are about a whole store; and trying again, in one place for every store."""

import contextlib
import itertools
import os
import random
import re
import socket
import time
from collections.abc import Callable
from typing import TypeVar

import obstore
import obstore.exceptions

from pipeline.errors import Refused, SettingRefused, StorageRefused
from pipeline.stores.base import Changed, TooLarge, redact

RETRY_SECONDS = 150.0
FIRST_PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 10.0

T = TypeVar("T")

_MEANING: dict[type[Exception], type[OSError]] = {
    obstore.exceptions.NotFoundError: FileNotFoundError,
    obstore.exceptions.PermissionDeniedError: PermissionError,
    obstore.exceptions.UnauthenticatedError: PermissionError,
    obstore.exceptions.AlreadyExistsError: FileExistsError,
    obstore.exceptions.PreconditionError: Changed,
    obstore.exceptions.InvalidPathError: FileNotFoundError,
}


# Error codes of S3, Google and Azure that are about the whole store. AccessDenied is not: it may be one object's.
_BUCKET_MISSING = {"ContainerNotFound", "InvalidBucketName", "NoSuchBucket"}
_CREDENTIALS_REFUSED = {
    "AccountIsDisabled",
    "AccountProblem",
    "AllAccessDisabled",
    "AuthenticationFailed",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidAuthenticationInfo",
    "InvalidSecurity",
    "InvalidToken",
    "NoAuthenticationInformation",
    "NotSignedUp",
    "RequestExpired",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
# Those that come with a status of 4xx and may pass all the same.
_PASSING = {"BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout"}


class Exhausted(OSError):
    """A fault that may pass has not passed in time."""


def _retry_seconds() -> float:
    given = os.environ.get("NIGHTSHIFT_RETRY_SECONDS", "")
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(given or RETRY_SECONDS)) < float("inf"):
            return seconds
    raise SettingRefused(f"NIGHTSHIFT_RETRY_SECONDS is {given!r}; it must be a number of seconds, 0 or more")


def retried(action: Callable[[], T], limit_seconds: float | None = None) -> T:
    """Do it; after a fault that may pass again, at least once more, until `limit_seconds` are over."""
    limit_seconds = _retry_seconds() if limit_seconds is None else limit_seconds
    started, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    for tries in itertools.count(1):
        try:
            return action()
        except Exception as error:  # every library has errors of its own; they are sorted here, once
            lasting = lasting_fault(error)
            if lasting is error:
                raise
            if lasting:
                raise lasting from error
            waited = time.monotonic() - started
            if tries > 1 and waited + pause > limit_seconds:
                raise Exhausted(f"{_one_line(error)} ({tries} tries in {waited:.0f} s)") from error
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 2, MAX_PAUSE_SECONDS)
    raise AssertionError


def refusal_of(root: str, error: Exception) -> StorageRefused | None:
    """The end of the run, if a whole bucket is out of reach and a try again would hear the same."""
    code, message = code_of(error)
    go_on = "then run the same command again, it goes on where it stopped"
    if code in _BUCKET_MISSING:
        return StorageRefused(f"{root} is not there ({code}): {message}; check its name, {go_on}")
    if code in _CREDENTIALS_REFUSED or isinstance(error, obstore.exceptions.UnauthenticatedError):
        said = f"{code}: {message}" if code else _one_line(error)
        return StorageRefused(f"{root} does not take the credentials ({said}); renew or correct them, {go_on}")
    return None


def lasting_fault(error: Exception) -> Exception | None:
    """The error that says what a try again would say too; None for a fault that may pass."""
    if isinstance(error, FileNotFoundError) and "\n" in str(error):
        return FileNotFoundError(_one_line(error))
    lasting = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, Changed, TooLarge)
    if isinstance(error, (Refused, *lasting)):
        return error
    if code_of(error)[0] in _PASSING:
        return None
    if type(error) in _MEANING:
        return _MEANING[type(error)](_one_line(error))
    status = status_of(error)
    if status in (401, 403):
        return PermissionError(_one_line(error))
    if status in (404, 410):
        return FileNotFoundError(_one_line(error))
    if 400 <= status < 500 and status not in (408, 429):
        return OSError(_one_line(error))
    if (
        isinstance(error, (socket.gaierror, ValueError, TypeError, NotImplementedError))
        or "DNS" in type(error).__name__
    ):
        return OSError(_one_line(error))
    return None


def status_of(error: Exception) -> int:
    """Of the HTTP answer that the error is about; 0 if there was none."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    found = re.search(r"non-2xx status code: (\d+)", str(error))
    return int(found[1]) if found else 0


def code_of(error: Exception) -> tuple[str, str]:
    """The store's own error code and message, as its XML gives them; empty where there is none."""
    found = re.search(r"<Code>(\w+)</Code>(?:\s*<Message>([^<]*))?", str(error))
    return (found[1], (found[2] or "").strip()) if found else ("", "")


def _one_line(error: Exception) -> str:
    """What went wrong, without markup, and without what may be secret in URLs."""
    text = str(error).partition("\n")[0].partition("<?xml")[0].rstrip(": ") or type(error).__name__
    text = re.sub(r"https?://\S+", lambda url: redact(url[0]), text)
    code, message = code_of(error)
    kind = re.search(r"HttpError \{\s*kind: (\w+)", str(error))  # an interruption or a timeout, else not told
    return f"{text}{f': {code}: {message}' if code else ''}{f' ({kind[1]})' if kind else ''}"
