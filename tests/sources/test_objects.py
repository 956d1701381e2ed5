"""Loose images."""

from pathlib import Path

from source_contract import Members, SourceContract

from pipeline.sources.objects import LooseImages
from pipeline.sources.shard import Shard
from pipeline.storage import access


class TestObjects(SourceContract):
    kind = "objects"

    def make(self, folder: Path, members: Members) -> Shard:
        paths = [folder / name for name, _ in members]
        for path, (_, data) in zip(paths, members, strict=True):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        etags = tuple(access.head(str(path)).etag for path in paths)
        return Shard(
            0, self.kind, str(folder), len(paths), payload=LooseImages(tuple(name for name, _ in members), etags=etags)
        )
