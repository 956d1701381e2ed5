"""Lists the objects of one input, and merges the lists of several."""

import contextlib
import heapq
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace

from pipeline.errors import InputRefused
from pipeline.sources import source_of
from pipeline.sources.base import MAGIC_BYTES, Compound, starts_as_image
from pipeline.sources.objects import SOURCE as SOURCE_OF_UNNAMED
from pipeline.sources.suffixes import NO_SUFFIX, suffix_of
from pipeline.storage import access, uris
from pipeline.storage.base import BrokenLink, Hidden, ObjectInfo, Unread

WEB = ("http://", "https://")


def objects_of(name: str) -> Iterator[ObjectInfo]:
    """The objects of one input: the matches of a glob, the object itself, or all objects below a folder."""
    if uris.is_glob(name):
        yield from filter(_is_counted, access.list_glob(name, with_unread=True))
    elif info := file_of(name):
        yield info
    else:
        yield from filter(_is_counted, _below(name))


def _is_counted(info: ObjectInfo) -> bool:
    """True for objects that are read or left out: no markers, and of hidden files only those of images and shards."""
    if not isinstance(info, Hidden):
        return not _is_marker(info)
    name = info.uri.rpartition("/")[2]
    return not name or (not name.startswith("._") and source_of(name.lstrip(".")) is not None)


def why_left_out(info: ObjectInfo) -> str:
    """Why an object is not read, if not because of its suffix; else an empty text."""
    kinds = {Misfit: "beside the template", Hidden: "hidden", BrokenLink: "broken link"}
    return kinds.get(type(info), "")


def _is_marker(info: ObjectInfo) -> bool:
    """True for an empty object such as `a/` that marks a folder. A store lists it as `a`, which does not exist."""
    if (
        info.size_bytes or isinstance(info, Unread) or uris.is_local(info.uri) or info.uri.startswith(WEB)
    ):  # a web server may give no size
        return False
    if not is_ours(info):
        return suffix_of(info.uri) == NO_SUFFIX
    try:
        access.head(info.uri)
    except FileNotFoundError:
        return True
    except OSError:  # an image with an odd key, which becomes an error row
        return False
    return False


def file_of(name: str) -> ObjectInfo | None:
    """The image or shard that an input names; None for a folder or prefix, whatever suffix its name has."""
    if source_of(name) is None or (uris.is_local(name) and os.path.isdir(name)):
        return None
    try:
        info = existing(name)
    except InputRefused as error:
        if isinstance(error.__cause__, FileNotFoundError) and _has_objects_below(name):
            return None
        raise
    return info if info.size_bytes or not _has_objects_below(name) else None  # empty: the marker of a folder


def _has_objects_below(name: str) -> bool:
    if uris.is_local(name) or name.startswith(WEB):  # a web server would send the object itself
        return False
    try:
        return next(access.list_objects(name), None) is not None
    except (OSError, ValueError, NotImplementedError):
        return False


def _below(folder: str) -> Iterator[ObjectInfo]:
    """The objects below a folder, or the object itself if it is no folder."""
    try:
        objects = access.list_objects(folder, with_unread=True)
        first = next(objects, None)
    except NotADirectoryError:
        yield access.head(folder)
        return
    if first is not None:
        yield first
        yield from objects
    elif not uris.is_local(folder) and suffix_of(folder) != NO_SUFFIX:
        with contextlib.suppress(OSError):  # an empty prefix
            yield access.head(folder)


def merge(streams: Iterable[Iterator[ObjectInfo]]) -> Iterator[ObjectInfo]:
    """Merge sorted streams. Inputs may overlap; each object is yielded once.

    Raises InputRefused if images are not sorted. Other objects need not be, such as the marker `a/` of a folder, which
    a store lists as `a`, but after `a-b/c.jpg`.
    """
    last = last_image = ""
    for info in heapq.merge(*streams, key=lambda info: (info.uri, not is_ours(info))):
        if info.uri == last:
            continue
        last = info.uri
        if is_ours(info):
            if info.uri < last_image:
                raise InputRefused(
                    f"{info.uri} was listed after {last_image}: this store does not list in order; give its folders "
                    "one by one"
                )
            last_image = info.uri
        yield info


def exists(name: str) -> bool:
    try:
        access.head(name)
    except OSError:
        return False
    return True


def existing(name: str) -> ObjectInfo:
    """Size and etag of an input. Raises InputRefused if it does not exist or cannot be read."""
    try:
        return access.head(name)
    except FileNotFoundError as error:
        raise InputRefused(f"--input {name} does not exist") from error
    except OSError as error:
        raise InputRefused(f"--input {name} cannot be read: {error}") from error


def is_ours(info: ObjectInfo) -> bool:
    """True for images and shards."""
    if isinstance(info, Misfit | Unread):
        return False
    return isinstance(info, UnnamedImage | Compound) or source_of(info.uri) is not None


class Misfit(ObjectInfo):
    """A file in the folders of a template whose name does not fit the template."""

    __slots__ = ()


class UnnamedImage(ObjectInfo):
    """A loose image whose name has no suffix of an image."""

    __slots__ = ()


def by_first_bytes(info: ObjectInfo) -> ObjectInfo:
    """The object as an UnnamedImage if only its first bytes are those of an image."""
    if is_ours(info) or isinstance(info, Unread):
        return info
    try:
        with access.open_read(info.uri) as file:
            head = getattr(file, "raw", file).read(MAGIC_BYTES)  # without the buffer, which reads more
    except OSError:  # removed meanwhile, or no file
        return info
    return UnnamedImage(info.uri, info.size_bytes, info.etag) if starts_as_image(head) else info


def with_utf_8_name(info: ObjectInfo) -> ObjectInfo:
    """Escape a file name that is not UTF-8. No file can be read by such a name, so an image becomes an error row.

    Raises InputRefused for a shard, and for an image if another file has the escaped name.
    """
    text = uris.escaped(info.uri)
    if text == info.uri:
        return info
    if not (source_of(text) or SOURCE_OF_UNNAMED).is_loose or exists(text):
        raise not_utf_8(info.uri)
    return replace(info, uri=text)


def not_utf_8(name: str) -> InputRefused:
    return InputRefused(f"--input {uris.escaped(name)}: the name is not UTF-8; rename the file")
