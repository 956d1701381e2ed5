"""Raster scenes for tests: written by rasterio, and read through `pipeline.sources` alone."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.windows import Window

from pipeline import sources
from pipeline.coverage import END, Ranges
from pipeline.geo.windows import Tiling
from pipeline.sources import ReadOptions, Record, ShardEnd, scene
from pipeline.sources.shard import Shard
from pipeline.storage import access

UTM = Affine(10, 0, 500_000, 0, -10, 4_500_000)


def numbers(bands: int, height: int, width: int, dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    """[bands, height, width] without 0, which tests use for no data."""
    high = np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1000
    return np.random.default_rng(seed).integers(1, min(high, 10_000), (bands, height, width)).astype(dtype)


def write(path: Path, array: np.ndarray, transform: Any = UTM, crs: Any = "EPSG:32618", **profile: Any) -> Path:
    """Write [bands, height, width] as a GeoTIFF, or what `driver` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands, height, width = array.shape
    shape = {"count": bands, "height": height, "width": width, "dtype": array.dtype}
    options = {"driver": "GTiff", **shape, "transform": transform, "crs": crs, **profile}
    with rasterio.open(path, "w", **{key: value for key, value in options.items() if value is not None}) as file:
        file.write(array)
    return path


def tiling(size: int = 64, **more: Any) -> Tiling:
    return Tiling(**{"size": size, "stride": size, **more})


def shards_of(uri: object, how: Tiling | None = None, **options: Any) -> list[Shard]:
    """The shards of a scene as the plan stores them."""
    info = access.head(str(uri))
    read_options = ReadOptions(tiling=how or tiling(), **options)
    contents = list(scene.shards(info, read_options))
    payloads = [scene.Scene.from_json(each.payload.to_json()) for each in contents if each.payload]
    return [
        Shard(index, "scene", str(uri), each.rows, each.size_bytes or 0, info.etag, payload)
        for index, (each, payload) in enumerate(zip(contents, payloads, strict=True))
    ]


def windows_of(shard: Shard, todo: Ranges = ((0, END),), **options: Any) -> list[Record]:
    """Read a shard, and check what holds for every read."""
    *records, end = sources.read(shard, todo, ReadOptions(**{"network_bands": 3, **options}))
    assert isinstance(end, ShardEnd)
    assert end.rows == shard.rows
    assert all(isinstance(record, Record) for record in records)
    assert len({record.image_id for record in records}) == len(records)
    return records


def all_windows(uri: object, how: Tiling | None = None, **options: Any) -> list[Record]:
    planned = {name: value for name, value in options.items() if name == "bands"}
    return [record for shard in shards_of(uri, how, **planned) for record in windows_of(shard, **options)]


def window_of(record: Record) -> Window:
    return Window(*(record.kept[f"window_{name}"] for name in ("col", "row", "width", "height")))


class Counting(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with ranges. ranges: of all requests for bytes, by path."""

    protocol_version = "HTTP/1.1"
    ranges: list[tuple[str, int, int]]

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(wanted[1]), min(int(wanted[2]) + 1, len(data))) if wanted else (0, len(data))
        type(self).ranges.append((path.name, start, stop))
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        self.end_headers()
        self.wfile.write(data[start:stop])

    def end_headers(self) -> None:
        if self.command == "HEAD":
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def counting_server(folder: Path) -> Iterator[tuple[str, type[Counting]]]:
    handler = type("Handler", (Counting,), {"ranges": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
