"""Credentials of URIs: kept in the memory of this process and never written."""

from collections.abc import Iterable

from pipeline.storage.uris import redact

_FULL: dict[str, str] = {}


def hide_credentials(uri: str) -> str:
    """Return the URI without its credentials, and remember them: this process can still read the URI."""
    plain = redact(uri)
    if plain != uri:
        _FULL[plain] = uri
    return plain


def with_credentials(uris: Iterable[str]) -> list[str]:
    """The given URIs that have credentials, in full. Pass them to `hide_credentials` in a worker."""
    return [_FULL[uri] for uri in uris if uri in _FULL]


def full_uri(uri: str) -> str:
    """Add the credentials that were hidden, or the user and password of the closest folder above the URI."""
    if not _FULL or uri in _FULL or redact(uri) != uri:  # redact: the URI has credentials of its own
        return _FULL.get(uri, uri)
    folder = uri
    while folder not in _FULL and "/" in folder.partition("://")[2]:
        folder = folder.rpartition("/")[0]
    given = _FULL.get(folder, folder)
    return uri if "?" in given else given + uri[len(folder) :]
