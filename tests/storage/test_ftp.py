"""A real FTP server, whose connections cannot be shared by threads."""

import logging
import socket
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import ThreadedFTPServer
from source_contract import image, numbered, read_all

from pipeline.sources import ReadOptions, Record, objects
from pipeline.sources.objects import LooseImages
from pipeline.sources.shard import Shard
from pipeline.storage import access, fsspec_store


@pytest.fixture
def ftp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    logging.getLogger("pyftpdlib").setLevel(logging.CRITICAL)
    monkeypatch.setenv("NIGHTSHIFT_RETRY_SECONDS", "2")
    users = DummyAuthorizer()
    users.add_user("user", "secret", str(tmp_path), perm="elradfmwMT")
    handler = type("Handler", (FTPHandler,), {"authorizer": users})
    server = ThreadedFTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"timeout": 0.1}, daemon=True)
    thread.start()
    yield f"ftp://user:secret@127.0.0.1:{server.address[1]}"
    server.close_all()
    thread.join(5)
    fsspec_store.fsspec_store.cache_clear()


@pytest.mark.timeout(60)
def test_many_threads_read_loose_images(ftp: str, tmp_path: Path) -> None:
    for name, data in numbered(60):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    listed = list(access.list_objects(f"{ftp}/d"))
    assert [info.uri for info in listed] == [f"{ftp}/{name}" for name, _ in numbered(60)]
    keys = tuple(info.uri for info in listed)
    images = LooseImages(keys, tuple(i.size_bytes for i in listed), tuple(i.etag for i in listed))
    assert all(images.etags or ())
    *records, _ = objects.read(Shard(0, "objects", "", 60, payload=images), ((0, 60),), ReadOptions())
    assert [isinstance(r, Record) and (r.data or str(r.error)) for r in records] == [
        image(number) for number in range(60)
    ]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives(ftp: str, tmp_path: Path, kind: str) -> None:
    for name, data in numbered(20):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, _ in numbered(20):
                tar.add(tmp_path / name, name)
    else:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name, _ in numbered(20):
                archive.write(tmp_path / name, name)
    items, _ = read_all(Shard(0, kind, f"{ftp}/a.{kind}"))
    assert [item.data for item in items] == [image(number) for number in range(20)]


@pytest.mark.timeout(60)
def test_a_dead_server_is_given_up_soon_and_one_that_has_answered_is_not(
    ftp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_RETRY_SECONDS", "50")
    monkeypatch.setattr(fsspec_store, "SHORT_RETRY_SECONDS", 0.3)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        started = time.monotonic()
        with pytest.raises(OSError, match="Connection refused"):
            access.read(f"ftp://127.0.0.1:{unused.getsockname()[1]}/a.jpg")
        assert time.monotonic() - started < 10
    (tmp_path / "a.jpg").write_bytes(b"1")
    store = fsspec_store.store_of(ftp)
    assert store.image_seconds == 0.3
    assert access.read(f"{ftp}/a.jpg") == b"1"
    assert store.image_seconds is None


@pytest.mark.timeout(60)
def test_missing_objects_and_wrong_passwords(ftp: str) -> None:
    with pytest.raises(FileNotFoundError):
        access.read(f"{ftp}/none.jpg")
    with pytest.raises(PermissionError):
        access.read(f"{ftp.replace('secret', 'wrong')}/none.jpg")
