"""Settings of s3, gs and az: emulators are reached, and bad settings end in a sentence."""

import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from pipeline.errors import SettingRefused
from pipeline.storage import access, bucket

NAMES = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"),
    *("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT_KEY", "STORAGE_EMULATOR_HOST"),
)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NIGHTSHIFT_RETRY_SECONDS", "0.1")
    bucket.bucket_store.cache_clear()
    yield
    bucket.bucket_store.cache_clear()


class Emulator(http.server.BaseHTTPRequestHandler):
    """Answers the requests of obstore for gs and az with the bytes of a dictionary."""

    protocol_version = "HTTP/1.1"
    objects: dict[str, bytes]

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        must_be_new = self.headers.get("x-goog-if-generation-match") == "0" or self.headers.get("If-None-Match") == "*"
        if must_be_new and self.path in self.objects:
            self._send(409 if "If-None-Match" in self.headers else 412)
            return
        self.objects[self.path] = data
        self._send(201)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if "list-type" in parse_qs(url.query):
            found = [path for path in sorted(self.objects) if path.startswith(url.path)]
            contents = "".join(
                f"<Contents><Key>{unquote(path[len(url.path) + 1 :])}</Key><Size>{len(self.objects[path])}</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>1</ETag></Contents>"
                for path in found
            )
            self._send(200, f"<ListBucketResult>{contents}</ListBucketResult>".encode())
            return
        data = self.objects.get(self.path)
        if data is None:
            self._send(404)
        elif wanted := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), int(wanted[2]) + 1
            self._send(206, data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            self._send(200, data)

    do_HEAD = do_GET  # noqa: N815  the name is that of http.server

    def _send(self, status: int, body: bytes = b"", content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("x-goog-generation", "1")
        self.send_header("Last-Modified", "Mon, 02 Jan 2006 15:04:05 GMT")
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def emulator() -> Iterator[str]:
    kind = type("Serving", (Emulator,), {"objects": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def use(base: str) -> None:
    access.write(f"{base}/a.bin", b"x" * 3000)
    assert access.read(f"{base}/a.bin") == b"x" * 3000
    with access.open_read(f"{base}/a.bin") as file:
        assert file.seek(2990) == 2990
        assert file.read() == b"x" * 10
    access.create(f"{base}/one", b"1")
    with pytest.raises(FileExistsError):
        access.create(f"{base}/one", b"2")


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_the_emulator_of_google(emulator: str, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", scheme + emulator)
    use("gs://bucket")
    assert [info.uri for info in access.list_objects("gs://bucket")] == ["gs://bucket/a.bin", "gs://bucket/one"]


@pytest.mark.parametrize("way", ["connection string", "endpoint"])
def test_an_http_endpoint_of_azure(emulator: str, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    endpoint = f"http://{emulator}/devstoreaccount1"
    if way == "endpoint":
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "YWJj")
    else:
        text = f"AccountName=devstoreaccount1;AccountKey=YWJj;BlobEndpoint={endpoint};"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    use("az://container")


@pytest.mark.parametrize(
    ("uri", "settings", "message"),
    [
        ("az://c/x", {}, "^az://c cannot be opened: .*Account must be specified; check AZURE_STORAGE_ACCOUNT_NAME"),
        (
            "az://c/x",
            {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "no base64!"},
            "Invalid Access Key.*AZURE_STORAGE_ACCOUNT_KEY",
        ),
        ("az://c/x", {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=a"}, "has neither AccountKey nor Shared"),
        ("gs://c/x", {"GOOGLE_APPLICATION_CREDENTIALS": "/none.json"}, "/none.json: No such file.*check GOOGLE_APP"),
        ("gs://c/x", {"GOOGLE_APPLICATION_CREDENTIALS": "BROKEN"}, "decode.*check GOOGLE_APPLICATION_CREDENTIALS"),
        ("gs://c/x", {"GOOGLE_SERVICE_ACCOUNT_KEY": "{}"}, "missing field.*check GOOGLE_APPLICATION_CREDENTIALS"),
        ("s3://c/x", {"AWS_ENDPOINT_URL": "localhost:9000"}, "endpoint localhost:9000 must begin with http://"),
        ("s3:///x", {}, "^s3:///x names no bucket"),
        ("gs:///x", {}, "^gs:///x names no bucket"),
    ],
)
def test_bad_settings_end_in_a_sentence(
    uri: str, settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.json").write_text('{"type": 3')
    for name, value in settings.items():
        monkeypatch.setenv(name, str(tmp_path / "broken.json") if value == "BROKEN" else value)
    with pytest.raises(SettingRefused, match=message) as caught:
        access.read(uri)
    assert "\n" not in str(caught.value)
