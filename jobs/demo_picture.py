"""Draw the embeddings of the demo: their first two principal components, coloured by kind of tile, and some tiles."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from jobs.demo_archive import KINDS

COLOURS = dict(zip(KINDS, ("tab:green", "tab:blue", "tab:red", "tab:olive", "tab:orange"), strict=True))
TILES_SHOWN = 3
"""Per kind."""
MAP_COLUMNS = 7
"""Width of the map, in tiles."""


def draw(embeddings: pd.DataFrame, picture: Path) -> None:
    """Write a PNG. embeddings: columns image_id, source, member and embedding of the demo's output."""
    kinds = embeddings["image_id"].str.extract(r"(\w+)-\d+\.\w+$", expand=False)
    points = principal_components(np.stack(list(embeddings["embedding"])))
    figure = Figure(figsize=(9, 4.2), dpi=100, layout="constrained")
    grid = figure.add_gridspec(len(KINDS), MAP_COLUMNS + TILES_SHOWN)
    plane = figure.add_subplot(grid[:, :MAP_COLUMNS])
    plane.set(xlabel="first principal component", ylabel="second principal component")
    for number, (kind, colour) in enumerate(COLOURS.items()):
        of_kind = (kinds == kind).to_numpy()
        plane.scatter(points[of_kind, 0], points[of_kind, 1], s=12, alpha=0.7, color=colour)
        tiles = embeddings[of_kind].head(TILES_SHOWN)
        for place, (source, member) in enumerate(zip(tiles["source"], tiles["member"], strict=True)):
            show_tile(figure.add_subplot(grid[number, MAP_COLUMNS + place]), source, member, colour)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    Image.open(drawn).convert("RGB").quantize(128).save(picture, optimize=True)  # a quarter of the bytes


def principal_components(vectors: np.ndarray) -> np.ndarray:
    """float [N, 2]: the unit vectors of `vectors` [N, D], seen along the two directions in which they differ most."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    centred = units - units.mean(axis=0)
    _, _, directions = np.linalg.svd(centred)
    return np.asarray(centred @ directions[:2].T)


def show_tile(axes: Axes, source: str, member: str | None, colour: str) -> None:
    """Show the image at the path `source`, or the member of the tar there, in a frame of its colour on the map."""
    if pd.isna(member):
        data = Path(source).read_bytes()
    else:
        with tarfile.open(source) as tar:
            stored = tar.extractfile(str(member))
            assert stored is not None
            data = stored.read()
    axes.imshow(Image.open(io.BytesIO(data)).convert("RGB").resize((96, 96)))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=3)
