"""What `--input` names → a stream of shards. Runs on the driver before any work, and refuses what cannot work."""

import heapq
import itertools
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import pyarrow as pa
from braceexpand import braceexpand

from pipeline import plan as plans
from pipeline import sources, storage
from pipeline.config import RunConfig
from pipeline.errors import InputRefused, message_line
from pipeline.plan import OBJECTS_PER_SHARD, Plan, Shard
from pipeline.prefetch import ordered_map
from pipeline.sources import parquet, uris
from pipeline.sources.base import ReadOptions, ShardEnd, is_image
from pipeline.sources.records import only
from pipeline.storage import ObjectInfo
from pipeline.update import Change

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.zst")
FOOTER_THREADS = 16


@dataclass
class Archive:
    """Everything that `--input` names.

    keep_types: the `--keep` columns by their names in the shards; complete once `shards()` has been read to its end.
    """

    config: RunConfig
    keep_types: dict[str, pa.DataType] = field(default_factory=dict)

    def new_shards(self, change: Change) -> Iterator[Shard]:
        """The shards of what is not in an earlier plan, or is not there as it is now; may be none."""
        if lists := self._lists():
            raise InputRefused(
                f"--update cannot tell what is new in a list of URIs: give {lists[0]} an output of its own"
            )
        self.keep_types.update((column.name, column.type) for column in change.plan.keep)
        yield from self._group(
            change.new(_merged([self._first_checked(name) for name in self._names()])), may_be_broken=True
        )

    def shards(self) -> Iterator[Shard]:
        """Every shard, sorted by URI within each input kind, no object twice; raises InputRefused."""
        shards = self._list_shards()
        if self.config.limit is not None:
            shards = _limited(shards, self.config.limit, self.options())
        first = next(shards, None)
        if first is None:
            raise InputRefused(f"--input {' '.join(self.config.input)} names no images")
        yield from itertools.chain([first], shards)
        if self.config.keep and not self.keep_types:
            raise InputRefused(f"--keep {','.join(self.config.keep)}: loose images carry no columns")

    def options(self) -> ReadOptions:
        return ReadOptions(
            tuple(self.config.keep_names()), self.config.image_column, tuple(storage.signed(self._names()))
        )

    def signed_keys(self, plan: Plan) -> dict[int, tuple[str, ...]]:
        """By shard, the keys whose credentials are not in the plan; raises InputRefused."""
        if not plan.withheld:
            return {}
        planned = (each for each in plans.read_shards(plan) if each.kind == "objects" and each.key_etags is None)
        return uris.signed_keys(planned, self._lists(), self.config.uri_column)

    def _list_shards(self) -> Iterator[Shard]:
        lists = self._lists()
        streams = [self._first_checked(name) for name in self._names() if name not in lists]
        seen = uris.Seen()
        objects = _merged(streams)
        yield from self._group(_noted(objects, seen) if lists else objects)
        for name in lists:
            yield from uris.list_shards(name, self.config.uri_column, self.config.keep_names(), self.keep_types, seen)

    def _names(self) -> list[str]:
        found: dict[str, str] = {}
        names = []
        for full in (name for given in self.config.input for name in _expand(given)):
            name = storage.withhold(full)
            if storage.escaped(name) != name:
                raise _not_utf_8(name)
            if found.setdefault(name, full) != full:
                raise InputRefused(
                    f"--input {name} is given twice with different queries or credentials, which are written nowhere: "
                    "name such images in a list of URIs, where each is one of its own"
                )
            names.append(name)
        return names

    def _lists(self) -> list[str]:
        return list(dict.fromkeys(name for name in self._names() if self._is_list(name)))

    def _is_list(self, name: str) -> bool:
        if storage.is_glob(name):
            return False
        if name.lower().endswith(uris.LIST_SUFFIXES):
            _existing(name)
            return True
        return name.lower().endswith(".parquet") and self._is_parquet_list(name)

    def _is_parquet_list(self, name: str) -> bool:
        """A Parquet file is a list of URIs if the user names that column, or if it has no images but URIs."""
        if self.config.uri_column or self.config.image_column:
            return self.config.uri_column is not None
        _existing(name)
        try:
            schema = parquet.shard_rows(name)[1]
        except parquet.BAD_BYTES:
            return False
        try:
            parquet.find_image_column(schema, None, name)
            return False
        except InputRefused:
            try:
                uris.find_uri_column(schema, None, name)
                return True
            except InputRefused:
                return False

    def _first_checked(self, name: str) -> Iterator[ObjectInfo]:
        """The objects of one input that are images or shards of images; refused where there is none."""
        found = (_printable(info) for info in _objects(name) if self._is_ours(info.uri))
        try:
            first = next(found, None)
        except FileNotFoundError as error:
            raise InputRefused(f"--input {name} does not exist") from error
        except NotADirectoryError:
            first = None
        except (OSError, ValueError) as error:  # ValueError: a glob that makes no sense
            raise InputRefused(f"--input {name} cannot be read: {error}") from error
        if first is None:
            raise InputRefused(
                f"--input {name} matches no images: no jpg, png, webp, tif, bmp or gif, and no tar, zip or parquet file"
            )
        return itertools.chain([first], found)

    def _is_ours(self, uri: str) -> bool:
        return _kind(uri) is not None and not uri.startswith(self.config.output + "/")

    def _group(self, objects: Iterator[ObjectInfo], *, may_be_broken: bool = False) -> Iterator[Shard]:
        """Loose images in runs of OBJECTS_PER_SHARD; every other object is a shard of its own.

        Raises InputRefused where there is nothing but Parquet files of which none can be read; unless that may be.
        """
        loose: list[ObjectInfo] = []
        parquet_files: list[ObjectInfo] = []
        for info in objects:
            kind = _kind(info.uri)
            may_be_broken |= kind != "parquet"
            if kind == "objects":
                loose.append(info)
                if len(loose) == OBJECTS_PER_SHARD:
                    yield _virtual_shard(loose)
                    loose = []
            elif kind == "parquet":
                parquet_files.append(info)
            else:
                for name in self.config.keep_names():
                    uris.add_keep_type(self.keep_types, name, pa.string(), info.uri)
                yield Shard(0, str(kind), info.uri, None, info.size_bytes, info.etag)
        if loose:
            yield _virtual_shard(loose)
        if parquet_files:
            yield from self._parquet_shards(parquet_files, may_be_broken)

    def _parquet_shards(self, files: list[ObjectInfo], may_be_broken: bool) -> Iterator[Shard]:
        """Read every footer; a file whose footer is broken stays a shard (and becomes an error row)."""
        readable = 0
        for info, found in zip(files, ordered_map(_footer, files, FOOTER_THREADS, 4 * FOOTER_THREADS), strict=True):
            rows = None
            if not isinstance(found, str):
                rows, schema = found
                readable += 1
                self._check_parquet(schema, info.uri)
            yield Shard(0, "parquet", info.uri, rows, info.size_bytes, info.etag)
        if not readable and not may_be_broken:
            raise InputRefused(f"--input {files[0].uri} cannot be read as Parquet: {found}")

    def _check_parquet(self, schema: pa.Schema, uri: str) -> None:
        only(schema, parquet.find_image_column(schema, self.config.image_column, uri), uri)
        for name in self.config.keep_names():
            if name not in schema.names:
                raise InputRefused(f"--keep {name}: {uri} has the columns {', '.join(schema.names)}")
            only(schema, name, uri)
            uris.add_keep_type(self.keep_types, name, schema.field(name).type, uri)


