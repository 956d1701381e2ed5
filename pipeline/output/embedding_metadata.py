"""The footer key `emb` of parts with embeddings of places: fields of STAC's embedding extension, as JSON.

https://github.com/geo-embeddings/embeddings-stac-specification (0.0.1, a proposal). A file holds many windows or tiles,
so it has the fields of a collection, which hold for all rows. What differs by row is in the columns: `geometry`,
`datetime`, `item_id`, `transform`.
"""

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.embedding_space import EmbeddingSpace
from pipeline.output.geoparquet import has_footprints
from pipeline.schema import EMBEDDING_SCALE, has_scaled_vectors, is_vector
from pipeline.version import __version__

KEY = "emb"
COLUMN = "embedding"
EXTENSIONS = (
    "https://stac-extensions.github.io/embeddings/v0.0.1/schema.json",
    "https://stac-extensions.github.io/processing/v1.2.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
)
SHA256 = "1220"
"""Begins a multihash of SHA-256 with 32 bytes, which the field `file:checksum` is."""
TILE_GRID = "WebMercatorQuad"
"""The grid of web map tiles: https://docs.ogc.org/is/17-083r4/17-083r4.html"""
Fields = dict[str, Any]


def describe(settings: Mapping[str, Any], provenance: Mapping[str, Any], columns: pa.Schema) -> Fields:
    """The fields of a run, {} for results without embeddings or footprints.

    settings, provenance: of the `RunRecord`. columns: of the results. The writer of a part adds the time, and
    the size of pixels that are not resampled.
    """
    space = EmbeddingSpace.of(settings)
    is_embedding = COLUMN in columns.names and is_vector(columns.field(COLUMN).type)
    if space is None or not is_embedding or not has_footprints(columns):
        return {}
    vector = columns.field(COLUMN).type
    return {
        "stac_extensions": list(EXTENSIONS),
        "emb:type": "chip",
        "emb:dimensions": vector.list_size,
        "data_type": _number_type(vector.value_type),
        **_gsd(settings),
        **_chip_layout(settings, columns),
        **_quantization(columns),
        "emb:runtime_parameters": space.to_json(),
        "processing:software": {"nightshift": __version__},
        "links": [_model(provenance), *({"rel": "emb:source-data", "href": uri} for uri in settings.get("input", ()))],
    }


def _number_type(type_: pa.DataType) -> str:
    return {"halffloat": "float16", "float": "float32"}.get(str(type_), str(type_))


def _gsd(settings: Mapping[str, Any]) -> Fields:
    """Metres per pixel, if the run resamples to a resolution."""
    resolution = (settings.get("tiling") or {}).get("resolution")
    return {"gsd": resolution} if resolution else {}


def _chip_layout(settings: Mapping[str, Any], columns: pa.Schema) -> Fields:
    """The windows of scenes or the grid of tiles; nothing for a run over both."""
    is_tiled, has_windows = "tile_z" in columns.names, "window_col" in columns.names
    tiling = settings.get("tiling")
    if is_tiled and has_windows:
        return {}
    if is_tiled:
        return {"emb:chip_layout": {"layout_type": "named_grid", "grid_id": TILE_GRID}}
    if not tiling or not has_windows:
        return {}
    # The last windows of a scene are moved inside of it, off the grid.
    kind = "variable_grid" if tiling["edge"] == "shift" else "regular_grid"
    size, stride = tiling["size"], tiling["stride"]
    return {"emb:chip_layout": {"layout_type": kind, "chip_size": [size, size], "stride": [stride, stride]}}


def _quantization(columns: pa.Schema) -> Fields:
    """How the numbers were made smaller. The field `scale` is for one scale of all; those of int8 are a column."""
    if has_scaled_vectors(columns):
        method, dtype = f"symmetric, per vector: multiply by the column {EMBEDDING_SCALE}", "int8"
    elif pa.types.is_float16(columns.field(COLUMN).type.value_type):
        method, dtype = "cast", "float16"
    else:
        return {}
    return {"emb:quantization": {"method": method, "original_dtype": "float32", "quantized_dtype": dtype}}


def _model(provenance: Mapping[str, Any]) -> Fields:
    """The link to the weights, with their hash. Random weights have neither address nor hash."""
    digest = provenance.get("weights_sha256")
    return {
        "rel": "emb:model",
        "href": provenance.get("weights_uri") or str(provenance.get("weights")),
        "title": str(provenance.get("model")),
        **({"file:checksum": SHA256 + digest} if digest else {}),
    }


def to_text(fields: Mapping[str, Any]) -> Mapping[str, str]:
    """The footer's key and its JSON, nothing for {}."""
    return {KEY: json.dumps(fields)} if fields else {}


def text_of(metadata: Mapping[bytes, bytes] | None) -> Mapping[str, str]:
    """The same of a footer that was read."""
    text = (metadata or {}).get(KEY.encode())
    return {KEY: text.decode()} if text else {}
