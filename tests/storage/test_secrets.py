"""Credentials in URIs and in the environment are used to read and never written."""

import base64
import http.server
import io
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import parse_qs, urlsplit

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import RayCluster, S3Server, start_ray_head, stop_ray_head
from whole import ROOT, TINY, Jobs, jpeg, write_tar

from pipeline.output.verify import verify
from pipeline.storage import access, credentials, uris

USER, PASSWORD, SIGNATURE, LIST_SIGNATURE = "planted-user", "planted-password", "planted-signature", "planted-of-a-list"
S3_SECRET = "planted-s3-secret"


@pytest.mark.parametrize(
    ("uri", "plain"),
    [
        ("https://user:secret@host/a.jpg?X-Amz-Signature=secret#part", "https://host/a.jpg"),
        ("https://token@host:8080/a%20b.jpg", "https://host:8080/a%20b.jpg"),
        ("https://host?sig=secret", "https://host"),
        ("HTTPS://user:secret@host/a.jpg?sig=secret", "https://host/a.jpg"),
        ("S3://key:secret@bucket/A.jpg?X-Amz-Signature=secret", "s3://bucket/A.jpg"),
        ("https://[::1/a.png?sig=secret", "https://[::1/a.png"),
        ("s3://key:secret@bucket/a.jpg", "s3://bucket/a.jpg"),
        ("az://container/a.jpg?sv=2024&sig=secret", "az://container/a.jpg"),
        (
            "abfss://container@account.dfs.core.windows.net/a.jpg",
            "abfss://container@account.dfs.core.windows.net/a.jpg",
        ),
        ("s3://bucket/what?#1.jpg", "s3://bucket/what?#1.jpg"),
        ("s3://bucket/a@b:c.jpg", "s3://bucket/a@b:c.jpg"),
        ("/data/a?sig=b.jpg", "/data/a?sig=b.jpg"),
    ],
)
def test_redact(uri: str, plain: str) -> None:
    assert uris.redact(uri) == plain


class PrivateFolder(http.server.SimpleHTTPRequestHandler):
    """A folder and its listing, protected by a password."""

    def send_head(self) -> "io.BytesIO | BinaryIO | None":
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers["Authorization"] == f"Basic {login}":
            return super().send_head()
        self.send_error(403)
        return None

    def log_message(self, *_: object) -> None:
        pass


