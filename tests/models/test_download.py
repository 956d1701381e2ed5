"""Weights are downloaded once per node and checked; a file that cannot be read is refused with a remedy."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from pipeline.errors import WeightsRefused
from pipeline.models.download import fetch_weights
from pipeline.models.spec import resolve

pytestmark = pytest.mark.usefixtures("own_caches")


class Files(http.server.ThreadingHTTPServer):
    """Serves `content` by path, and records the paths of requests. cut: number of responses to end early."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, bytes] = {}
        self.requested: list[str] = []
        self.cut = 0

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Files

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        content = self.server.content.get(self.path.partition("?")[0])
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", sha256(content).hexdigest())
        self.end_headers()
        if self.server.cut:
            self.server.cut -= 1
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def files() -> Iterator[Files]:
    with Files() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


CONTENT = bytes(range(256)) * 4096
DIGEST = sha256(CONTENT).hexdigest()


def test_a_file_is_downloaded_once_and_checked_by_its_name(files: Files) -> None:
    files.content[f"/net-{DIGEST[:8]}.pth"] = CONTENT
    uri = f"{files.uri}/net-{DIGEST[:8]}.pth"
    files.cut = 1
    path, digest = fetch_weights(uri, official=True)
    assert (Path(path).read_bytes(), digest) == (CONTENT, DIGEST)
    assert len(files.requested) == 2  # the first response was cut
    assert fetch_weights(uri, official=True) == (path, digest)
    assert len(files.requested) == 2
    assert not list(Path(path).parent.glob("*.part"))


def test_a_file_with_another_hash_than_in_its_name_is_refused_and_not_kept(files: Files) -> None:
    files.content["/net-00000000.pth"] = CONTENT
    for _ in range(2):
        with pytest.raises(WeightsRefused, match=f"sha256 is {DIGEST[:10]}…, but must begin with 00000000"):
            fetch_weights(f"{files.uri}/net-00000000.pth", official=True)
    assert len(files.requested) == 2


def test_a_file_that_has_changed_is_downloaded_again(files: Files) -> None:
    uri = f"{files.uri}/w.pth?token=secret"
    for content in (CONTENT, CONTENT[::-1]):
        files.content["/w.pth"] = content
        path, digest = fetch_weights(uri)
        assert digest == sha256(content).hexdigest()
        assert "secret" not in path
    with pytest.raises(WeightsRefused, match="HTTP 404") as refused:
        fetch_weights(f"{files.uri}/none.pth?token=secret")
    assert "secret" not in str(refused.value)


def test_the_mirror_replaces_the_official_address(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_WEIGHTS_MIRROR", files.uri)
    files.content["/resnet18-f37072fd.pth"] = CONTENT
    with pytest.raises(WeightsRefused, match=rf"sha256 is {DIGEST[:10]}"):
        resolve("resnet18", "DEFAULT")
    assert files.requested == ["/resnet18-f37072fd.pth"]
    monkeypatch.setenv("NIGHTSHIFT_WEIGHTS_MIRROR", str(tmp_path / "folder"))
    with pytest.raises(WeightsRefused, match=f"{tmp_path}/folder/resnet18-f37072fd.pth"):
        resolve("resnet18", "DEFAULT")


def test_a_failed_download_is_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with Files() as closed:
        uri = closed.uri
    monkeypatch.setenv("NIGHTSHIFT_WEIGHTS_MIRROR", uri)
    started = time.monotonic()
    with pytest.raises(WeightsRefused) as refused:
        resolve("resnet50", "DEFAULT")
    assert time.monotonic() - started < 60
    message = str(refused.value)
    assert "copy resnet50-11ad3fa6.pth to every node and pass --weights /path/to/resnet50-11ad3fa6.pth" in message
    assert "NIGHTSHIFT_WEIGHTS_MIRROR" in message
    assert "\n" not in message


def test_a_server_that_does_not_respond_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.models.download.OPEN_TIMEOUT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(WeightsRefused, match=r"no response.*copy w\.pth"):
            fetch_weights(f"http://127.0.0.1:{silent.getsockname()[1]}/w.pth")
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("uri", ["hf://model.safetensors", "hf://owner/model.safetensors", "hf://a/b@../c/w.bin"])
def test_invalid_uris_of_the_hub_are_refused(uri: str) -> None:
    with pytest.raises(WeightsRefused, match=r"^weights hf://.* cannot be downloaded \(\w+:"):
        fetch_weights(uri)


def test_a_file_of_the_hub_may_be_in_a_folder_and_have_a_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups, kept = [], tmp_path / "kept"
    kept.write_bytes(CONTENT)

    def look_up(repository: str, name: str, revision: str | None) -> str:
        lookups.append((repository, name, revision))
        return str(kept)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look_up)
    for uri in ("hf://timm/resnet/model.safetensors", "hf://timm/resnet@v2/fp16/model.safetensors"):
        assert fetch_weights(uri) == (str(kept), DIGEST)
    assert lookups == [("timm/resnet", "model.safetensors", None), ("timm/resnet", "fp16/model.safetensors", "v2")]


def test_a_copy_in_the_folder_of_torch_hub_is_used(tmp_path: Path) -> None:
    kept = tmp_path / "torch" / "hub" / "checkpoints" / f"net-{DIGEST[:8]}.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(CONTENT)
    assert fetch_weights(f"http://127.0.0.1:9/models/{kept.name}", official=True) == (str(kept), DIGEST)


def test_the_hash_of_a_changed_file_is_computed_again(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    for content in (b"one", b"two"):
        file.write_bytes(content)
        assert fetch_weights(str(file)) == (str(file), sha256(content).hexdigest())
