"""Turns `--input` into a stream of shards. Runs on the driver before any work and refuses inputs that cannot work."""

import itertools
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from braceexpand import braceexpand

from pipeline import schema, sources
from pipeline.config import RunConfig
from pipeline.errors import InputRefused, ReadError
from pipeline.geo.bands import Band
from pipeline.geo.tiles import MAX_LATITUDE, rectangles
from pipeline.planning import left_out, lists, stac, templates
from pipeline.planning import plan as plans
from pipeline.planning.listing import (
    by_first_bytes,
    existing,
    exists,
    file_of,
    is_ours,
    merge,
    not_utf_8,
    objects_of,
    why_left_out,
    with_utf_8_name,
)
from pipeline.planning.notices import Notices
from pipeline.planning.plan import OBJECTS_PER_SHARD, Plan
from pipeline.planning.templates import TileImage
from pipeline.planning.update import Change
from pipeline.sources import parquet, safe, scene, source_of
from pipeline.sources.base import Compound, Contents, NoImages, ReadOptions, ShardEnd, Source
from pipeline.sources.objects import SOURCE as SOURCE_OF_UNNAMED
from pipeline.sources.objects import LooseImages, keep_json
from pipeline.sources.shard import Shard
from pipeline.sources.suffixes import LeftOut
from pipeline.sources.tiles import PLACE
from pipeline.storage import credentials, uris
from pipeline.storage.base import ObjectInfo
from pipeline.threads import ordered_map

HEADER_THREADS = 16
MAX_SCENE_LOOKS = 3
LOOK_AHEAD_OBJECTS = 1000
"""An input is refused at once if it has no images and no more objects than this; a larger one at its end."""