def _footer(info: ObjectInfo) -> tuple[int, pa.Schema] | str:
    try:
        found: tuple[int, pa.Schema] = parquet.shard_rows(info.uri)
        return found
    except parquet.BAD_BYTES as error:
        return message_line(error)


def _kind(uri: str) -> str | None:
    name = uri.lower()
    if name.rpartition("/")[2].startswith("."):
        return None
    if is_image(name):
        return "objects"
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    return {"zip": "zip", "parquet": "parquet"}.get(name.rpartition(".")[2])


def _expand(given: str) -> list[str]:
    """`{0000..0099}` and `{a,b}`, unless a file is really called so."""
    name = storage.normalize(given)
    if "{" not in name or (storage.is_local(name) and _exists(name)):
        return [name]
    try:
        return list(braceexpand(name))
    except ValueError as error:
        raise InputRefused(f"--input {name}: its braces make no sense ({error})") from error


def _exists(name: str) -> bool:
    try:
        storage.head(name)
    except OSError:
        return False
    return True


def _existing(name: str) -> ObjectInfo:
    try:
        return storage.head(name)
    except FileNotFoundError as error:
        raise InputRefused(f"--input {name} does not exist") from error
    except OSError as error:
        raise InputRefused(f"--input {name} cannot be read: {error}") from error


