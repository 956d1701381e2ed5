"""Retries for all stores. Sorts errors into transient ones, permanent ones, and those of a whole store."""

import contextlib
import ftplib
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
from pipeline.storage.base import Changed, TooLarge
from pipeline.storage.uris import redact

RETRY_SECONDS = 150.0
FIRST_PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 10.0

T = TypeVar("T")

on_retry: Callable[[str, float], object] = lambda fault, waited_seconds: None  # noqa: E731
"""Called before each retry with the fault and the seconds since the first attempt. Jobs show it to the user."""

_BUILTIN_ERRORS: dict[type[Exception], type[OSError]] = {
    obstore.exceptions.NotFoundError: FileNotFoundError,
    obstore.exceptions.PermissionDeniedError: PermissionError,
    obstore.exceptions.UnauthenticatedError: PermissionError,
    obstore.exceptions.AlreadyExistsError: FileExistsError,
    obstore.exceptions.PreconditionError: Changed,
    obstore.exceptions.InvalidPathError: FileNotFoundError,
}
"""The builtin exception for each permanent error of obstore."""

# Error codes of S3, Google Cloud Storage and Azure that concern the whole store. AccessDenied may concern one object.
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
# Error codes with a 4xx status that are transient all the same.
_TRANSIENT_CODES = {"BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout"}


_EXPLAINED = {
    "TooManyRedirects": "the server redirects too many times, perhaps in a circle",
    "InvalidUrlRedirectClientError": "the server redirects to a URL that is not valid",
    "NonHttpUrlRedirectClientError": "the server redirects to a URL that is not http",
    "InvalidUrlClientError": "the URL is not valid",
}
"""Exceptions of aiohttp without a sentence → what happened."""


class Exhausted(OSError):
    """A transient fault lasted longer than the retries."""


def _retry_seconds() -> float:
    text = os.environ.get("NIGHTSHIFT_RETRY_SECONDS", "")
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text or RETRY_SECONDS)) < float("inf"):
            return seconds
    raise SettingRefused(f"NIGHTSHIFT_RETRY_SECONDS is {text!r}; it must be a number of seconds, 0 or more")


def with_retries(action: Callable[[], T], limit_seconds: float | None = None) -> T:
    """Call `action`; after a transient fault call it again, at least once, until `limit_seconds` have passed.

    limit_seconds: None means NIGHTSHIFT_RETRY_SECONDS. Raises the permanent error of `action`, or Exhausted.
    """
    limit_seconds = _retry_seconds() if limit_seconds is None else limit_seconds
    started, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    for attempts in itertools.count(1):
        try:
            return action()
        except Exception as error:  # each library has its own exceptions; this is the one place that sorts them
            permanent = permanent_error(error)
            if permanent is error:
                raise
            if permanent:
                raise permanent from error
            waited = time.monotonic() - started
            if attempts > 1 and waited + pause > limit_seconds:
                raise Exhausted(f"{_one_line(error)} ({attempts} attempts in {waited:.0f} s)") from error
            fault = error
        on_retry(_one_line(fault), time.monotonic() - started)
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 2, MAX_PAUSE_SECONDS)
    raise AssertionError


def refusal_of(root: str, error: Exception) -> StorageRefused | None:
    """The error that ends the run if a whole bucket cannot be used and a retry would not help, else None."""
    code, message = code_of(error)
    remedy = "then run the same command again to continue"
    if code in _BUCKET_MISSING:
        return StorageRefused(f"{root} does not exist ({code}): {message}; check its name, {remedy}")
    if code in _CREDENTIALS_REFUSED or isinstance(error, obstore.exceptions.UnauthenticatedError):
        reason = f"{code}: {message}" if code else _one_line(error)
        return StorageRefused(f"{root} rejects the credentials ({reason}); renew or correct them, {remedy}")
    return None


def permanent_error(error: Exception) -> Exception | None:
    """The permanent error to raise, or None if a retry may help."""
    if isinstance(error, FileNotFoundError) and "\n" in str(error):
        return FileNotFoundError(_one_line(error))
    permanent = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, Changed, TooLarge)
    if isinstance(error, (Refused, *permanent)):
        return error
    if code_of(error)[0] in _TRANSIENT_CODES:
        return None
    if type(error) in _BUILTIN_ERRORS:
        return _BUILTIN_ERRORS[type(error)](_one_line(error))
    if re.search(r"source: (NotPartial|NoContentRange|ParseContentRange|UnexpectedRange)", str(error)):
        return OSError(f"the server does not support ranges: {_one_line(error)}")
    if type(error).__name__ in _EXPLAINED:
        return OSError(_EXPLAINED[type(error).__name__])
    if isinstance(error, ftplib.error_perm):
        kinds = {"530": PermissionError, "550": FileNotFoundError}
        return kinds.get(str(error)[:3], OSError)(_one_line(error))
    if isinstance(error, ValueError) and "parse path" in str(error):  # obstore rejects the key
        return OSError(f"{_one_line(error)}; rename the object")
    if type(error).__name__ == "AuthenticationException":  # of paramiko, which is not a dependency
        return PermissionError(_one_line(error))
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
    """HTTP status of the response that caused the error; 0 if there was no response."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    match = re.search(r"non-2xx status code: (\d+)", str(error))
    return int(match[1]) if match else 0


def code_of(error: Exception) -> tuple[str, str]:
    """Error code and message in the XML of the store's response; two empty strings if there is none."""
    match = re.search(r"<Code>(\w+)</Code>(?:\s*<Message>([^<]*))?", str(error))
    return (match[1], (match[2] or "").strip().partition("\n")[0]) if match else ("", "")


def _one_line(error: Exception) -> str:
    """The error in one line, without XML and without secrets in URLs."""
    text = str(error).partition("\n")[0].partition("<?xml")[0].rstrip(": ") or type(error).__name__
    text = re.sub(r"https?://\S+", lambda url: redact(url[0]), text, flags=re.IGNORECASE)
    code, message = code_of(error)
    kind = re.search(r"HttpError \{\s*kind: (\w+)", str(error))  # only this names an interruption or a timeout
    return f"{text}{f': {code}: {message}' if code else ''}{f' ({kind[1]})' if kind else ''}"
