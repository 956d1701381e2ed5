"""One contract for all stores: local disk, a real S3 server, and fsspec's memory."""

import contextlib
import errno
import http.server
import io
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import fsspec
import pytest
from azure.storage.blob import ContainerClient
from cloud_servers import azure_server, gcs_server, gcs_upload
from servers import S3Server
from small_run import run_python

from jobs.bench.harness import s3
from pipeline.config import RunConfig
from pipeline.errors import OutputRefused, SettingRefused, StorageRefused
from pipeline.output.lock import Lock
from pipeline.sources import ReadOptions, Record, objects
from pipeline.sources.objects import LooseImages
from pipeline.sources.shard import Shard
from pipeline.storage import access, bucket, local, uris
from pipeline.storage.base import Changed, Hidden, TooLarge
from pipeline.threads import ordered_map


class StorageContract:
    """Subclasses define the fixture `base`, the URI of an empty folder."""

    def test_what_is_written_is_read(self, base: str) -> None:
        access.write(f"{base}/a/b.bin", b"x" * 3000)
        assert access.read(f"{base}/a/b.bin") == b"x" * 3000
        assert access.head(f"{base}/a/b.bin").size_bytes == 3000
        with access.open_read(f"{base}/a/b.bin") as file:
            assert file.seek(2990) == 2990
            assert file.read() == b"x" * 10
            assert file.seek(-1, os.SEEK_END) == 2999

    def test_names_with_odd_characters(self, base: str) -> None:
        names = ["a b.txt", "ü-日本.txt", "a#b.txt", "100%.txt", "a+b=c&d.txt", "it's (1).txt"]
        for name in names:
            access.write(f"{base}/{name}", name.encode())
        assert [access.read(f"{base}/{name}") for name in names] == [name.encode() for name in names]
        assert [info.uri for info in access.list_objects(base)] == sorted(f"{base}/{name}" for name in names)

    def test_missing_objects(self, base: str) -> None:
        for action in (access.read, access.head, access.open_read):
            with pytest.raises(FileNotFoundError):
                action(f"{base}/none")
        access.delete(f"{base}/none")

    def test_create_keeps_an_object_that_exists(self, base: str) -> None:
        access.create(f"{base}/one", b"first")
        with pytest.raises(FileExistsError):
            access.create(f"{base}/one", b"second")
        assert access.read(f"{base}/one") == b"first"
        assert [info.uri for info in access.list_objects(base)] == [f"{base}/one"]

    def test_lists_are_sorted_by_whole_path_and_skip_hidden_names(self, base: str) -> None:
        names = ["a/z", "a-b/c", "a.txt", "a0", "b", ".hidden", ".dir/x", "a/.tmp"]
        for name in names:
            access.write(f"{base}/{name}", b"1")
        listed = [info.uri for info in access.list_objects(base)]
        assert listed == sorted(listed)
        assert set(listed) == {f"{base}/{name}" for name in names[:5]}
        unread = [info for info in access.list_objects(base, with_unread=True) if isinstance(info, Hidden)]
        assert sorted(info.uri for info in unread) == [f"{base}/.dir/", f"{base}/.hidden", f"{base}/a/.tmp"]

    def test_globs(self, base: str) -> None:
        for name in ["a/1.jpg", "a/2.png", "b/3.jpg", "b/c/4.jpg"]:
            access.write(f"{base}/{name}", b"1")
        assert [info.uri for info in access.list_glob(f"{base}/*/*.jpg")] == [f"{base}/a/1.jpg", f"{base}/b/3.jpg"]
        assert len(list(access.list_glob(f"{base}/**/*.jpg"))) == 3
        assert len(list(access.list_glob(f"{base}/[ab]/?.jpg"))) == 2

    def test_a_replaced_object_is_noticed(self, base: str) -> None:
        access.write(f"{base}/x", b"one")
        etag = next(iter(access.list_objects(base))).etag
        assert access.read(f"{base}/x", etag) == b"one"
        access.write(f"{base}/x", b"other")
        with pytest.raises(Changed, match="replaced"):
            access.read(f"{base}/x", etag)
        with pytest.raises(Changed):
            access.open_read(f"{base}/x", etag)

    def test_delete(self, base: str) -> None:
        access.write(f"{base}/x", b"1")
        access.delete(f"{base}/x")
        assert list(access.list_objects(base)) == []