@dataclass
class Archive:
    """All objects that `--input` names.

    network_bands, takes_8_bits: the number of bands that the network takes, and whether they are of 8 bits; to refuse
    raster scenes early. wanted, harmonize: as in `ReadOptions`.
    keep_types: types of the `--keep` columns and of the sources' own, by their names in the shards. left_out: the
    files that are not read. notices: what the user should know of some objects.
    They are complete at the end of `shards()` and `new_shards()`.
    """

    config: RunConfig
    network_bands: int | None = None
    takes_8_bits: bool = False
    wanted: tuple[Band, ...] = ()
    harmonize: str = ""
    keep_types: dict[str, pa.DataType] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    notices: Notices = field(default_factory=Notices)
    _scene_looks: int = MAX_SCENE_LOOKS
    _started: dict[str, Iterator[ObjectInfo]] = field(default_factory=dict)
    """Lists that `check` began, by input. Planning continues them, so that no store is asked twice."""
    _is_check: bool = False

    def use_for(self, bands: int, *, takes_8_bits: bool) -> None:
        """Plan for a network, whose bands are known after `Predictor.prepare`."""
        self.network_bands, self.takes_8_bits = bands, takes_8_bits

    def use_bands(self, wanted: tuple[Band, ...], harmonize: str) -> None:
        """Plan for the bands of an input specification. harmonize: "" for no offset of Sentinel-2."""
        self.wanted, self.harmonize = wanted, harmonize

    def check(self) -> None:
        """Look at the start of the archive. Raises InputRefused if `--input` does not exist or has no images."""
        config = replace(self.config, limit=None)
        check = Archive(config, wanted=self.wanted, harmonize=self.harmonize, _started=self._started, _is_check=True)
        next(check.shards())

    def new_shards(self, change: Change) -> Iterator[Shard]:
        """The shards of the objects that an earlier plan does not contain as they are now. There may be none."""
        if names := self._lists():
            raise InputRefused(f"--update cannot compare a list of URIs: use another --output for {names[0]}")
        self.keep_types.update((column.name, column.type) for column in change.plan.keep)
        self.left_out.clear()
        self.notices.clear()
        objects = self._listed(self._names())
        yield from self._group(change.new(objects), change)
        change.drop_others()

    def shards(self) -> Iterator[Shard]:
        """Every shard, sorted by URI within each kind of input. No object occurs twice. Raises InputRefused."""
        shards = self._list_shards()
        if self.config.limit is not None:
            shards = limited(shards, self.config.limit, self.options())
        first = next(shards, None)
        if first is None:
            what = f"no tiles of {self._selected()}" if self._selecting_flags() else "no images"
            raise InputRefused(f"--input {' '.join(self.config.input)} contains {what}")
        yield from itertools.chain([first], shards)
        if self.config.keep and self.keep_types.keys().isdisjoint(self.config.keep_names()):
            raise InputRefused(f"--keep {','.join(self.config.keep)}: loose images have no columns")

    def options(self) -> ReadOptions:
        """The settings that the readers need."""
        return ReadOptions(
            tuple(self.config.keep_names()),
            self.config.image_column,
            tuple(credentials.with_credentials(self._names())),
            self.config.any_suffix,
            self.config.tile_selection(),
            **self._scene_options(),
        )

    def keys_with_credentials(self, plan: Plan) -> dict[int, tuple[str, ...]]:
        """The keys with credentials of the shards whose plan has them without. Raises InputRefused."""
        if not plan.hides_credentials:
            return {}
        planned = (shard for shard in plans.read_shards(plan) if _is_of_list(shard))
        keys = lists.keys_with_credentials(planned, self._lists(), self.config.uri_column)
        return keys | stac.keys_with_credentials(plans.read_shards(plan), filter(self._is_stac, self._names()))

    def _list_shards(self) -> Iterator[Shard]:
        list_names = self._lists()
        if list_names and self.config.tile_size is not None:
            raise InputRefused(
                f"--tile-size reads scenes from folders, globs and files, but {list_names[0]} is a list of URIs, whose "
                "lines are images: leave out --tile-size, or name the scenes with --input"
            )
        seen = lists.HashSet64()
        self.left_out.clear()
        self.notices.clear()
        objects = self._listed(name for name in self._names() if name not in list_names)
        yield from self._group(_add_to(seen, objects) if list_names else objects)
        for name in list_names:
            self._check_selects(name, ())
            yield from lists.list_shards(name, self.config.uri_column, self.config.keep_names(), self.keep_types, seen)

    def _names(self) -> list[str]:
        """The inputs in normal form, braces expanded, without credentials."""
        full_uris: dict[str, str] = {}
        names = []
        for full in (name for pattern in self.config.input for name in _expand(pattern)):
            name = credentials.hide_credentials(full)
            if uris.escaped(name) != name:
                raise not_utf_8(name)
            if full_uris.setdefault(name, full) != full:
                raise InputRefused(
                    f"--input {name} is given twice with different queries or credentials, which the output does not "
                    "record: put such URIs in a list, where each line is an image"
                )
            names.append(name)
        return names

    def _lists(self) -> list[str]:
        return list(dict.fromkeys(name for name in self._names() if self._is_list(name)))

    def _is_list(self, name: str) -> bool:
        if uris.is_glob(name):
            return False
        if self._is_stac(name):
            return False
        if name.lower().endswith(lists.LIST_SUFFIXES):
            existing(name)
            return True
        return name.lower().endswith(".parquet") and self._is_parquet_list(name)

    def _is_parquet_list(self, name: str) -> bool:
        """True if the user names a URI column, or if the file has no column of images but one of URIs."""
        if self.config.uri_column or self.config.image_column:
            return self.config.uri_column is not None
        if file_of(name) is None:
            return False
        try:
            schema = parquet.shard_rows(name)[1]
        except parquet.BAD_BYTES:
            return False
        try:
            parquet.find_image_column(schema, None, name)
            return False
        except InputRefused:
            try:
                lists.find_uri_column(schema, None, name)
                return True
            except InputRefused:
                return False

    def _listed(self, names: Iterable[str]) -> Iterator[ObjectInfo]:
        """The images and shards of some inputs, sorted by URI. Counts the other files in `left_out`."""
        streams = ordered_map(self._checked_objects, names, HEADER_THREADS, 4 * HEADER_THREADS)
        for info in merge(list(streams)):
            if is_ours(info):
                yield info
            elif self.config.tile_size is None or not info.uri.lower().endswith(scene.SIBLING_SUFFIXES):
                self.left_out.add(info.uri, why_left_out(info))

    def _checked_objects(self, name: str) -> Iterator[ObjectInfo]:
        """The objects of one input, outside of the output. Raises InputRefused if none is an image or a shard."""
        if started := self._started.pop(name, None):
            return started
        objects = self._objects_to_first_image(name)
        try:
            first = list(itertools.islice(objects, LOOK_AHEAD_OBJECTS))
        except FileNotFoundError as error:
            raise InputRefused(f"--input {name} does not exist") from error
        except (OSError, ValueError) as error:  # ValueError: an invalid glob
            raise InputRefused(f"--input {name} cannot be read: {error}") from error
        checked: Iterator[ObjectInfo] = itertools.chain(first, objects)
        if self._is_check:
            checked, self._started[name] = itertools.tee(checked)
        return checked

    def _objects_to_first_image(self, name: str) -> Iterator[ObjectInfo]:
        """The objects of one input. Raises InputRefused at their end if none of them is an image or a shard."""
        others = LeftOut()
        is_empty, is_file = True, False
        is_template, is_stac = templates.is_template(name), False
        if is_template:
            objects: Iterator[ObjectInfo] = templates.list_tiles(name, self.config.tile_selection())
        elif is_stac := self._is_stac(name):
            objects = self._items(name)
        else:
            objects = objects_of(name) if self.config.tile_size is None else safe.grouped(objects_of(name))
        for info in self._looked_at(objects):
            if info.uri.startswith(self.config.output + "/"):
                continue
            is_read = is_ours(info)
            if is_read:
                is_empty = False
            elif is_empty:
                others.add(info.uri, why_left_out(info))
                is_file = info.uri == name
            yield with_utf_8_name(info) if is_read else replace(info, uri=uris.escaped(info.uri))
        if is_empty and is_template:
            of = f" of {self._selected()}" if self._selecting_flags() else ""
            raise InputRefused(f"--input {name} matches no tiles{of}")
        if is_empty and is_stac:
            where = f" that {' and '.join(flags)} select" if (flags := self._flags_of_items()) else ""
            raise InputRefused(f"--input {name} has no STAC items{where}")
        if is_empty:
            raise _no_images(name, others, is_file=is_file)

    def _is_stac(self, name: str) -> bool:
        return stac.is_stac(name, has_scenes=self.config.tile_size is not None)

    def _items(self, name: str) -> Iterator[ObjectInfo]:
        if self.config.tile_size is None:
            raise InputRefused(f"--input {name} is read as STAC items, which are scenes: give --tile-size")
        selection = stac.ItemSelection(self.config.tile_selection().box, self.config.time_range())
        return stac.items_of(name, selection)

    def _flags_of_items(self) -> list[str]:
        return [f"--{name}" for name in ("bbox", "datetime") if getattr(self.config, name) is not None]

    def _looked_at(self, objects: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
        """With `--any-suffix`, look at the first bytes of the objects whose names say nothing, several at once."""
        if not self.config.any_suffix:
            return objects
        return ordered_map(by_first_bytes, objects, HEADER_THREADS, 4 * HEADER_THREADS)

    def _group(self, objects: Iterator[ObjectInfo], change: Change | None = None) -> Iterator[Shard]:
        """Group loose images into virtual shards of OBJECTS_PER_SHARD; each other object is one or several shards.

        change: of an update. Without it, raises InputRefused if all objects have a header and none can be read.
        """
        may_be_broken = change is not None
        loose: list[ObjectInfo] = []
        with_headers: list[ObjectInfo] = []
        for info in objects:
            source = self._source(info)
            if isinstance(info, Compound):
                self.notices.add(info.uri, info.notices)
            may_be_broken |= not source.reads_header
            if source.reads_header:
                with_headers.append(info)
            elif not source.is_loose:
                yield self._shard(info, source.inspect(info.uri, self._inspect_options))
            else:
                self._check_loose(info)
                self._look_for_scene(info)
                loose.append(info)
                if len(loose) == OBJECTS_PER_SHARD:
                    yield _virtual_shard(loose)
                    loose = []
        if loose:
            yield _virtual_shard(loose)
        if with_headers:
            yield from self._inspect_all(with_headers, may_be_broken, change)

    def _look_for_scene(self, info: ObjectInfo) -> None:
        """Note an image that should perhaps be read as a scene. Looks into a few large TIFFs, until it finds one."""
        if self._scene_looks and scene.may_be_scene(info):
            self._scene_looks -= 1
            if text := scene.describe_as_image(info):
                self.notices.add(info.uri, [text])
                self._scene_looks = 0

    def _inspect_all(
        self, objects: list[ObjectInfo], may_be_broken: bool, change: Change | None = None
    ) -> Iterator[Shard]:
        """Read every header. An object with a broken header is still a shard, and later an error row.

        Raises NoImages for an object without images that `--input` names; others are passed over.
        """
        readable = 0
        passed_over: NoImages | None = None
        named = frozenset(self._names())
        results = ordered_map(self._inspect, objects, HEADER_THREADS, 4 * HEADER_THREADS)
        for info, contents in zip(objects, results, strict=True):
            if isinstance(contents, NoImages):
                if info.uri in named:
                    raise contents
                passed_over = passed_over or contents
                self.left_out.add(info.uri, "without images")
                continue
            is_broken = isinstance(contents, ReadError)
            readable += not is_broken
            parts = [self._broken(info, contents)] if isinstance(contents, ReadError) else contents
            fault = contents.message if isinstance(contents, ReadError) else ""
            if change and not is_broken:
                parts = change.contents(info, parts, self.options())
            for each in parts:
                yield self._shard(info, each)
        if not readable and not may_be_broken:
            if passed_over:
                raise passed_over
            name = objects[0].uri
            raise InputRefused(f"--input {name} cannot be read as {self._source(objects[0]).title}: {fault}")

    def _broken(self, info: ObjectInfo, error: ReadError) -> Contents:
        """The contents of an object that cannot be inspected. It becomes an error row."""
        source = self._source(info)
        return Contents(None, {}, source.fault_payload(error) if source.fault_payload else None)

    def _inspect(self, info: ObjectInfo) -> Iterable[Contents] | NoImages | ReadError:
        """The contents of an object's shards, or its error.

        The second shard is looked for too: most objects have one, and are then closed again.
        """
        source = self._source(info)
        try:
            if source.shards is None:
                return [source.inspect(info.uri, self._inspect_options)]
            shards = source.shards(info, self._inspect_options)
            return itertools.chain(list(itertools.islice(shards, 2)), shards)
        except (NoImages, ReadError) as error:
            return error

    def _check_loose(self, info: ObjectInfo) -> None:
        """Add the columns of a tile; refuse other images if there is a selection of tiles."""
        if isinstance(info, TileImage):
            self._check_selects(info.uri, ("zoom", "bbox"))
            self._add_types({each.name: each.type for each in (*PLACE, *schema.FOOTPRINT)}, info.uri)
        else:
            self._check_selects(info.uri, ())

    def _check_selects(self, uri: str, selects: tuple[str, ...]) -> None:
        """Raise InputRefused if the settings select tiles of an object without tiles."""
        for name in ("datetime", "assets"):
            if getattr(self.config, name) is not None and name not in selects:
                raise InputRefused(f"--{name} selects from STAC items, and {uri} is none: leave it out")
        for name in self._selecting_flags():
            if name not in selects:
                raise InputRefused(
                    f"--{name} selects tiles, and {uri} is none: leave it out, or give .mbtiles, .pmtiles or a "
                    "template such as tiles/{z}/{x}/{y}.png"
                )

    def _selecting_flags(self) -> list[str]:
        return [name for name in ("zoom", "bbox") if getattr(self.config, name) is not None]

    def _selected(self) -> str:
        """The settings that select tiles, as text, and that there are none near the poles."""
        text = " ".join(f"--{name} {getattr(self.config, name)}" for name in self._selecting_flags())
        box = self.config.tile_selection().box
        is_beyond = box is not None and not rectangles(box, 0)
        return f"{text}: web map tiles end at the latitudes ±{MAX_LATITUDE:.4f}" if is_beyond else text

    def _add_types(self, types: Mapping[str, pa.DataType], uri: str) -> None:
        for name, type_ in types.items():
            lists.add_keep_type(self.keep_types, name, type_, uri)

    def _shard(self, info: ObjectInfo, contents: Contents) -> Shard:
        source = self._source(info)
        self._check_selects(info.uri, source.selects)
        self._add_types({**contents.keep_types, **{field.name: field.type for field in source.columns}}, info.uri)
        self.notices.add(info.uri, contents.notices)
        size_bytes = info.size_bytes if contents.size_bytes is None else contents.size_bytes
        return Shard(0, source.kind, info.uri, contents.rows, size_bytes, info.etag, contents.payload)

    @property
    def _inspect_options(self) -> ReadOptions:
        selection, scene_options = self.config.tile_selection(), self._scene_options()
        columns = tuple(self.config.keep_names())
        return ReadOptions(columns, self.config.image_column, selection=selection, **scene_options)

    def _scene_options(self) -> dict[str, Any]:
        return {
            "tiling": self.config.tiling(),
            "bands": self.config.band_names(),
            "assets": self.config.asset_names(),
            "network_bands": self.network_bands,
            "needs_8_bits": self.takes_8_bits and self.config.scale is None,
            "wanted": self.wanted,
            "harmonize": self.harmonize,
        }

    def _source(self, info: ObjectInfo) -> Source:
        if isinstance(info, Compound):
            return sources.SOURCES[info.kind]
        return source_of(info.uri, has_scenes=self.config.tile_size is not None) or SOURCE_OF_UNNAMED


def _expand(pattern: str) -> list[str]:
    """Expand `{0000..0099}` and `{a,b}`, unless a local file has this name."""
    name = uris.normalize(pattern)
    if "{" not in name or (uris.is_local(name) and exists(name)):
        return [name]
    try:
        return list(braceexpand(name))
    except ValueError as error:
        raise InputRefused(f"--input {name}: its braces are not valid ({error})") from error


def _is_of_list(shard: Shard) -> bool:
    return isinstance(shard.payload, LooseImages) and shard.payload.etags is None


def _no_images(name: str, others: LeftOut, *, is_file: bool) -> InputRefused:
    """The error for an input without images. others: its other files. is_file: the input is one file, not a folder."""
    suffixes = ", ".join(suffix for source in sources.SOURCES.values() for suffix in source.suffixes)
    if not others.counts:
        return InputRefused(f"--input {name} matches no images: no file name ends in one of {suffixes}")
    what = left_out.remedy(others.counts) or f"no file name ends in one of {suffixes}"
    if is_file:
        return InputRefused(f"--input {name} cannot be read: {what}")
    return InputRefused(f"--input {name} has only {left_out.describe(others.counts)}: {what}")


def _add_to(seen: lists.HashSet64, objects: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
    for info in objects:
        seen.add(info.uri)
        yield info


def _virtual_shard(images: list[ObjectInfo]) -> Shard:
    """The shard of a sorted run of loose images."""
    first, last = images[0].uri, images[-1].uri  # since the run is sorted, their prefix is that of all images
    base = posixpath.commonprefix([first, last]).rpartition("/")[0]
    base = "" if base.endswith("/") else base  # uris.join would remove that slash
    key_start = len(base) + 1 if base else 0
    return Shard(
        0,
        "objects",
        base,
        len(images),
        sum(info.size_bytes for info in images),
        payload=LooseImages(
            tuple(info.uri[key_start:] for info in images),
            tuple(info.size_bytes for info in images),
            tuple(info.etag for info in images),
            _kept_places(images),
        ),
    )


def _kept_places(images: list[ObjectInfo]) -> tuple[str, ...] | None:
    """The columns of tiles as `LooseImages.kept`, None if no image is a tile."""
    if not any(isinstance(info, TileImage) for info in images):
        return None
    places = (dict(zip(PLACE.names, info.tile, strict=True)) if isinstance(info, TileImage) else {} for info in images)
    return tuple(map(keep_json, places))


def limited(shards: Iterator[Shard], limit: int, options: ReadOptions) -> Iterator[Shard]:
    """Yield the shards of the first `limit` images. A shard of unknown length is counted here."""
    left = limit
    for shard in shards:
        rows = shard.rows if shard.rows is not None else _count(shard, options)
        rows = min(rows, left)
        yield shard.cut(rows)
        left -= rows
        if not left:
            return


def _count(shard: Shard, options: ReadOptions) -> int:
    """Number of rows, counted by a read that skips every row."""
    for item in sources.read(shard, (), options):
        if isinstance(item, ShardEnd):
            return item.rows
    raise AssertionError(f"the reader of {shard.uri} ended without a ShardEnd")
