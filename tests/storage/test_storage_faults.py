"""Storage and whole jobs with a throttled, broken or forbidden object store: no image is lost or processed twice.

Real requests to a real S3 server, through a proxy that injects faults.
"""

import io
import os
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, Kind, Rule, fault_proxy
from servers import ROOT, S3Server
from whole import SLOW, TINY, Jobs, embeddings, jpeg, same, wait_for

from pipeline.errors import SettingRefused, StorageRefused
from pipeline.output.verify import verify
from pipeline.storage import access, bucket, fsspec_store, retry
from pipeline.storage import base as storage_base
from pipeline.threads import ordered_map

BUCKET = "s3://faulty"
IMAGES = 200
DATA = bytes(range(256)) * 400

TRANSIENT: tuple[Kind, ...] = (
    "slow_down", "internal_error", "conflict",
    "reset", "lost_response", "reset_in_body", "cut", "stall", "stall_in_body",
)  # fmt: skip
MIXED = tuple(Rule(kind, share=0.1 / 6) for kind in TRANSIENT if "stall" not in kind and kind != "conflict")


@pytest.fixture(scope="module")
def server(s3_server: S3Server) -> Iterator[tuple[FaultProxy, S3Server]]:
    """A proxy in front of the S3 server, with a bucket; this process's environment points to it.

    Stall timeouts and pauses are short, since these tests depend on the number of attempts and not on their duration.
    A busy machine must still answer within a timeout, or the retries never end.
    """
    with fault_proxy(s3_server.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        environment = {**s3_server.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        for name, value in environment.items():
            patch.setenv(name, value)
        for module in (bucket, fsspec_store):
            patch.setattr(module, "STALL_SECONDS", 2.0)
            patch.setattr(module, "BUFFER_BYTES", 16 << 10)
        patch.setattr(bucket, "UPLOAD_STALL_SECONDS", 4.0)
        patch.setattr(retry, "FIRST_PAUSE_SECONDS", 0.02)
        clear_stores()
        urllib.request.urlopen(urllib.request.Request(f"{proxy.endpoint}/faulty", method="PUT"), timeout=10).close()
        yield proxy, S3Server(proxy.endpoint, environment)
    clear_stores()


def clear_stores() -> None:
    bucket.bucket_store.cache_clear()
    fsspec_store.fsspec_store.cache_clear()


@pytest.fixture
def proxy(server: tuple[FaultProxy, S3Server]) -> Iterator[FaultProxy]:
    """The proxy without faults before and after each test."""
    server[0].set()
    server[0].injected.clear()
    yield server[0]
    server[0].set()


@pytest.fixture
def base(proxy: FaultProxy, request: pytest.FixtureRequest) -> str:
    return f"{BUCKET}/unit/{request.node.name}"


def read_in_the_middle(uri: str) -> bytes:
    with access.open_read(uri) as file:
        file.seek(70_000)
        return file.read(10) + file.read()


ACTIONS: dict[str, Callable[[str], object]] = {
    "head": lambda base: access.head(f"{base}/data").size_bytes,
    "read": lambda base: access.read(f"{base}/data"),
    "open_read": lambda base: read_in_the_middle(f"{base}/data"),
    "write": lambda base: access.write(f"{base}/written", DATA),
    "create": lambda base: access.create(f"{base}/created", DATA),
    "list": lambda base: [info.uri.rpartition("/")[2] for info in access.list_objects(base)],
    "delete": lambda base: access.delete(f"{base}/written"),
}


@pytest.mark.parametrize("kind", TRANSIENT)
def test_every_action_survives_every_transient_fault(proxy: FaultProxy, base: str, kind: Kind) -> None:
    access.write(f"{base}/data", DATA)
    results = {}
    for name, action in ACTIONS.items():
        proxy.set(Rule(kind, count=1, seconds=5))
        results[name] = action(base)
    proxy.set()
    assert results["head"] == len(DATA)
    assert results["read"] == DATA
    assert results["open_read"] == DATA[70_000:]
    assert results["list"] == ["created", "data", "written"]
    assert access.read(f"{base}/created") == DATA
    assert [info.uri for info in access.list_objects(base)] == [f"{base}/created", f"{base}/data"]
    assert proxy.injected[kind] == len(ACTIONS)


def test_a_stalled_request_is_cancelled_and_retried(proxy: FaultProxy, base: str) -> None:
    access.write(f"{base}/data", DATA)
    for kind in ("stall", "stall_in_body"):
        proxy.set(Rule(kind, method="GET", count=2, seconds=30))
        started = time.monotonic()
        assert access.read(f"{base}/data") == DATA
        assert time.monotonic() - started < 25
        assert proxy.injected[kind] == 2


def test_many_requests_of_which_one_in_ten_fails(proxy: FaultProxy, base: str) -> None:
    proxy.set(*MIXED)
    uris = [f"{base}/{i:04d}" for i in range(300)]
    list(ordered_map(lambda uri: access.write(uri, uri.encode()), uris, 16, 64))
    assert list(ordered_map(access.read, uris, 16, 64)) == [uri.encode() for uri in uris]
    assert [info.uri for info in access.list_objects(base)] == uris
    assert sum(proxy.injected.values()) > 30
    assert set(proxy.injected) == {rule.kind for rule in MIXED}


def test_a_retried_list_continues_after_its_last_object(proxy: FaultProxy, base: str) -> None:
    uris = [f"{base}/{i:04d} ü%25+.jpg" for i in range(1050)]
    list(ordered_map(lambda uri: access.write(uri, b"1"), uris, 8, 64))
    for kind in ("reset", "cut", "slow_down", "stall_in_body"):
        proxy.set(Rule(kind, target="continuation-token|start-after", count=2, seconds=5))
        assert [info.uri for info in access.list_objects(base)] == uris
        assert proxy.injected[kind] == 2


def test_a_tar_read_through_a_bad_connection(proxy: FaultProxy, base: str) -> None:
    members = {f"{i:03d}.jpg": os.urandom(20_000) for i in range(50)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    access.write(f"{base}/a.tar", buffer.getvalue())
    proxy.set(*(Rule(kind, share=0.1) for kind in ("cut", "reset", "reset_in_body", "internal_error")))
    with access.open_read(f"{base}/a.tar") as file, tarfile.open(fileobj=file) as tar:
        read = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert read == members
    assert sum(proxy.injected.values()) > 10


def test_an_object_that_is_replaced_during_a_read_raises(proxy: FaultProxy, base: str) -> None:
    access.write(f"{base}/data", DATA)
    with access.open_read(f"{base}/data") as file:
        file.read(100)
        access.write(f"{base}/data", DATA[::-1])
        file.seek(70_000)
        with pytest.raises(storage_base.Changed):
            file.read()


def test_a_multipart_upload_with_parts_that_fail(proxy: FaultProxy, base: str) -> None:
    data = os.urandom(256) * (11 << 12)
    proxy.set(
        Rule("lost_response", method="POST", target="uploadId", count=1),
        Rule("slow_down", method="PUT", target="partNumber", count=2),
        Rule("reset", method="PUT", target="partNumber", count=2),
    )
    access.write(f"{base}/big", data)
    assert proxy.injected == {"lost_response": 1, "slow_down": 2, "reset": 2}
    proxy.set()
    assert access.read(f"{base}/big") == data


def test_create_recognises_its_own_object(proxy: FaultProxy, base: str) -> None:
    proxy.set(Rule("lost_response", method="PUT", count=1), Rule("cut", method="GET", count=1))
    access.create(f"{base}/one", b"mine")
    proxy.set()
    assert access.read(f"{base}/one") == b"mine"
    with pytest.raises(FileExistsError):  # on the first attempt it was written by another call
        access.create(f"{base}/one", b"mine")
    proxy.set(Rule("reset", method="PUT", count=1))
    with pytest.raises(FileExistsError):
        access.create(f"{base}/one", b"not mine")
    assert access.read(f"{base}/one") == b"mine"


@pytest.mark.parametrize(
    ("kind", "code"),
    [("expired_token", "ExpiredToken"), ("invalid_key", "InvalidAccessKeyId"), ("no_bucket", "NoSuchBucket")],
)
@pytest.mark.parametrize("name", ACTIONS)
def test_a_fault_of_the_whole_store_ends_the_run(
    proxy: FaultProxy, base: str, kind: Kind, code: str, name: str
) -> None:
    access.write(f"{base}/data", DATA)
    proxy.set(Rule(kind))
    started = time.monotonic()
    with pytest.raises(StorageRefused, match=rf"^{BUCKET} .*{code}.*run the same command again"):
        ACTIONS[name](base)
    assert time.monotonic() - started < 60


def test_a_token_that_expires_in_the_middle_of_a_file(proxy: FaultProxy, base: str) -> None:
    access.write(f"{base}/data", DATA)
    with access.open_read(f"{base}/data") as file:
        file.read(10)
        proxy.set(Rule("expired_token"))
        with pytest.raises(StorageRefused, match="ExpiredToken"):
            file.read()


def test_access_denied_concerns_one_object(proxy: FaultProxy, base: str) -> None:
    access.write(f"{base}/open", b"1")
    access.write(f"{base}/closed", b"1")
    proxy.set(Rule("access_denied", target="closed"))
    for action in (access.read, access.head, access.open_read):
        with pytest.raises(PermissionError):
            action(f"{base}/closed")
    with pytest.raises(PermissionError, match=r"403 Forbidden: AccessDenied: Access Denied$"):
        access.read(f"{base}/closed")
    assert access.read(f"{base}/open") == b"1"


def test_a_permanent_fault_of_one_object_or_of_the_store(
    proxy: FaultProxy, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_RETRY_SECONDS", "0.3")
    access.write(f"{base}/sick", b"1")
    proxy.set(Rule("internal_error", target="sick"))
    with pytest.raises(OSError, match=r"InternalError.* attempts in 0 s"):
        access.read(f"{base}/sick")
    proxy.set(Rule("slow_down"))
    with pytest.raises(StorageRefused, match=f"^{BUCKET} gives no usable response: .*SlowDown"):
        access.read(f"{base}/sick")


def test_the_retry_limit_is_a_number(proxy: FaultProxy, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_RETRY_SECONDS", "soon")
    with pytest.raises(SettingRefused, match="NIGHTSHIFT_RETRY_SECONDS is 'soon'"):
        access.write(f"{base}/x", b"1")


@pytest.mark.parametrize("kind", [kind for kind in TRANSIENT if kind != "conflict"])
def test_a_web_server_with_faults(proxy: FaultProxy, kind: Kind) -> None:
    uri = f"{proxy.endpoint}/faulty/public/{kind}"
    public = {"x-amz-acl": "public-read", "Content-Type": "image/jpeg"}
    urllib.request.urlopen(urllib.request.Request(uri, DATA, public, method="PUT"), timeout=10).close()
    for action, expected in ((access.read, DATA), (read_in_the_middle, DATA[70_000:])):
        proxy.set(Rule(kind, method="GET", count=1, seconds=5))
        assert action(uri) == expected
    assert proxy.injected[kind] == 2
    proxy.set(Rule("access_denied"))
    with pytest.raises(PermissionError):
        access.read(uri)


# Whole jobs


@pytest.fixture(scope="module")
def undisturbed(server: tuple[FaultProxy, S3Server]) -> str:
    """The output of a run over all images without faults."""
    list(ordered_map(lambda i: access.write(f"{BUCKET}/in/{i:04d}.jpg", jpeg(i)), range(IMAGES), 8, 64))
    server[0].set()
    Run(server[1], "undisturbed", TINY).embed()
    return f"{BUCKET}/out/undisturbed"


class Run:
    """One output of `jobs/embed.py`. Its jobs use the store through the proxy, and start their own Ray."""

    def __init__(self, s3: S3Server, name: str, network: tuple[str, ...], **environment: str) -> None:
        self.output = f"{BUCKET}/out/{name}"
        self.arguments = ("--input", f"{BUCKET}/in", "--output", self.output, *network)
        own = {"RAY_ADDRESS": "local", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
        self.jobs = Jobs({**s3.environment, **own, **environment})

    def embed(self, code: int = 0) -> str:
        done = self.jobs.run("embed", *self.arguments, "--batch-size", 8, "--rows-per-part", 16, code=code)
        return done.stdout + done.stderr

    def start(self, code: int = 0) -> Callable[[], str]:
        """Start the job and wait for its first commits. Returns a function that waits for its end."""
        process = self.jobs.start("embed", *self.arguments, "--batch-size", 8, "--rows-per-part", 16)
        wait_for(lambda: self.commits() >= 2)

        def finish() -> str:
            out, err = process.communicate(timeout=250)
            assert process.returncode == code, f"ended with {process.returncode}:\n{out}\n{err}"
            assert code == 0 or "Traceback" not in err
            return out + err

        return finish

    def commits(self) -> int:
        return len(list(access.list_objects(f"{self.output}/_commits")))

    def check(self, undisturbed: str) -> None:
        """Each image has one row, with the same embedding as without faults."""
        verification = verify(self.output)
        assert verification.is_whole, list(verification.lines())
        assert f"planned {IMAGES} = {IMAGES} rows + 0 errors" in "\n".join(verification.lines())
        assert same(local_embeddings(self.output), local_embeddings(undisturbed))


def local_embeddings(output: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        for info in access.list_objects(output):
            name = info.uri[len(output) + 1 :]
            if name.startswith("results/"):
                (Path(folder) / Path(name).name).write_bytes(access.read(info.uri))
        return embeddings(folder)


slow = pytest.mark.slow
faults = pytest.mark.faults


@faults
def test_a_job_in_which_one_request_in_ten_fails(
    proxy: FaultProxy, server: tuple[FaultProxy, S3Server], undisturbed: str
) -> None:
    run = Run(server[1], "one-in-ten", TINY)
    proxy.set(Rule("slow_down", share=0.05), Rule("internal_error", share=0.05))
    run.embed()
    assert sum(proxy.injected.values()) > 25
    proxy.set()
    run.check(undisturbed)


@faults
def test_a_job_continues_with_new_credentials_after_they_expire(
    proxy: FaultProxy, server: tuple[FaultProxy, S3Server], undisturbed: str
) -> None:
    run = Run(server[1], "expired", TINY, AWS_ACCESS_KEY_ID="short-lived")
    proxy.set(Rule("expired_token", access_key="short-lived", after=120))
    output = run.embed(code=2)
    assert "s3://faulty rejects the credentials (ExpiredToken: The provided token has expired.)" in output
    assert len(output.splitlines()) < 10, output
    Run(server[1], "expired", TINY, AWS_ACCESS_KEY_ID="renewed").embed()
    run.check(undisturbed)


@slow
@faults
def test_a_bucket_that_vanishes_ends_the_job(
    proxy: FaultProxy, server: tuple[FaultProxy, S3Server], undisturbed: str
) -> None:
    run = Run(server[1], "vanished", SLOW)
    finish = run.start(code=2)
    proxy.set(Rule("no_bucket"))
    assert "s3://faulty does not exist (NoSuchBucket)" in finish()
    proxy.set()
    assert "images were done before, by earlier attempts" in run.embed()
    run.check(undisturbed)


@slow
@faults
@pytest.mark.parametrize("seconds", [15, 60])
def test_a_store_that_throttles_for_a_while(
    proxy: FaultProxy,
    server: tuple[FaultProxy, S3Server],
    undisturbed: str,
    seconds: int,
    request: pytest.FixtureRequest,
) -> None:
    if seconds > 20 and "faults" not in request.config.option.markexpr:
        pytest.skip("a whole minute only with -m faults")
    run = Run(server[1], f"throttled-{seconds}", SLOW)
    finish = run.start()
    proxy.set(Rule("slow_down"))
    time.sleep(seconds)
    proxy.set()
    finish()
    assert proxy.injected["slow_down"] > 10
    run.check(undisturbed)


@slow
@faults
def test_a_job_over_a_bad_connection(proxy: FaultProxy, server: tuple[FaultProxy, S3Server], undisturbed: str) -> None:
    run = Run(server[1], "bad-connection", TINY)
    proxy.set(*MIXED)
    run.embed()
    assert set(proxy.injected) == {rule.kind for rule in MIXED}
    proxy.set()
    run.check(undisturbed)


@slow
@faults
def test_a_job_in_which_requests_stall(
    proxy: FaultProxy, server: tuple[FaultProxy, S3Server], undisturbed: str
) -> None:
    run = Run(server[1], "stalled", TINY)
    proxy.set(*(Rule(kind, share=0.05, count=4, seconds=30) for kind in ("stall", "stall_in_body")))
    run.embed()
    assert sum(proxy.injected.values()) >= 4
    proxy.set()
    run.check(undisturbed)