class TestLocal(StorageContract):
    @pytest.fixture
    def base(self, tmp_path: Path) -> str:
        folder = tmp_path / "base"
        folder.mkdir()
        return str(folder)

    def test_a_link_to_a_parent_folder_is_not_followed(self, base: str) -> None:
        access.write(f"{base}/d/x", b"1")
        os.symlink(base, f"{base}/d/loop")
        assert [info.uri for info in access.list_objects(base)] == [f"{base}/d/x"]

    def test_a_failed_write_leaves_nothing_behind(self, base: str) -> None:
        os.mkdir(f"{base}/taken")
        with pytest.raises(OSError, match="taken"):
            access.write(f"{base}/taken", b"1")
        assert [name for name in os.listdir(base) if name != "taken"] == []


def refuse(code: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


class TestLocalWithoutHardLinks(TestLocal):
    """SMB, exFAT and mounts of buckets."""

    @pytest.fixture(autouse=True, params=["EPERM", "EIO"])
    def without_links(self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        monkeypatch.setattr(os, "link", refuse(getattr(errno, request.param)))


class TestLocalWithoutExclusiveRename(TestLocalWithoutHardLinks):
    """FUSE file systems that have only a plain rename."""

    @pytest.fixture(autouse=True)
    def without_rename(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(local, "_rename_exclusively", refuse(errno.EINVAL))

    def test_one_of_many_creators_wins(self, base: str) -> None:
        def create(number: int) -> bool:
            try:
                access.create(f"{base}/one", b"%d" % number)
            except FileExistsError:
                return False
            return True

        won = list(ordered_map(create, range(200), 8, 64))
        assert sum(won) == 1
        assert access.read(f"{base}/one") == b"%d" % won.index(True)
        assert os.listdir(base) == ["one"]

    def test_what_is_missing_is_named(self, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "replace", refuse(errno.ENOSYS))
        with pytest.raises(OutputRefused, match=r"cannot be written: .*cannot rename files"), Lock(base):
            pass
        assert os.listdir(base) == []


@pytest.mark.timeout(20)
def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(OSError, match=r"x\.tar is a pipe, a socket or a device"):
        access.open_read(str(tmp_path / "x.tar"))


class TestS3(StorageContract):
    @pytest.fixture
    def base(self, s3: S3Server, request: pytest.FixtureRequest) -> str:
        return s3.uri(f"storage/{request.node.name}")

    def test_more_than_one_page_of_a_list(self, base: str) -> None:
        list(ordered_map(lambda i: access.write(f"{base}/{i:05d}", b"1"), range(1100), 8, 64))
        assert [info.uri[-5:] for info in access.list_objects(base)] == [f"{i:05d}" for i in range(1100)]


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with azure_server(tmp_path_factory.mktemp("azurite")) as connection:
        yield connection


@pytest.mark.slow
class TestAzure(StorageContract):
    @pytest.fixture
    def base(self, azure: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
        for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure)
        bucket.bucket_store.cache_clear()
        yield f"az://archive/storage/{request.node.name}"
        bucket.bucket_store.cache_clear()

    def test_an_object_of_several_parts(self, base: str) -> None:
        data = os.urandom(12 << 20)
        access.write(f"{base}/large", data)
        assert access.read(f"{base}/large") == data

    def test_odd_keys_cost_themselves(self, base: str, azure: str) -> None:
        for name in ("a.png", "z.png"):
            access.write(f"{base}/{name}", b"1")
        container = ContainerClient.from_connection_string(azure, "archive")
        for name in ("//two.png", "tab\t.png", ".hidden"):
            container.upload_blob(f"{base.removeprefix('az://archive/')}/{name}", b"2")
        infos = {info.uri.removeprefix(f"{base}/"): info for info in access.list_objects(base)}
        assert list(infos) == ["//two.png", "a.png", "tab\t.png", "z.png"]
        for name in ("a.png", "z.png"):
            assert access.read(infos[name].uri, infos[name].etag) == b"1"
        with pytest.raises(OSError, match="rename the object"):
            access.read(infos["//two.png"].uri)

    def test_a_missing_container_ends_the_run_with_one_line(self, base: str) -> None:
        with pytest.raises(StorageRefused, match=r"^az://none does not exist \(ContainerNotFound\)") as caught:
            access.read("az://none/x")
        assert "\n" not in str(caught.value)


def test_google_cloud_storage_is_listed_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """No emulator has all of the XML API, which obstore uses: writes are tested in test_cloud_settings.py."""
    bucket.bucket_store.cache_clear()
    base = "gs://archive/d"
    with gcs_server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
        names = ["a b.jpg", "a#b.jpg", "a/ü.jpg", "b.jpg", ".hidden"]
        for name in names:
            gcs_upload(server, f"d/{name}", name.encode() * 1000)
        listed = list(access.list_objects(base))
        assert [info.uri for info in listed] == [f"{base}/{name}" for name in names[:4]]
        for info, name in zip(listed, names, strict=False):
            assert access.head(info.uri).size_bytes == info.size_bytes == len(name.encode()) * 1000
            assert access.read(info.uri, info.etag) == name.encode() * 1000
            with access.open_read(info.uri, info.etag) as file:
                assert file.seek(-10, os.SEEK_END) > 0
                assert file.read() == (name.encode() * 1000)[-10:]
        with pytest.raises(FileNotFoundError):
            access.read(f"{base}/none")
        gcs_upload(server, "d/b.jpg", b"other")
        with pytest.raises(Changed):
            access.read(f"{base}/b.jpg", listed[-1].etag)
        access.delete(f"{base}/b.jpg")
        assert len(list(access.list_objects(base))) == 3
    bucket.bucket_store.cache_clear()


def test_a_server_that_lists_etags_without_their_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quotes").mkdir()
    (tmp_path / "quotes" / "x").write_bytes(b"one")
    with s3.serve(tmp_path) as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        (listed,) = access.list_objects("s3://quotes")
        assert access.read("s3://quotes/x", listed.etag) == b"one"
        with pytest.raises(Changed):
            access.read("s3://quotes/x", f'"{"0" * 32}"')


class TestFsspec(StorageContract):
    @pytest.fixture
    def base(self, request: pytest.FixtureRequest) -> Iterator[str]:
        yield f"memory://{request.node.name}"
        fsspec.filesystem("memory").store.clear()


def test_normalize_gives_one_spelling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert uris.normalize("photos/") == f"{tmp_path}/photos"
    assert uris.normalize("file:///data/x") == "/data/x"
    assert uris.normalize("s3a://b/p/") == "s3://b/p"


def test_the_region_is_that_of_the_profile_if_the_environment_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bucket._profile_region() is None
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text("[default]\nregion = eu-central-1\n")
    assert bucket._profile_region() == "eu-central-1"
    monkeypatch.setenv("AWS_PROFILE", "night")
    with pytest.raises(SettingRefused, match=r"the AWS profile \(AWS_PROFILE, ~/\.aws\) is not valid: .*night"):
        bucket._profile_region()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("nosuch://a/b", "has an unsupported scheme: .*nosuch"),
        ("webdav://host/b", "has an unsupported scheme: mount the server, with rclone or davfs2"),
        ("b2://bucket/b", "has an unsupported scheme: write s3://bucket/path, with the server in AWS_ENDPOINT_URL"),
    ],
)
def test_an_unknown_scheme_ends_in_a_sentence(uri: str, message: str) -> None:
    with pytest.raises(OSError, match=f"^{uri.partition('://')[0]}:// {message}"):
        access.read(uri)
    with pytest.raises(SettingRefused, match=f"^--input {uri} {message}"):
        RunConfig(input=uri, output="/o")


def test_a_scheme_without_its_package_names_the_package() -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('paramiko', 'smbclient', 'requests', 'pygit2'))\n"
        "from pipeline.storage.uris import check_uri\n"
        "for uri in ('sftp://h/a', 'smb://h/a', 'github://o:r@b/a', 'git://h/a'):\n"
        "    print(check_uri(uri))\n"
    )
    needs = "needs a package that is not installed: "
    assert run_python("-c", code).splitlines() == [
        f"{needs}run pip install paramiko",
        f"{needs}run pip install smbprotocol",
        f"{needs}run pip install requests",
        f"{needs}Install pygit2 to browse local git repos",
    ]


