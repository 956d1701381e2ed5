"""Peer: a torchvision ResNet over the windows of one raster scene, with TorchGeo's RasterDataset and GridGeoSampler.

python jobs/bench/peers/torchgeo_grid.py SCENE.tif OUTPUT --model resnet18 --tile-size 224

Needs `pip install --no-deps torchgeo==0.8.1 einops`; its other dependencies clash with ours, and this peer uses none of
them. Written as TorchGeo's tutorials are. Its windows go row by row from the south. The network computes in float32.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader
from torchgeo.datasets import RasterDataset, stack_samples
from torchgeo.samplers import GridGeoSampler

from jobs.bench.harness.null import named

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def normalize(sample: dict[str, Any]) -> dict[str, Any]:
    """Numbers of 0 to 255 → normalized pixels, float32 [3, size, size]."""
    sample["image"] = (sample["image"] / 255 - MEAN) / STD
    return sample


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
    dataset = RasterDataset(options.input, transforms=normalize)
    batches = DataLoader(
        dataset,
        batch_size=options.batch_size,
        sampler=GridGeoSampler(dataset, size=options.tile_size, stride=options.tile_size),
        num_workers=workers,
        pin_memory=device == "cuda",
        collate_fn=stack_samples,
    )
    xs, ys, embeddings = [], [], []
    with torch.inference_mode():
        for batch in batches:
            xs += [x.start for x, _, _ in batch["bounds"]]
            ys += [y.stop for _, y, _ in batch["bounds"]]
            embeddings.append(network(batch["image"].to(device, non_blocking=True)).cpu())
    options.output.mkdir(parents=True, exist_ok=True)
    table = pa.table({"x": xs, "y": ys, "embedding": list(torch.cat(embeddings).numpy())})
    pq.write_table(table, options.output / "embeddings.parquet")


if __name__ == "__main__":
    main()
