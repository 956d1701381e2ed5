"""Archives on web servers and S3 servers that refuse ranges, have none, or send them in an unusual way."""

import http.server
import threading
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from range_server import Fault, Server, serve
from source_contract import error_types, image, numbered, read_all

from jobs.bench.harness import s3
from pipeline.config import RunConfig
from pipeline.errors import StorageRefused
from pipeline.planning.archive import Archive
from pipeline.sources.shard import Shard
from pipeline.storage import access, bucket, ranges


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Server]]]:
    monkeypatch.setenv("NIGHTSHIFT_RETRY_SECONDS", "0.2")
    with serve(archive()) as serving:
        yield serving


def archive() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in numbered(20):
            file.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("fault", ["forbidden", "cut"])
def test_a_zip_that_cannot_be_read_for_the_moment_is_unreadable(server: tuple[str, type[Server]], fault: Fault) -> None:
    uri = f"{server[0]}/a.zip"
    server[1].fault = fault
    items, _ = read_all(Shard(0, "zip", uri))
    assert error_types(items) == ["unreadable"]
    server[1].fault = ""
    items, total = read_all(Shard(0, "zip", uri))
    assert error_types(items) == [None] * total == [None] * 20


def test_an_object_of_a_server_without_ranges_is_copied_to_disk(
    server: tuple[str, type[Server]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.fsspec_store.BUFFER_BYTES", 1 << 10)
    server[1].fault = "no ranges"
    items, _ = read_all(Shard(0, "zip", f"{server[0]}/a.zip"))
    assert [item.data for item in items] == [image(number) for number in range(20)]
    assert server[1].whole == 2, "the request that showed it, and the copy"


def test_a_copy_that_is_cut_short_is_an_error(server: tuple[str, type[Server]]) -> None:
    server[1].fault = "no ranges"
    with access.open_read(f"{server[0]}/a.zip") as file:
        server[1].content = server[1].content[:-10]
        file.seek(2000)
        with pytest.raises(OSError, match="the response was cut short"):
            file.read()


@pytest.fixture
def bucket_server(server: tuple[str, type[Server]], monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x" * 16)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server[0])
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("NIGHTSHIFT_RETRY_SECONDS", "60")
    bucket.bucket_store.cache_clear()
    yield server[1]
    bucket.bucket_store.cache_clear()


@pytest.mark.timeout(30)
@pytest.mark.parametrize("fault", ["status 200", "no ranges"])
def test_a_bucket_that_answers_a_range_with_200(bucket_server: type[Server], fault: Fault) -> None:
    bucket_server.fault = fault
    items, _ = read_all(Shard(0, "zip", "s3://ranges/a.zip"))
    assert [item.data for item in items] == [image(number) for number in range(20)]


@pytest.mark.timeout(30)
def test_a_bucket_that_sends_another_range_is_refused_at_once(bucket_server: type[Server]) -> None:
    bucket_server.fault = "wrong range"
    with pytest.raises(StorageRefused, match=r"s3://ranges was asked for bytes \d+-\d+ of a\.zip and sent bytes "):
        read_all(Shard(0, "zip", "s3://ranges/a.zip"))


@pytest.mark.timeout(60)
def test_rclone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a.zip").write_bytes(archive())
    monkeypatch.setattr(ranges, "STALL_SECONDS", 5)
    with s3.serve(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        bucket.bucket_store.cache_clear()
        (info,) = access.list_objects("s3://served")
        items, _ = read_all(Shard(0, "zip", info.uri, None, info.size_bytes, info.etag))
        with access.open_read(info.uri, info.etag) as file:
            file.seek(1)
            access.write(info.uri, bytes(len(archive())))
            with pytest.raises(OSError, match="replaced"):
                file.read()
        bucket.bucket_store.cache_clear()
    assert [item.data for item in items] == [image(number) for number in range(20)]


class Redirects(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        targets = {"/loop.png": "/loop.png", "/bad.png": "http://[bad/x.png", "/ftp.png": "ftp://127.0.0.1/x.png"}
        self.send_response(302 if self.path in targets else 200)
        self.send_header("Location", targets.get(self.path, ""))
        self.send_header("Content-Length", "1" if self.path not in targets else "0")
        self.end_headers()
        self.wfile.write(b"1" if self.path not in targets else b"")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def redirects() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirects) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.05,))
        thread.start()
        yield f"127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()
        thread.join()


@pytest.mark.timeout(5)
def test_redirects_and_urls_that_lead_nowhere_are_errors_with_a_reason(redirects: str) -> None:
    for url, reason in {
        f"http://{redirects}/loop.png": "the server redirects too many times, perhaps in a circle",
        f"http://{redirects}/ftp.png": "the server redirects to a URL that is not http",
        f"http://{redirects}/bad.png": "the server redirects to a URL that is not valid",
        "http://[bad/x.png": "the URL is not valid",
    }.items():
        with pytest.raises(OSError, match=f"^{reason}$"):
            access.read(url)


def test_schemes_in_any_case(redirects: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"HTTP://{redirects}/a.png\nFile://{tmp_path}/b.png\n")
    (tmp_path / "b.png").write_bytes(b"2")
    for name in (f"{tmp_path}/list.txt", f"FILE://{tmp_path}/list.txt"):
        (shard,) = Archive(RunConfig(input=name, output=f"FILE://{tmp_path}/o")).shards()
        items, _ = read_all(shard)
        assert [(item.image_id, item.data) for item in items] == [
            (f"http://{redirects}/a.png", b"1"),
            (f"{tmp_path}/b.png", b"2"),
        ]
    (shard,) = Archive(RunConfig(input=f"Http://{redirects}/a.png", output="/o")).shards()
    assert read_all(shard)[0][0].data == b"1"
    assert access.read(f"HTTP://{redirects}/a.png") == b"1"