class Endless(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 16))

    def log_message(self, *_: object) -> None:
        pass


def test_an_endless_response_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.base.MAX_OBJECT_BYTES", 1 << 20)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(TooLarge, match="the limit is 1048576"):
            access.read(f"http://127.0.0.1:{server.server_port}/a.jpg")
        server.shutdown()


class Plain(http.server.BaseHTTPRequestHandler):
    """Sends `content` without its length. The first `refusals` requests are refused."""

    content, refusals, modified = b"", 0, ""

    def do_HEAD(self) -> None:
        self.respond()

    def do_GET(self) -> None:
        if self.respond():
            self.wfile.write(self.content)

    def respond(self) -> bool:
        if type(self).refusals:
            type(self).refusals -= 1
            self.send_error(503)
            return False
        self.send_response(200)
        if self.modified:
            self.send_header("Last-Modified", self.modified)
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        return True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def plain() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
    Plain.content, Plain.refusals, Plain.modified = b"", 0, ""


def archive_of(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return buffer.getvalue()


def test_a_response_without_a_length_can_be_read_at_any_position(plain: str) -> None:
    Plain.content = archive_of(["a.jpg", "b.jpg"])
    with access.open_read(f"{plain}main.zip") as file, zipfile.ZipFile(file) as archive:
        assert archive.read("b.jpg") == b"b.jpg"
    Plain.content = b"a.jpg\nb.jpg\n"
    with access.open_read(f"{plain}list.txt") as file:
        assert list(file) == [b"a.jpg\n", b"b.jpg\n"]


@pytest.mark.parametrize("refusals", [2, 4, 7])
def test_a_web_server_that_fails_for_a_moment_is_retried(plain: str, refusals: int) -> None:
    """fsspec requests the size twice and reports every failure as FileNotFoundError."""
    Plain.content, Plain.refusals = b"tar", refusals
    with access.open_read(f"{plain}a.tar") as file:
        assert file.read() == b"tar"


def test_without_an_etag_the_date_is_the_version(plain: str) -> None:
    Plain.content, Plain.modified = b"one", formatdate(time.time(), usegmt=True)
    assert access.head(f"{plain}a.tar").etag == "", "the server may generate it for each request"
    Plain.modified = formatdate(1e9, usegmt=True)
    etag = access.head(f"{plain}a.tar").etag
    assert etag == "1000000000.0/3"
    Plain.content = b"other"
    with pytest.raises(Changed):
        access.open_read(f"{plain}a.tar", etag)


def test_an_object_of_a_list_that_is_too_large_is_an_error(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.uri("large/video.jpg")
    access.write(uri, bytes(2000))
    monkeypatch.setattr("pipeline.storage.base.MAX_OBJECT_BYTES", 1000)
    shard = Shard(0, "objects", "", 1, payload=LooseImages((uri,)))
    record, _ = objects.read(shard, ((0, 1),), ReadOptions())
    assert isinstance(record, Record)
    assert record.error is not None
    assert record.error.error_type == "too_large"


def test_objects_of_unknown_size_are_expected_to_be_as_large_as_the_last_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetched, counts = set(), []

    def read(uri: str, etag: str) -> bytes:
        fetched.add(uri)
        return bytes(100)

    monkeypatch.setattr("pipeline.threads.AHEAD_BYTES", 250)
    monkeypatch.setattr(access, "read", read)
    keys = tuple(f"s3://bucket/{i}.tif" for i in range(200))
    for record in objects.read(Shard(0, "objects", "", 200, payload=LooseImages(keys)), ((0, 200),), ReadOptions()):
        if isinstance(record, Record):
            fetched.discard(record.source)
            counts.append(len(fetched))
    assert max(counts[40:]) <= 4


def test_circular_and_broken_links_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "nothing.jpg").symlink_to("there-is-no-such-file.jpg")
    (tmp_path / "above").symlink_to(tmp_path)
    assert [info.uri for info in access.list_objects(str(tmp_path))] == [str(tmp_path / "a.jpg")]
