"""Peer: a torchvision ResNet over the windows of one raster scene, with rasterio and a plain PyTorch DataLoader.

python jobs/bench/peers/windows.py SCENE.tif OUTPUT --model resnet18 --tile-size 224

Each worker opens the scene once. Windows go row by row, and those that reach over the edge are padded with zeros here:
reads with `boundless=True` would bypass GDAL's cache of blocks (rasterio's discussion 3077). The network computes in
float32.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import torch
from rasterio.windows import Window
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from jobs.bench.harness.null import named

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class Windows(Dataset[tuple[int, int, Tensor]]):
    """Column, row and normalized pixels, float32 [3, size, size], of each window."""

    def __init__(self, scene: str, size: int) -> None:
        self.scene, self.size = scene, size
        self.file: Any = None
        with rasterio.open(scene) as file:
            self.width, self.height = file.width, file.height
        self.columns, self.rows = -(-self.width // size), -(-self.height // size)

    def __len__(self) -> int:
        return int(self.columns * self.rows)

    def __getitem__(self, i: int) -> tuple[int, int, Tensor]:
        self.file = self.file or rasterio.open(self.scene)
        top, left = (number * self.size for number in divmod(i, self.columns))
        width, height = min(self.size, self.width - left), min(self.size, self.height - top)
        pixels = np.zeros((3, self.size, self.size), np.uint8)
        pixels[:, :height, :width] = self.file.read((1, 2, 3), window=Window(left, top, width, height))
        return left, top, (torch.from_numpy(pixels).float() / 255 - MEAN) / STD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="SCENE.tif")
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--tile-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256 if torch.cuda.is_available() else 64)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = named(options.model)
    network.fc = torch.nn.Identity()
    network = network.eval().to(device)

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    batches = DataLoader(
        Windows(options.input, options.tile_size),
        batch_size=options.batch_size,
        num_workers=workers,
        pin_memory=device == "cuda",
    )
    columns, rows, embeddings = [], [], []
    with torch.inference_mode():
        for column, row, pixels in batches:
            columns.append(column)
            rows.append(row)
            embeddings.append(network(pixels.to(device, non_blocking=True)).cpu())
    options.output.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "column": torch.cat(columns).numpy(),
            "row": torch.cat(rows).numpy(),
            "embedding": list(torch.cat(embeddings).numpy()),
        }
    )
    pq.write_table(table, options.output / "embeddings.parquet")


if __name__ == "__main__":
    main()
