"""Functions on the text of URIs: normalize, join, remove secrets. Only `is_glob` and `is_escape` do I/O.

A URI is an absolute local path ("/data/a.jpg"), or `scheme://…`.
"""

import os
import re

from pipeline.errors import message_line

BUCKET_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "azure", "adl")
"""Schemes that obstore serves."""

READ_ONLY_SCHEMES = ("http", "https", "data", "git", "github", "gist", "jlab", "jupyter", "libarchive", "reference")

_MOUNT = "mount the server, with rclone or davfs2, and name the local folder"
_S3 = "write s3://bucket/path, with the server in AWS_ENDPOINT_URL"
REMEDIES = {"webdav": _MOUNT, "webdavs": _MOUNT, "dav": _MOUNT, "davs": _MOUNT, "minio": _S3, "r2": _S3, "b2": _S3}
"""What to do instead, by scheme."""

PACKAGES = {"sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol", "github": "requests"}
"""The package that a scheme of fsspec needs."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRET_QUERY = re.compile(
    r"\?(?:[^?]*&)?(?:x-amz-|x-goog-|sig=|signature=|token=|key=|secret=|password=)", re.IGNORECASE
)


def redact(uri: str) -> str:
    """Remove what may be secret from a URI: user, password and query string.

    In object keys "?" and "#" are ordinary characters, and `container@account` is an address. So from the URI of a
    bucket's object only the parts that look like credentials are removed.
    """
    scheme, _, rest = with_lower_scheme(uri).partition("://")
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


def is_escape(path: str) -> bool:
    """True if a local path is the escaped form of a name that exists and is not UTF-8."""
    name = re.sub(rb"\\x([89a-f][0-9a-f])", lambda byte: bytes.fromhex(byte[1].decode()), path.encode())
    return is_local(path) and name != path.encode() and os.path.lexists(name)


def with_lower_scheme(uri: str) -> str:
    """The URI with its scheme in lower case. Schemes are the same in any case (RFC 3986, section 3.1)."""
    scheme = _SCHEME.match(uri)
    return scheme[0].lower() + uri[scheme.end() :] if scheme else uri


def normalize(uri: str) -> str:
    """Return the normal form of a URI: an absolute path for local files, no trailing slash, s3:// for s3a://."""
    scheme, _, rest = with_lower_scheme(uri).partition("://")
    if not rest:
        return os.path.abspath(os.path.expanduser(uri))
    if scheme == "file":
        return os.path.abspath("/" + rest.lstrip("/"))
    return f"{'s3' if scheme == 's3a' else scheme}://{rest.rstrip('/')}"


def check_uri(uri: str) -> str | None:
    """What is wrong with a URI that a user wrote, or None. Does no I/O; the store may still not exist."""
    uri = with_lower_scheme(uri)
    if typed := re.match(r"([a-z][a-z0-9+]+):/(?!/)", uri):
        return f"is neither a path nor a URI: write {typed[1]}://…, or ./{uri} for a local folder of that name"
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return None
    if not rest.partition("/")[0] and scheme in BUCKET_SCHEMES:
        return f"names no bucket: write {scheme}://bucket/path"
    if not rest.strip("/"):
        return f"is incomplete: write {scheme}://host/path"
    return None if scheme in BUCKET_SCHEMES else check_scheme(scheme)


def check_scheme(scheme: str) -> str | None:
    """Why fsspec cannot open URIs of a scheme, with the remedy, or None."""
    if scheme in REMEDIES:
        return f"has an unsupported scheme: {REMEDIES[scheme]}"
    import fsspec  # slow, and needed only for the other schemes

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = PACKAGES.get(scheme)
        reason = f"run pip install {package}" if package else message_line(error)
        return f"needs a package that is not installed: {reason}"
    except ValueError as error:
        return f"has an unsupported scheme: {message_line(error)}"
    return None


def check_output(uri: str) -> str | None:
    """What is wrong with the URI of an output, or None."""
    if problem := check_uri(uri):
        return problem
    scheme = with_lower_scheme(uri).partition("://")[0] if "://" in uri else ""
    if scheme == "memory":
        return "exists only in the memory of one process: use a directory or a bucket"
    if scheme in READ_ONLY_SCHEMES:
        return f"cannot be written, {scheme}:// is read only: use a directory or a bucket"
    path = normalize(uri)
    if is_local(path) and re.match(r"/(proc|sys|dev)(/|$)", path) and not path.startswith("/dev/shm/"):
        return "is in a file system of the kernel, which stores no files: use another directory"
    return None


def join(base: str, name: str) -> str:
    """Append a name to a folder or prefix. If `base` is empty, the name is a whole URI."""
    return f"{base.rstrip('/')}/{name}" if base else name


def is_local(uri: str) -> bool:
    return "://" not in uri


def is_glob(uri: str) -> bool:
    """True if the URI has the characters of a glob and is not the name of a local file."""
    return any(c in uri for c in "*?[") and not (is_local(uri) and os.path.exists(uri))
