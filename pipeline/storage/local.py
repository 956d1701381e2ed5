"""Local files, including those of mounted network file systems."""

import ctypes
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.storage.base import BrokenLink, Hidden, ObjectInfo, Unread, check_etag
from pipeline.storage.uris import escaped

TEMPORARY = ".nightshift.tmp"
"""Suffix of the file that a write fills before it takes its final name."""


UNSUPPORTED = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EMLINK)
"""What file systems report for a call that they do not have."""

NO_HARD_LINKS = (*UNSUPPORTED, errno.EIO)
"""What `link` reports where hard links do not exist. EIO is that of rclone's mounts."""

AT_FDCWD, RENAME_NOREPLACE = -100, 1
"""From linux/fcntl.h and linux/fs.h."""


class LocalStore:
    """Files by absolute path. Writes are atomic and synced to disk."""

    def head(self, path: str) -> ObjectInfo:
        return self._info(path, os.stat(path))

    def read(self, path: str, etag: str) -> bytes:
        with self.open_read(path, etag) as file:
            return file.read()

    def open_read(self, path: str, etag: str) -> BinaryIO:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # open() of a pipe would wait for a writer
            raise OSError(f"{path} is a pipe, a socket or a device, not a file")
        file = open(path, "rb")  # noqa: SIM115  the caller closes it
        try:
            check_etag(self._info(path, os.fstat(file.fileno())), etag)
        except BaseException:
            file.close()
            raise
        return file

    def write(self, path: str, data: bytes, temporary_folder: str | None = None) -> None:
        temporary = self._temporary(path, data, temporary_folder)
        try:
            _replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        self._sync_folder(path)

    def create(self, path: str, data: bytes) -> None:
        temporary = self._temporary(path, data)
        try:
            _publish(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        self._sync_folder(path)

    def delete(self, path: str) -> None:
        os.unlink(path)

    def list_objects(self, path: str, *, with_unread: bool = False) -> Iterator[ObjectInfo]:
        objects = self._walk(path, frozenset())
        yield from objects if with_unread else (info for info in objects if not isinstance(info, Unread))

    def remove_broken_writes(self, path: str) -> None:
        """Remove the temporary files of killed writers below a folder. No writer may be active there."""
        for folder, _, names in os.walk(path):
            for name in names:
                if name.startswith(".") and name.endswith(TEMPORARY):
                    Path(folder, name).unlink(missing_ok=True)

    def _walk(self, folder: str, parents: frozenset[str]) -> Iterator[ObjectInfo]:
        """The files below a folder, and what `Unread` stands for. Hidden folders are not entered."""
        real = os.path.realpath(folder)
        if real in parents:  # a symbolic link to a parent folder
            return
        with os.scandir(folder) as entries:
            # Folders sort as their name with a slash, so that whole paths are in the order of object stores. Names that
            # are not UTF-8 sort by their escaped form.
            names = sorted((e.name + "/" * _is_folder(e) for e in entries), key=escaped)
        for name in names:
            path = f"{folder.rstrip('/')}/{name}"
            if name.startswith("."):
                yield Hidden(path, 0, "")
            elif name.endswith("/"):
                yield from self._walk(path[:-1], parents | {real})
            else:
                try:
                    info = self.head(path)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ELOOP):
                        raise
                    if os.path.islink(path):  # broken or circular; else the file was removed meanwhile
                        yield BrokenLink(path, 0, "")
                else:
                    yield info

    @staticmethod
    def _info(path: str, status: os.stat_result) -> ObjectInfo:
        return ObjectInfo(path, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}")

    @staticmethod
    def _temporary(path: str, data: bytes, temporary_folder: str | None = None) -> str:
        """Write the data to a temporary file in the same folder or in another one, and return its path."""
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(temporary_folder or folder, f".{name}.{uuid.uuid4().hex}{TEMPORARY}")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return temporary

    @staticmethod
    def _sync_folder(path: str) -> None:
        descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        finally:
            os.close(descriptor)


def _publish(temporary: str, path: str) -> None:
    """Give a temporary file its final name. Raises FileExistsError if the name exists.

    Hard links are missing on SMB, exFAT and mounts of buckets, and exclusive renames on some of them. The last way
    takes the name with an empty file first; it exists alone only between two system calls.
    """
    try:
        os.link(temporary, path)  # unlike rename, link fails if the name exists
        return
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
    try:
        _rename_exclusively(temporary, path)
        return
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        _replace(temporary, path)
    except BaseException:
        os.unlink(path)
        raise


def _rename_exclusively(source: str, target: str) -> None:
    """Rename with RENAME_NOREPLACE of Linux. Raises OSError with an errno of UNSUPPORTED if that does not exist."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), source)
    if rename(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), source, None, target)


def _replace(temporary: str, path: str) -> None:
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP):
            raise
        reason = "its file system cannot rename files, as in some mounts of buckets; use the URI of the bucket"
        raise OSError(errno.ENOTSUP, reason, path) from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False
