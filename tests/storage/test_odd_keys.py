"""Keys that obstore rejects: each costs itself, and never the objects beside it."""

import sys
from collections.abc import Iterator
from typing import Any

import boto3
import obstore
import obstore.exceptions
import pytest
from cloud_servers import gcs_server, gcs_upload
from servers import S3Server
from source_contract import image, read_all

from pipeline.config import RunConfig
from pipeline.errors import InputRefused
from pipeline.planning.archive import Archive
from pipeline.storage import access, bucket, odd_keys
from pipeline.threads import ordered_map

ODD = ["../up.png", "./here.png", "/slash.png", "//two.png", "tab\t.png", "x//empty.png"]


@pytest.fixture
def put(s3: S3Server) -> Iterator[Any]:
    client = boto3.client("s3", endpoint_url=s3.endpoint)
    bucket.bucket_store.cache_clear()
    yield lambda key, data: client.put_object(Bucket="archive", Key=key, Body=data)
    bucket.bucket_store.cache_clear()


def test_an_odd_key_is_an_error_row_beside_the_others(put: Any, s3: S3Server) -> None:
    for name in ("a.png", "t.png", "z/b.png"):
        put(f"odd-keys/{name}", image(1))
    for name in ODD:
        put(f"odd-keys/{name}", b"" if "empty" in name else image(2))
    for name in (".hidden.png", "z/.hidden/c.png", "marker/", "slashes//", "x//notes.npy"):
        put(f"odd-keys/{name}", b"" if name.endswith("/") else b"x")
    archive = Archive(RunConfig(input=s3.uri("odd-keys"), output="/o"))
    (shard,) = archive.shards()
    records, _ = read_all(shard)
    by_id = {record.image_id: record for record in records}
    expected = sorted(f"{s3.uri('odd-keys')}/{name}" for name in ("a.png", "t.png", "z/b.png", *ODD))
    assert sorted(by_id) == expected
    good = {uri for uri, record in by_id.items() if record.data == image(1)}
    assert good == {s3.uri(f"odd-keys/{name}") for name in ("a.png", "t.png", "z/b.png")}
    for name in ODD:
        error = by_id[s3.uri(f"odd-keys/{name}")].error
        assert error is not None
        assert error.error_type == "unreadable"
        assert "rename the object" in error.message
    assert archive.left_out.counts == {".npy": 1, ".png hidden": 1, ".hidden/ hidden": 1}


def test_an_odd_key_after_the_first_page(put: Any, s3: S3Server) -> None:
    keys = [f"pages/{number:04d}.png" for number in range(1005)]
    list(ordered_map(lambda key: access.write(s3.uri(key), b"1"), keys, 8, 64))
    put("pages/9//x.png", b"1")
    put("pages/last.png", b"1")
    listed = [info.uri for info in access.list_objects(s3.uri("pages"))]
    assert listed == [s3.uri(key) for key in (*keys, "pages/9//x.png", "pages/last.png")]


def test_the_list_has_the_sizes_and_etags_of_obstore(put: Any, s3: S3Server) -> None:
    put("same/a.png", image(1))
    expected = list(access.list_objects(s3.uri("same")))
    put("same//odd.png", b"1")
    assert [info for info in access.list_objects(s3.uri("same")) if "odd" not in info.uri] == expected


def test_credentials_that_botocore_does_not_find_end_in_a_sentence(
    put: Any, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("lost//a.png", b"1")

    def fail(*_: object) -> Iterator[Any]:
        raise RuntimeError("Unable to locate credentials")

    monkeypatch.setattr(odd_keys, "s3_entries", fail)
    with pytest.raises(InputRefused, match=r"archive/lost cannot be listed: .*//a\.png.*Unable to locate.*; rename"):
        list(access.list_objects(s3.uri("lost")))


def test_odd_keys_of_google_cloud_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.png", "t.png", "z/b.png"]
    with gcs_server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
        bucket.bucket_store.cache_clear()
        for name in names:
            gcs_upload(server, f"d/{name}", image(1))
        expected = list(access.list_objects("gs://archive/d"))
        for name in ("//two.png", "tab\t.png", "x//empty.png", "z/.hidden/c.png"):
            gcs_upload(server, f"d/{name}", b"1")
        listed = list(access.list_objects("gs://archive/d"))
        good = [info for info in listed if info.uri in {info.uri for info in expected}]
        assert [info.uri for info in good] == [f"gs://archive/d/{name}" for name in names]
        for info in good:
            assert access.read(info.uri, info.etag) == image(1)
        odd = sorted({info.uri for info in listed} - {info.uri for info in good})
        assert odd == [f"gs://archive/d/{name}" for name in ("//two.png", "tab\t.png", "x//empty.png")]
        with pytest.raises(OSError, match="rename the object"):
            access.read(odd[0])
    bucket.bucket_store.cache_clear()


@pytest.mark.parametrize(("root", "extra"), [("gs://bucket", "gs"), ("az://container", "az")])
def test_a_missing_sdk_is_named(root: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:9")
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    monkeypatch.setitem(sys.modules, "azure.storage.blob", None)
    bucket.bucket_store.cache_clear()
    monkeypatch.setattr(obstore, "list", lambda *_, **__: Failing())
    with pytest.raises(InputRefused, match=rf"^{root}/p cannot be listed: .*a//b\.png.*nightshift\[{extra}\].*rename"):
        list(access.list_objects(f"{root}/p"))
    bucket.bucket_store.cache_clear()


class Failing:
    def __iter__(self) -> "Failing":
        return self

    def __next__(self) -> Any:
        raise obstore.exceptions.InvalidPathError("Encountered object with invalid path: a//b.png")
