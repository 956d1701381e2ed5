"""The network and the pixels of an output again, from its `_run.json` and its archive, in this process without Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.config import PERCENTILE, RunConfig
from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import InputRefused, WeightsRefused
from pipeline.explore.table import Output
from pipeline.explore.vectors import network_of, space_of
from pipeline.images.pixels import PixelTable
from pipeline.planning import plan as plans
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan
from pipeline.predictors.classify import Classifier
from pipeline.stages.load import Loader, harmonize_of

AS_THEY_ARE = ("input", "image_column", "any_suffix", "max_pixels", "exif_rotate", "nodata_fill", "harmonize")


@dataclass(frozen=True)
class Restored:
    """The prepared predictor of an output, and the reader of its archive. plan: the output's."""

    predictor: Classifier
    loader: Loader
    plan: Plan

    def pixels(self, shard: int, row: int, image_id: str) -> Any:
        """The pixels that the network saw, [1, crop, crop, bands].

        Raises InputRefused if the image cannot be read any more, or if its place holds another image.
        """
        for table in self.loader.load(self.plan.load(shard), ((row, row + 1),)):
            for line in table.filter(pc.is_valid(table["image_id"])).to_pylist():
                if line["image_id"] != image_id:
                    raise InputRefused(f"{image_id} cannot be found: its place in the archive holds {line['image_id']}")
                if line["error_type"]:
                    raise InputRefused(f"{image_id} cannot be read ({line['error_type']}): {line['message']}")
            for _, pixels in PixelTable(table).groups():
                return self.predictor.join([np.array(pixels[:1])])
        raise InputRefused(f"{image_id} cannot be read: it is no longer in the archive, or has no data")


def restore(output: Output, heads: Sequence[str], weights: str | None) -> Restored:
    """Prepare the network of an output, and a reader of its archive.

    heads: files of heads. weights: the file of weights if it was moved. Raises InputRefused for an output without a
    network, and WeightsRefused if the network is not that of the run, naming what differs.
    """
    settings = output.settings
    plan = plans.load(output.uri)
    if plan is None:
        raise InputRefused(f"{output.uri} has no plan, so the places of its images are unknown")
    if settings.get("vectors"):
        raise InputRefused(
            f"{output.uri} was made from vectors and not from images (--from): give the output of `nightshift embed` "
            "that has these vectors, and --head"
        )
    config = RunConfig(**run_flags(settings), output=output.uri)
    predictor = _predictor(output, heads, weights)
    _check(output, config, predictor)
    return Restored(predictor, _loader(config, predictor), plan)


def run_flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of RunConfig that say how images are read and decoded, from the settings in `_run.json`."""
    flags = {name: settings[name] for name in AS_THEY_ARE if name in settings}
    flags |= {name: ",".join(settings[name]) for name in ("bands", "assets") if name in settings}
    flags["decoder"] = settings["decoder"]
    if "scale" in settings:
        flags["scale"] = ":".join(map(repr, settings["scale"]))
        if "scale_percentiles" in settings:
            percentiles = ":".join(f"{value:g}" for value in settings["scale_percentiles"])
            flags["scale"] = f"{PERCENTILE}{percentiles}={flags['scale']}"
    if tiling := settings.get("tiling"):
        flags |= {"tile_size": tiling["size"], "tile_stride": tiling["stride"]}
        others = ("edge", "resolution", "max_nodata", "resampling")
        flags |= {name: tiling[name] for name in others if name in tiling}
    return flags


def _predictor(output: Output, heads: Sequence[str], weights: str | None) -> Classifier:
    """The network of an output, with the transform of the run."""
    settings = output.settings
    space_of(output)  # refuses an output without a network
    flags = {**network_of(output), "precision": settings["precision"], "compile": "off", "top_k": 1}
    flags |= {"weights": weights} if weights else {}
    predictor = Classifier(**flags, head=tuple(heads))
    predictor.prepare()
    own, recorded = asdict(predictor.transform), settings["transform"]
    changed = {name: value for name, value in recorded.items() if _plain(own.get(name)) != _plain(value)}
    if not changed:
        return predictor
    if "input_spec" not in flags:
        predictor = Classifier(**flags, head=tuple(heads), transform_=changed)
    elif changed.keys() <= {"resize", "crop", "interpolation"}:
        predictor = Classifier(**flags, head=tuple(heads), **changed)
    predictor.prepare()
    return predictor


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check(output: Output, config: RunConfig, predictor: Classifier) -> None:
    here, there = EmbeddingSpace.of({**config.result_settings(), **predictor.settings()}), space_of(output)
    if here is None or (difference := here.difference(there)):
        reason = difference if here else "it has no network"
        raise WeightsRefused(
            f"the network here is not that of {output.uri}: {reason}; give the weights of the run with --weights"
        )
    if predictor.head and (recorded := output.settings.get("heads")):
        for name, sha256 in predictor.settings()["heads"].items():  # type: ignore[attr-defined]
            if sha256 not in recorded.values():
                raise WeightsRefused(
                    f"--head {name} is not a head of {output.uri}: its sha256 is {sha256[:10]}…, and the run's are "
                    + ", ".join(f"{each} {digest[:10]}…" for each, digest in recorded.items())
                )


def _loader(config: RunConfig, predictor: Classifier) -> Loader:
    if config.decoder == "gpu":  # decodes as `fast` does, to within rounding
        config = replace(config, decoder="fast")
    archive = Archive(config)
    if predictor.specification:
        archive.use_bands(predictor.specification.bands, harmonize_of(config, predictor))
    archive.use_for(predictor.pixel_format.bands, takes_8_bits=predictor.pixel_format.dtype == "uint8")
    return Loader.of(config, predictor, archive.options(), rows_per_table=1)
