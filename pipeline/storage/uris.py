"""Functions on the text of URIs: normalize, join, remove secrets. Only `is_glob` does I/O.

A URI is an absolute local path ("/data/a.jpg"), or `scheme://…`.
"""

import os
import re

_SECRET_QUERY = re.compile(
    r"\?(?:[^?]*&)?(?:x-amz-|x-goog-|sig=|signature=|token=|key=|secret=|password=)", re.IGNORECASE
)


def redact(uri: str) -> str:
    """Remove what may be secret from a URI: user, password and query string.

    In object keys "?" and "#" are ordinary characters, and `container@account` is an address. So from the URI of a
    bucket's object only the parts that look like credentials are removed.
    """
    scheme, _, rest = uri.partition("://")
    if not rest:
        return uri
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if scheme in ("http", "https"):
        authority, path = host.partition("?")[0], re.split(r"[?#]", path, maxsplit=1)[0]
    else:
        authority = host if ":" in user else user + at + host
        if secret := _SECRET_QUERY.search(path):
            path = path[: secret.start()]
    return f"{scheme}://{authority}{slash}{path}"


def escaped(name: str) -> str:
    r"""Escape the bytes of a file name that are not UTF-8, as in `\xe9`. The result does not open the file."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def normalize(uri: str) -> str:
    """Return the normal form of a URI: an absolute path for local files, no trailing slash, s3:// for s3a://."""
    scheme, _, rest = uri.partition("://")
    if not rest:
        return os.path.abspath(os.path.expanduser(uri))
    if scheme == "file":
        return os.path.abspath("/" + rest.lstrip("/"))
    return f"{'s3' if scheme == 's3a' else scheme}://{rest.rstrip('/')}"


def join(base: str, name: str) -> str:
    """Append a name to a folder or prefix. If `base` is empty, the name is a whole URI."""
    return f"{base.rstrip('/')}/{name}" if base else name


def is_local(uri: str) -> bool:
    return "://" not in uri


def is_glob(uri: str) -> bool:
    """True if the URI has the characters of a glob and is not the name of a local file."""
    return any(c in uri for c in "*?[") and not (is_local(uri) and os.path.exists(uri))
