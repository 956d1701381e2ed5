"""A real SFTP server: listing, planning and reading, and sentences for what does not work."""

import asyncio
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import pytest
from source_contract import image, numbered, read_all

from pipeline.config import RunConfig
from pipeline.planning.archive import Archive
from pipeline.storage import access, fsspec_store


class Server(asyncssh.SSHServer):
    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == ("user", "secret")


async def _end(server: asyncssh.SSHAcceptor) -> None:
    server.close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def sftp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of a server whose root is `tmp_path/root`."""
    monkeypatch.setenv("NIGHTSHIFT_RETRY_SECONDS", "2")
    root = tmp_path / "root"
    root.mkdir()
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(
        asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=Server,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(root)),
        )
    )
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield f"sftp://user:secret@127.0.0.1:{server.get_port()}"
    asyncio.run_coroutine_threadsafe(_end(server), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    fsspec_store.fsspec_store.cache_clear()


@pytest.mark.timeout(120)
def test_an_archive_is_planned_and_read(sftp: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name, data in numbered(20):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    with tarfile.open(root / "d" / "a.tar", "w") as tar:
        for name, _ in numbered(20):
            tar.add(root / name, name)
    (root / "d" / "notes.npy").write_bytes(b"")
    archive = Archive(RunConfig(input=f"{sftp}/d", output=str(tmp_path / "out")))
    shards = list(archive.shards())
    assert sorted(shard.kind for shard in shards) == ["objects", "tar"]
    assert archive.left_out.counts == {".npy": 1}
    assert all("secret" not in f"{shard}" for shard in shards)
    for shard in shards:
        records, rows = read_all(shard)
        assert [record.data for record in records] == [image(number) for number in range(20)]
        assert rows == 20


@pytest.mark.timeout(60)
def test_an_output_is_written(sftp: str) -> None:
    access.write(f"{sftp}/out/a/b.bin", b"one")
    access.create(f"{sftp}/out/c", b"two")
    with pytest.raises(FileExistsError):
        access.create(f"{sftp}/out/c", b"three")
    access.write(f"{sftp}/out/c", b"four")
    assert access.read(f"{sftp}/out/c") == b"four"
    access.delete(f"{sftp}/out/a/b.bin")
    assert [info.uri for info in access.list_objects(f"{sftp}/out")] == [f"{sftp}/out/c"]


@pytest.mark.timeout(60)
def test_missing_objects_and_wrong_passwords(sftp: str) -> None:
    with pytest.raises(FileNotFoundError):
        access.read(f"{sftp}/none.jpg")
    with pytest.raises(PermissionError):
        access.read(f"{sftp.replace('secret', 'wrong')}/none.jpg")
