"""Files of this machine, or of a file system that it has mounted."""

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.stores.base import ObjectInfo, check, escaped

TEMPORARY = ".nightshift.tmp"


class LocalStore:
    def head(self, path: str) -> ObjectInfo:
        return self._info(path, os.stat(path))

    def read(self, path: str, etag: str) -> bytes:
        with self.open_read(path, etag) as file:
            return file.read()

    def open_read(self, path: str, etag: str) -> BinaryIO:
        kind = os.stat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # to open a pipe waits for its writer
            raise OSError(f"{path} is a pipe, a socket or a device")
        file = open(path, "rb")  # noqa: SIM115  the caller closes it
        try:
            check(self._info(path, os.fstat(file.fileno())), etag)
        except BaseException:
            file.close()
            raise
        return file

    def write(self, path: str, data: bytes) -> None:
        temporary = self._temporary(path, data)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        self._sync_folder(path)

    def create(self, path: str, data: bytes) -> None:
        temporary = self._temporary(path, data)
        try:
            os.link(temporary, path)  # unlike rename, fails where the name is taken
        finally:
            os.unlink(temporary)
        self._sync_folder(path)

    def delete(self, path: str) -> None:
        os.unlink(path)

    def list_objects(self, path: str) -> Iterator[ObjectInfo]:
        yield from self._walk(path, frozenset())

    def remove_broken_writes(self, path: str) -> None:
        """Remove the temporary files below a folder, of writers that were killed: no writer may be at work there."""
        for folder, _, names in os.walk(path):
            for name in names:
                if name.startswith(".") and name.endswith(TEMPORARY):
                    Path(folder, name).unlink(missing_ok=True)

    def _walk(self, folder: str, parents: frozenset[str]) -> Iterator[ObjectInfo]:
        real = os.path.realpath(folder)
        if real in parents:  # a link to a folder above
            return
        with os.scandir(folder) as entries:
            # A folder sorts as its name with a slash, so that whole paths come out in order, as object stores list;
            # a name that is not UTF-8 by how it is written where it must be text.
            found = (e.name + "/" * _is_folder(e) for e in entries if not e.name.startswith("."))
            names = sorted(found, key=escaped)
        for name in names:
            path = f"{folder.rstrip('/')}/{name}"
            if name.endswith("/"):
                yield from self._walk(path[:-1], parents | {real})
            else:
                try:
                    info = self.head(path)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ELOOP):
                        raise
                else:  # not removed meanwhile, no link to nothing or to itself
                    yield info

    @staticmethod
    def _info(path: str, found: os.stat_result) -> ObjectInfo:
        return ObjectInfo(path, found.st_size, f"{found.st_mtime_ns:x}-{found.st_size:x}")

    @staticmethod
    def _temporary(path: str, data: bytes) -> str:
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{TEMPORARY}")
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
        finally:
            os.close(descriptor)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