def test_the_credentials_of_a_folder_open_its_files(tmp_path: Path) -> None:
    (tmp_path / "in" / "more").mkdir(parents=True)
    for name in ("a.jpg", "more/b.jpg"):
        (tmp_path / "in" / name).write_bytes(name.encode())
    handler = partial(PrivateFolder, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        folder = credentials.hide_credentials(f"http://{USER}:{PASSWORD}@{host}/in")
        names = [info.uri for info in access.list_objects(folder)]
        assert names == [f"http://{host}/in/a.jpg", f"http://{host}/in/more/b.jpg"]
        assert [access.read(uri) for uri in names] == [b"a.jpg", b"more/b.jpg"]
        assert [info.uri for info in access.list_objects(f"{folder}/more")] == names[1:]
        assert [info.uri for info in access.list_glob(f"{folder}/more/*.jpg")] == names[1:]
        server.shutdown()


class Private(http.server.BaseHTTPRequestHandler):
    """Files of a folder, protected by a password and a signature."""

    folder: Path

    def do_HEAD(self) -> None:
        self.respond(with_body=False)

    def do_GET(self) -> None:
        self.respond(with_body=True)

    def respond(self, with_body: bool) -> None:
        address = urlsplit(self.path)
        path = self.folder / address.path.lstrip("/")
        is_list = path.suffix in (".csv", ".jpg")
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        signed = parse_qs(address.query).get("X-Amz-Signature") == [LIST_SIGNATURE if is_list else SIGNATURE]
        allowed = signed and (is_list or self.headers["Authorization"] == f"Basic {login}")
        status = 403 if not allowed else 200 if path.exists() else 404
        data = path.read_bytes() if status == 200 else b"no"
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def private_server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Handler", (Private,), {"folder": folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", folder
        server.shutdown()


@pytest.fixture
def own_cluster() -> Iterator[RayCluster]:
    """A separate head node, whose log folder this test searches."""
    environment = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
    process, cluster = start_ray_head(environment)
    logs = str(process.args[-1])  # type: ignore[index]
    yield RayCluster(cluster.address, logs, {**environment, "RAY_ADDRESS": cluster.address})
    stop_ray_head(process)


def write_list(path: Path, host: str, names: list[str], signature: str) -> None:
    uris = [f"http://{host}/{name}?X-Amz-Signature={signature}&id={i}" for i, name in enumerate(names)]
    path.write_text("url\n" + "\n".join(uris) + "\n")


@pytest.mark.slow
def test_credentials_are_used_and_never_written(
    own_cluster: RayCluster, private_server: tuple[str, Path], tmp_path: Path
) -> None:
    host, served = private_server
    out = tmp_path / "out"
    write_tar(served / "a.tar", {f"{i}.jpg": jpeg(i) for i in range(3)})
    pq.write_table(pa.table({"image": [jpeg(i) for i in range(3)]}), served / "b.parquet")
    for i in range(3):
        (served / f"{i}.jpg").write_bytes(jpeg(i))
    query = f"X-Amz-Credential=me&X-Amz-Signature={SIGNATURE}"
    inputs = [f"http://{USER}:{PASSWORD}@{host}/{name}?{query}" for name in ("a.tar", "b.parquet")]
    listed = tmp_path / "list.csv"
    write_list(listed, host, ["0.jpg", "1.jpg", "2.jpg", "missing.jpg"], LIST_SIGNATURE)
    jobs = Jobs({**own_cluster.environment, "AWS_SECRET_ACCESS_KEY": S3_SECRET, "AWS_ACCESS_KEY_ID": "planted-key-id"})
    command = ("embed", "--input", *inputs, listed, "--output", out, *TINY, "--max-error-rate", "0.5")
    output = []
    for command_now in (command, (*command, "--overwrite", "--limit", "8"), (*command, "--overwrite")):
        done = jobs.run(*command_now)
        output.append(done.stdout + done.stderr)
    verification = verify(str(out))
    assert verification.is_whole, verification.problems
    assert (verification.rows, verification.errors) == (9, 1)
    ids = set(pd.read_parquet(out)["image_id"])
    assert {f"http://{host}/a.tar#0.jpg", f"http://{host}/0.jpg"} <= ids
    files = [path for folder in (out, Path(own_cluster.dashboard)) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for secret in (PASSWORD, SIGNATURE, LIST_SIGNATURE, S3_SECRET, "planted-key-id"):
        assert not [path for path in files if secret.encode() in path.read_bytes()], f"{secret} was written"
        assert secret not in "".join(output)


@pytest.mark.slow
def test_a_list_with_new_signatures_is_accepted_and_another_list_is_refused(
    jobs: Jobs, private_server: tuple[str, Path], tmp_path: Path
) -> None:
    host, served = private_server
    names = [f"{i}.jpg" for i in range(6)]
    for i, name in enumerate(names):
        (served / name).write_bytes(jpeg(i))
    listed, out = tmp_path / "list.csv", tmp_path / "out"
    command = ("embed", "--input", listed, "--output", out, *TINY)
    write_list(listed, host, names, "expired")
    jobs.run(*command, code=3)
    for kept in ("_commits", "_errors", "_attempts"):
        shutil.rmtree(out / kept)  # as if the first attempt had stopped before its first commit
    write_list(listed, host, names[::-1], LIST_SIGNATURE)
    refused = jobs.run(*command, code=2)
    assert "the list of URIs has changed since it was planned" in refused.stderr
    assert LIST_SIGNATURE not in refused.stderr
    write_list(listed, host, names, LIST_SIGNATURE)
    jobs.run(*command)
    assert verify(str(out)).is_whole
    assert len(pd.read_parquet(out)) == 6


def test_object_names_that_look_like_queries_are_kept(s3: S3Server) -> None:
    uri = s3.uri("odd/what?sig #1.jpg")
    access.write(uri, b"data")
    assert [info.uri for info in access.list_objects(s3.uri("odd"))] == [uri]
    assert access.read(uris.redact(uri)) == b"data"
