"""The parts of another output as an archive: `classify --from` plans them as it plans images."""

from collections.abc import Iterator
from functools import cached_property

import pyarrow as pa

from pipeline.errors import InputRefused, message_line
from pipeline.explore.table import Output, Part, open_output
from pipeline.planning.archive import Archive, limited
from pipeline.planning.update import Change
from pipeline.sources import SOURCES, vectors
from pipeline.sources.base import ReadOptions
from pipeline.sources.shard import Shard
from pipeline.storage import access, uris
from pipeline.storage.base import ObjectInfo
from pipeline.threads import ordered_map

THREADS = 16


class VectorArchive(Archive):
    """The committed parts of the output that `--from` names: those of results and those of errors.

    Raises InputRefused if it is no finished output with vectors.
    """

    @cached_property
    def output(self) -> Output:
        output = open_output(self.config.input[0])
        if not output.is_finished:
            raise InputRefused(f"--from {output.uri}: its run has not finished; run its command again first")
        if output.parts:
            output.require(["image_id", vectors.COLUMN])
        return output

    def check(self) -> None:
        """Raise InputRefused if the output cannot be used."""
        assert self.output.parts is not None

    def shards(self) -> Iterator[Shard]:
        """One shard per part, sorted by URI."""
        self._set_keep_types()
        shards = (self._vector_shard(info) for info in self._objects())
        yield from shards if self.config.limit is None else limited(shards, self.config.limit, self.options())

    def new_shards(self, change: Change) -> Iterator[Shard]:
        """The parts that an earlier plan does not contain.

        Raises InputRefused if parts that it contains are gone: an image of theirs may be in a new part too.
        """
        self._set_keep_types()
        for info in change.new(self._objects()):
            yield self._vector_shard(info)
        if change.removed:
            raise InputRefused(
                f"--update: {change.removed} parts of {self.output.uri} were rewritten, because images of its archive "
                "were replaced; classify it again with --overwrite"
            )

    def options(self) -> ReadOptions:
        return ReadOptions((*self.config.keep_names(), *self._places()))

    @cached_property
    def _parts(self) -> dict[str, Part]:
        parts = [*self.output.parts, *self.output.error_parts]
        return {uris.join(self.output.uri, part.path): part for part in sorted(parts, key=lambda part: part.path)}

    def _objects(self) -> Iterator[ObjectInfo]:
        try:
            yield from ordered_map(access.head, list(self._parts), THREADS, 4 * THREADS)
        except OSError as error:
            raise InputRefused(f"--from {self.output.uri} cannot be read: {message_line(error)}") from error

    def _vector_shard(self, info: ObjectInfo) -> Shard:
        return Shard(0, vectors.KIND, info.uri, self._parts[info.uri].rows, info.size_bytes, info.etag)

    def _places(self) -> list[str]:
        """The columns that the sources of the output gave to its rows, such as footprints. They are always kept."""
        own = {column.name for source in SOURCES.values() for column in source.columns}
        asked = self.config.keep_names()
        return [name for name in self.output.schema.names if name in own and name not in asked]

    def _set_keep_types(self) -> None:
        for name in self._places():
            self.keep_types[name] = self.output.schema.field(name).type
        for name in self.config.keep_names():
            if self.output.parts:
                self.output.require([name])
                self.keep_types[name] = _plain(self.output.schema.field(name).type)


def _plain(type_: pa.DataType) -> pa.DataType:
    """The type without the dictionary that a writer may have used."""
    return type_.value_type if pa.types.is_dictionary(type_) else type_
