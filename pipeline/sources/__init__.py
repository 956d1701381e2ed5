"""Readers: one module per kind of shard. All follow the contract in `base`."""

from collections.abc import Iterator

import pyarrow as pa

from pipeline.coverage import Ranges
from pipeline.sources import mbtiles, objects, parquet, pmtiles, safe, scene, stac, tar, vectors, zip
from pipeline.sources.base import ReadOptions, Record, ShardEnd, Source, is_image
from pipeline.sources.shard import Shard
from pipeline.storage.credentials import hide_credentials

__all__ = ["SOURCES", "ReadOptions", "Record", "ShardEnd", "is_image", "read", "source_of"]

SOURCES: dict[str, Source] = {
    source.kind: source
    for source in (
        objects.SOURCE,
        tar.SOURCE,
        zip.SOURCE,
        parquet.SOURCE,
        mbtiles.SOURCE,
        pmtiles.SOURCE,
        scene.SOURCE,
        safe.SOURCE,
        stac.SOURCE,
        vectors.SOURCE,
    )
}
"""All kinds of shards by name. To add a kind, write its module and add one line here."""


def source_of(uri: str, *, has_scenes: bool = False) -> Source | None:
    """The source that reads a file of this name; None for hidden files and for other kinds of files.

    has_scenes: rasters such as .tif are scenes, not images.
    """
    name = uri.lower()
    if name.rpartition("/")[2].startswith("."):
        return None
    if has_scenes and name.endswith(scene.RASTER_SUFFIXES):
        return scene.SOURCE
    return next((source for source in SOURCES.values() if name.endswith(source.suffixes)), None)


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the rows in `todo` of a shard of any kind. The contract is in `pipeline.sources.base`."""
    for uri in options.with_credentials:
        hide_credentials(uri)
    return SOURCES[shard.kind].read(shard, todo, options)


def read_tables(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[pa.Table | Record | ShardEnd] | None:
    """The rows in `todo` as tables; None if shards of this kind have only records."""
    tables = SOURCES[shard.kind].tables
    return tables(shard, todo, options) if tables else None