def _objects(name: str) -> Iterator[ObjectInfo]:
    """The objects that one name stands for: itself, what a glob matches, or all below a folder."""
    if storage.is_glob(name):
        yield from storage.list_glob(name)
    elif _kind(name) is not None:
        yield _existing(name)
    else:
        yield from storage.list_objects(name)


def _merged(streams: Iterable[Iterator[ObjectInfo]]) -> Iterator[ObjectInfo]:
    """All in one sorted stream, each object once: inputs may overlap."""
    last = ""
    for info in heapq.merge(*streams, key=lambda info: info.uri):
        if info.uri < last:
            raise InputRefused(
                f"{info.uri} was listed after {last}: this store does not list in order; name its folders one by one"
            )
        if info.uri != last:
            yield info
        last = info.uri


def _noted(objects: Iterator[ObjectInfo], seen: uris.Seen) -> Iterator[ObjectInfo]:
    for info in objects:
        seen.add(info.uri)
        yield info


def _printable(info: ObjectInfo) -> ObjectInfo:
    """A file name that is not UTF-8 gets its odd bytes escaped. Nothing can be read by that name: an image becomes an
    error; refused is what holds more than one, and a name that is another file's once it is escaped."""
    text = storage.escaped(info.uri)
    if text == info.uri:
        return info
    if _kind(text) != "objects" or _exists(text):
        raise _not_utf_8(info.uri)
    return replace(info, uri=text)


def _not_utf_8(name: str) -> InputRefused:
    return InputRefused(f"--input {storage.escaped(name)}: this name is not UTF-8; give it another one")


def _virtual_shard(images: list[ObjectInfo]) -> Shard:
    base = posixpath.commonprefix([images[0].uri, images[-1].uri]).rpartition("/")[0]  # sorted: the ends differ most
    base = "" if base.endswith("/") else base  # that slash would be lost
    cut = len(base) + 1 if base else 0
    return Shard(
        0,
        "objects",
        base,
        len(images),
        sum(info.size_bytes for info in images),
        keys=tuple(info.uri[cut:] for info in images),
        key_sizes=tuple(info.size_bytes for info in images),
        key_etags=tuple(info.etag for info in images),
    )


def _limited(shards: Iterator[Shard], limit: int, options: ReadOptions) -> Iterator[Shard]:
    """The shards of the first `limit` images; a shard whose images nobody has counted is counted now."""
    left = limit
    for shard in shards:
        rows = shard.rows if shard.rows is not None else _count(shard, options)
        rows = min(rows, left)
        lists = {name: getattr(shard, name) for name in ("keys", "key_sizes", "key_etags", "kept")}
        yield replace(shard, rows=rows, **{name: value and value[:rows] for name, value in lists.items()})
        left -= rows
        if not left:
            return


def _count(shard: Shard, options: ReadOptions) -> int:
    """Number of rows, found by walking over the shard without its pixels."""
    for item in sources.read(shard, (), options):
        if isinstance(item, ShardEnd):
            return item.rows
    raise AssertionError(f"{shard.uri}: no reader may end without a ShardEnd")
