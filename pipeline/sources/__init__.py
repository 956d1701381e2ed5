"""What archives are made of: one module a kind of shard, all of one contract (`base`), found by `discover`."""

from collections.abc import Callable, Iterator

from pipeline import storage
from pipeline.coverage import Ranges
from pipeline.plan import Shard
from pipeline.sources import objects, parquet, tar, zip
from pipeline.sources.base import ReadOptions, Record, ShardEnd, is_image

__all__ = ["READERS", "ReadOptions", "Record", "ShardEnd", "is_image", "read"]

READERS: dict[str, Callable[[Shard, Ranges, ReadOptions], Iterator[Record | ShardEnd]]] = {
    "objects": objects.read,
    "tar": tar.read,
    "zip": zip.read,
    "parquet": parquet.read,
}


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the rows of `todo` from a shard of any kind. The contract is in `pipeline.sources.base`."""
    for uri in options.signed:
        storage.withhold(uri)
    return READERS[shard.kind](shard, todo, options)
