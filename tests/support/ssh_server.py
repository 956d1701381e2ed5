"""An ssh server on which each user stands for a machine, with a separate home folder and a real shell."""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncssh


async def _shell(process: "asyncssh.SSHServerProcess[bytes]", homes: Path) -> None:
    home = homes / str(process.get_extra_info("username"))
    home.mkdir(exist_ok=True)
    shell = await asyncio.create_subprocess_shell(
        process.command or "exec bash -l",
        cwd=home,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    printed, errors = await shell.communicate(await process.stdin.read())
    process.stdout.write(printed)
    process.stderr.write(errors)
    process.exit(shell.returncode or 0)


@contextmanager
def ssh_server(folder: Path) -> Iterator[str]:
    """Start a server and yield the ssh command for it; the host is `user@127.0.0.1`. Homes are in `folder/homes`."""
    client_key, server_key = asyncssh.generate_private_key("ssh-ed25519"), asyncssh.generate_private_key("ssh-ed25519")
    client_key.write_private_key(folder / "key")
    (folder / "key").chmod(0o600)
    (folder / "known").write_text(f"* {server_key.export_public_key().decode()}")
    (folder / "homes").mkdir()
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(
        asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[server_key],
            authorized_client_keys=asyncssh.import_authorized_keys(client_key.export_public_key().decode()),
            process_factory=lambda process: _shell(process, folder / "homes"),
            encoding=None,
        )
    )
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"ssh -F none -p {server.get_port()} -i {folder}/key -o UserKnownHostsFile={folder}/known"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
