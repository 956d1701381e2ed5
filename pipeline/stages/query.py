"""Embed a few images as an output's own were: with the settings in its `_run.json`, in this process, without Ray."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import schema
from pipeline.config import PERCENTILE, RunConfig
from pipeline.coverage import END
from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import InputRefused, WeightsRefused
from pipeline.output import directory
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan, read_shards
from pipeline.predictors.base import Allotment
from pipeline.predictors.embed import Embedder
from pipeline.sources import ReadOptions
from pipeline.sources.objects import SOURCE, LooseImages
from pipeline.sources.scene import RASTER_SUFFIXES, Scene
from pipeline.sources.shard import Shard
from pipeline.stages.load import Loader, harmonize_of
from pipeline.stages.predict import Predict
from pipeline.storage import uris

MAX_IMAGES = 1000
WINDOW = re.compile(r"[0-9]+,[0-9]+")
OF_TILING = ("edge", "resolution", "max_nodata", "resampling")
OF_TRANSFORM = ("resize", "crop", "interpolation", "squash", "mean", "std")


def embed(
    settings: Mapping[str, Any], network: Mapping[str, Any], space: EmbeddingSpace, images: Sequence[str]
) -> NDArray[np.float32]:
    """The vectors of some images, float32 [len(images), dim], in their order.

    settings: of the output's run. network: the flags that give its network and weights. space: of its vectors.
    images: paths or URIs of loose images; for an output of raster scenes `scene.tif#384,0`, a window by the name that
    it has in the output, or a raster that is one window. Raises WeightsRefused if the network no longer gives vectors
    of that space, and InputRefused for an image that cannot be read, naming it.
    """
    if len(images) > MAX_IMAGES:
        raise InputRefused(f"--image was given {len(images)} times: it can be at most {MAX_IMAGES}")
    config = RunConfig(**{**_run_flags(settings), "input": tuple(images), "output": "unused"})
    embedder = Embedder(**_network_flags(settings, network))
    embedder.prepare()
    _check_space(space, config, embedder)
    load = _load_windows if config.tiling() else _load_images
    table = pa.concat_tables(load(config, embedder, images)).combine_chunks()
    predict = Predict(embedder, {}, Allotment(batch_size=len(images), images=len(images)))
    rows = predict(table).slice(0, len(images))
    for image, row in zip(images, rows.select(["error_type", "message", schema.IS_EMPTY]).to_pylist(), strict=True):
        if row["error_type"]:
            raise InputRefused(f"--image {uris.redact(image)} cannot be read ({row['error_type']}): {row['message']}")
        if row[schema.IS_EMPTY]:
            raise InputRefused(f"--image {uris.redact(image)} has fewer pixels with data than the run accepted")
    flat = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(images), -1)


def _load_images(config: RunConfig, embedder: Embedder, images: Sequence[str]) -> Iterator[pa.Table]:
    """Rows of loose images, and the row that ends their shard."""
    loader = Loader.of(config, embedder, ReadOptions(), rows_per_table=len(images), threads=2)
    uris_of = tuple(uris.normalize(uri) for uri in images)
    return loader.load(Shard(0, SOURCE.kind, "", payload=LooseImages(uris_of)), ((0, END),))


def _load_windows(config: RunConfig, embedder: Embedder, images: Sequence[str]) -> Iterator[pa.Table]:
    """Rows of windows of scenes, without the rows that end their shards."""
    for image in images:
        uri, has_name, name = image.rpartition("#")
        if not has_name or not WINDOW.fullmatch(name):
            uri, name = image, ""
        if not uri.lower().endswith(RASTER_SUFFIXES):
            raise InputRefused(
                f"--image {uris.redact(image)}: the output has vectors of windows of rasters; give a raster of one "
                f"window ({', '.join(RASTER_SUFFIXES)}), or a window of one, as in scene.tif#384,0"
            )
        archive = archive_for(replace(config, input=(uri,)), embedder)
        try:
            archive.check()
            with directory.draft(archive) as plan:
                shard, row = _window(plan, image, name)
                loader = Loader.of(config, embedder, archive.options(), rows_per_table=1)
                yield pa.concat_tables(loader.load(shard, ((row, row + 1),))).slice(0, 1)
        except InputRefused as error:
            raise error if str(error).startswith("--image") else InputRefused(f"--image: {error}") from error


def _window(plan: Plan, image: str, name: str) -> tuple[Shard, int]:
    """The shard and row of a window. name: its column and line in the scene, "" for the only one."""
    count = 0
    for shard in read_shards(plan):
        scene = shard.payload
        if not isinstance(scene, Scene) or scene.fault:
            return shard, 0  # its row says why
        rows = scene.part.count
        if not name and rows == 1 and plan.shards == 1:
            return shard, 0
        for row in range(rows) if name else ():
            across, down = scene.spans(row)
            if name == f"{across.start},{down.start}":
                return shard, row
        count += rows
    if name:
        raise InputRefused(f"--image {uris.redact(image)} is none of the {count:,} windows that the run cuts of it")
    raise InputRefused(
        f"--image {uris.redact(image)} is cut into {count:,} windows: name one, as in {uris.redact(image)}#0,0"
    )


def archive_for(config: RunConfig, embedder: Embedder) -> Archive:
    """An archive that is planned for a prepared network."""
    archive = Archive(config)
    if embedder.specification:
        archive.use_bands(embedder.specification.bands, harmonize_of(config, embedder))
    archive.use_for(embedder.pixel_format.bands, takes_8_bits=embedder.pixel_format.dtype == "uint8")
    return archive


def _run_flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of RunConfig that change the pixels of an image."""
    flags = {name: settings[name] for name in ("exif_rotate", "decoder", "max_pixels", "harmonize") if name in settings}
    if tiling := settings.get("tiling"):
        flags |= {"tile_size": tiling["size"], "tile_stride": tiling["stride"]}
        flags |= {name: tiling[name] for name in OF_TILING if name in tiling}
    if "nodata_fill" in settings:
        flags["nodata_fill"] = settings["nodata_fill"]
    if "bands" in settings:
        flags["bands"] = ",".join(settings["bands"])
    if "scale" in settings:
        flags["scale"] = ":".join(map(repr, settings["scale"]))
        if "scale_percentiles" in settings:
            percentiles = ":".join(f"{value:g}" for value in settings["scale_percentiles"])
            flags["scale"] = f"{PERCENTILE}{percentiles}={flags['scale']}"
    return flags


def _network_flags(settings: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
    transform = {name: settings["transform"][name] for name in OF_TRANSFORM if name in settings["transform"]}
    values = {} if "specification" in settings else {"transform_": transform}  # that of a specification is its own
    return {**values, **network, "precision": settings["precision"], "compile": "off"}


def _check_space(space: EmbeddingSpace, config: RunConfig, embedder: Embedder) -> None:
    here = EmbeddingSpace.of({**config.result_settings(), **embedder.settings()})
    assert here is not None
    if difference := here.difference(space):
        raise WeightsRefused(
            f"the network gives other vectors than the output's: {difference}. Give the weights and the version of "
            "the run, or search by --id"
        )
