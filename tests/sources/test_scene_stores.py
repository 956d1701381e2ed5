"""Scenes on Google Cloud Storage and Azure: planned, pinned and read by the credentials of all other sources."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import scenes
from cloud_servers import azure_server, gcs_server, gcs_upload
from scenes import shards_of, tiling, windows_of

from pipeline.config import RunConfig
from pipeline.planning.archive import Archive
from pipeline.storage import access, bucket

BANDS = {"tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": "band", "compress": "deflate"}


def make(folder: Path) -> Path:
    """A scene of 3 × 4 windows of 100, with a mask in a file beside it."""
    path = scenes.write(folder / "a b.tif", scenes.numbers(3, 300, 400, "uint16"), nodata=7, **BANDS)
    (folder / "a b.tif.aux.xml").write_text("<PAMDataset></PAMDataset>")
    return path


def check(uri: str, local: Path) -> None:
    """The windows of a scene in a store are those of the file here."""
    archive = Archive(RunConfig(input=(uri.rpartition("/")[0],), output="/out", tile_size=100, scale="0:10000"))
    archive.use_for(3, takes_8_bits=True)
    planned = [shard for shard in archive.shards() if shard.kind == "scene"]
    assert [(shard.uri, shard.rows) for shard in planned] == [(uri, 12)]
    assert planned[0].etag
    (shard,) = shards_of(uri, tiling(100))
    records, expected = windows_of(shard), windows_of(shards_of(local, tiling(100))[0])
    assert len(records) == 12
    for record, other in zip(records, expected, strict=True):
        assert record.error is None
        assert record.image_id == f"{uri}#{other.member}"
        assert np.ma.allequal(record.data, other.data)
        assert {**record.kept, "scene": ""} == {**other.kept, "scene": ""}


def check_replaced(uri: str, replace: Callable[[], None]) -> None:
    """A file that was replaced after it was planned gives error rows."""
    (shard,) = shards_of(uri, tiling(100))
    replace()
    errors = [record.error for record in windows_of(shard)]
    assert [error and error.error_type for error in errors] == ["changed"] * 12


@pytest.fixture
def no_azure_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR"):
        monkeypatch.delenv(name, raising=False)
    bucket.bucket_store.cache_clear()
    yield
    bucket.bucket_store.cache_clear()


@pytest.mark.long  # installs Azurite; Google Cloud Storage shows the same in a second
def test_azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_azure_settings: None) -> None:
    local = make(tmp_path)
    with azure_server(tmp_path / "azurite") as connection:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
        for path in (local, tmp_path / "a b.tif.aux.xml"):
            access.write(f"az://archive/scenes/{path.name}", path.read_bytes())
        check(f"az://archive/scenes/{local.name}", local)
        uri = f"az://archive/scenes/{local.name}"
        check_replaced(uri, lambda: access.write(uri, b"other"))


def test_google_cloud_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.bucket_store.cache_clear()
    local = make(tmp_path)
    with gcs_server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
        for path in (local, tmp_path / "a b.tif.aux.xml"):
            gcs_upload(server, f"scenes/{path.name}", path.read_bytes())
        check(f"gs://archive/scenes/{local.name}", local)
        uri = f"gs://archive/scenes/{local.name}"
        check_replaced(uri, lambda: gcs_upload(server, f"scenes/{local.name}", b"other"))
    bucket.bucket_store.cache_clear()
