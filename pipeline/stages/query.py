"""Embed a few images as an output's own were: with the settings in its `_run.json`, in this process, without Ray."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import PERCENTILE, RunConfig
from pipeline.coverage import END
from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import InputRefused, WeightsRefused
from pipeline.predictors.base import Allotment
from pipeline.predictors.embed import Embedder
from pipeline.sources import ReadOptions
from pipeline.sources.objects import SOURCE, LooseImages
from pipeline.sources.shard import Shard
from pipeline.stages.load import Loader
from pipeline.stages.predict import Predict
from pipeline.storage import uris

MAX_IMAGES = 1000
OF_TRANSFORM = ("resize", "crop", "interpolation", "mean", "std")


def embed(
    settings: Mapping[str, Any], network: Mapping[str, Any], space: EmbeddingSpace, images: Sequence[str]
) -> NDArray[np.float32]:
    """The vectors of some images, float32 [len(images), dim], in their order.

    settings: of the output's run. network: the flags that give its network and weights. space: of its vectors.
    images: paths or URIs of loose images. Raises WeightsRefused if the network no longer gives vectors of that space,
    and InputRefused for an image that cannot be read, naming it.
    """
    if "tiling" in settings:
        raise InputRefused(
            "--image does not fit an output of raster scenes, whose vectors are those of windows: name a window with "
            "--id"
        )
    if len(images) > MAX_IMAGES:
        raise InputRefused(f"--image was given {len(images)} times: it can be at most {MAX_IMAGES}")
    config = RunConfig(**{**_run_flags(settings), "input": tuple(images), "output": "unused"})
    embedder = Embedder(**_network_flags(settings, network))
    embedder.prepare()
    _check_space(space, config, embedder)
    loader = Loader.of(config, embedder, ReadOptions(), rows_per_table=len(images), threads=2)
    uris_of = tuple(uris.normalize(uri) for uri in images)
    table = pa.concat_tables(loader.load(Shard(0, SOURCE.kind, "", payload=LooseImages(uris_of)), ((0, END),)))
    predict = Predict(embedder, {}, Allotment(batch_size=len(images), images=len(images)))
    rows = predict(table.combine_chunks()).slice(0, len(images))
    for row in rows.select(["image_id", "error_type", "message"]).to_pylist():
        if row["error_type"]:
            raise InputRefused(f"--image {row['image_id']} cannot be read ({row['error_type']}): {row['message']}")
    flat = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(images), -1)


def _run_flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of RunConfig that change the pixels of an image."""
    flags = {name: settings[name] for name in ("exif_rotate", "decoder", "max_pixels", "harmonize") if name in settings}
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
    transform = settings["transform"]
    values = {name: transform[name] for name in OF_TRANSFORM}
    if "specification" in settings:  # its transform is its own
        values = {}
    return {**values, **network, "precision": settings["precision"], "compile": "off"}


def _check_space(space: EmbeddingSpace, config: RunConfig, embedder: Embedder) -> None:
    here = EmbeddingSpace.of({**config.result_settings(), **embedder.settings()})
    assert here is not None
    if difference := here.difference(space):
        raise WeightsRefused(
            f"the network gives other vectors than the output's: {difference}. Give the weights and the version of "
            "the run, or search by --id"
        )
