import http.server
import socket
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from pipeline.errors import WeightsRefused
from pipeline.fetch import fetch_weights
from pipeline.models import resolve

pytestmark = pytest.mark.usefixtures("own_caches")


class Files(http.server.ThreadingHTTPServer):
    """Serves `content` by path, and counts what it was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cut = 0

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Files

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
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


def test_a_file_is_fetched_once_and_checked_by_its_name(files: Files) -> None:
    files.content[f"/net-{DIGEST[:8]}.pth"] = CONTENT
    uri = f"{files.uri}/net-{DIGEST[:8]}.pth"
    files.cut = 1
    path, digest = fetch_weights(uri, official=True)
    assert (Path(path).read_bytes(), digest) == (CONTENT, DIGEST)
    assert len(files.asked) == 2  # the first one was cut off
    assert fetch_weights(uri, official=True) == (path, digest)
    assert len(files.asked) == 2
    assert not list(Path(path).parent.glob("*.part"))


def test_a_file_that_its_name_does_not_fit_is_refused_and_not_kept(files: Files) -> None:
    files.content["/net-00000000.pth"] = CONTENT
    for _ in range(2):
        with pytest.raises(WeightsRefused, match=f"sha256 is {DIGEST[:10]}"):
            fetch_weights(f"{files.uri}/net-00000000.pth", official=True)
    assert len(files.asked) == 2


def test_a_file_that_changed_at_its_address_is_fetched_again(files: Files) -> None:
    uri = f"{files.uri}/w.pth?token=secret"
    for content in (CONTENT, CONTENT[::-1]):
        files.content["/w.pth"] = content
        path, digest = fetch_weights(uri)
        assert digest == sha256(content).hexdigest()
        assert "secret" not in path
    with pytest.raises(WeightsRefused, match="HTTP 404") as refused:
        fetch_weights(f"{files.uri}/none.pth?token=secret")
    assert "secret" not in str(refused.value)


def test_the_mirror_stands_in_for_the_official_address(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_WEIGHTS_MIRROR", files.uri)
    files.content["/resnet18-f37072fd.pth"] = CONTENT
    with pytest.raises(WeightsRefused, match=rf"sha256 is {DIGEST[:10]}"):
        resolve("resnet18", "DEFAULT")
    assert files.asked == ["/resnet18-f37072fd.pth"]
    monkeypatch.setenv("NIGHTSHIFT_WEIGHTS_MIRROR", str(tmp_path / "folder"))
    with pytest.raises(WeightsRefused, match=f"{tmp_path}/folder/resnet18-f37072fd.pth"):
        resolve("resnet18", "DEFAULT")


def test_out_of_reach_is_one_sentence_that_says_what_to_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    with Files() as closed:
        uri = closed.uri
    monkeypatch.setenv("NIGHTSHIFT_WEIGHTS_MIRROR", uri)
    started = time.monotonic()
    with pytest.raises(WeightsRefused) as refused:
        resolve("resnet50", "DEFAULT")
    assert time.monotonic() - started < 10
    said = str(refused.value)
    assert "bring resnet50-11ad3fa6.pth and pass --weights /path/to/resnet50-11ad3fa6.pth" in said
    assert "NIGHTSHIFT_WEIGHTS_MIRROR" in said
    assert "\n" not in said


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.fetch.OPEN_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(WeightsRefused, match=r"no answer.*bring w\.pth"):
            fetch_weights(f"http://127.0.0.1:{silent.getsockname()[1]}/w.pth")
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("uri", ["hf://model.safetensors", "hf://owner/model.safetensors", "hf://a/b@../c/w.bin"])
def test_what_is_no_file_of_the_hub_is_refused(uri: str) -> None:
    with pytest.raises(WeightsRefused, match=r"^weights hf://.* cannot be had \(\w+:"):
        fetch_weights(uri)


def test_a_file_of_the_hub_may_lie_in_a_folder_and_have_a_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, kept = [], tmp_path / "kept"
    kept.write_bytes(CONTENT)

    def look_up(repository: str, name: str, revision: str | None) -> str:
        asked.append((repository, name, revision))
        return str(kept)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look_up)
    for uri in ("hf://timm/resnet/model.safetensors", "hf://timm/resnet@v2/fp16/model.safetensors"):
        assert fetch_weights(uri) == (str(kept), DIGEST)
    assert asked == [("timm/resnet", "model.safetensors", None), ("timm/resnet", "fp16/model.safetensors", "v2")]


def test_torch_hubs_folder_is_looked_in_first(tmp_path: Path) -> None:
    kept = tmp_path / "torch" / "hub" / "checkpoints" / f"net-{DIGEST[:8]}.pth"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(CONTENT)
    assert fetch_weights(f"http://127.0.0.1:9/models/{kept.name}", official=True) == (str(kept), DIGEST)


def test_the_hash_of_a_file_is_forgotten_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    for content in (b"one", b"two"):
        file.write_bytes(content)
        assert fetch_weights(str(file)) == (str(file), sha256(content).hexdigest())
