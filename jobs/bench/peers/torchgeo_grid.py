"""Peer: a torchvision ResNet over the windows of one raster scene, with TorchGeo's RasterDataset and GridGeoSampler.

python jobs/bench/peers/torchgeo_grid.py SCENE.tif OUTPUT --model resnet18 --tile-size 224

Needs `pip install torchgeo`. Written as TorchGeo's tutorials are.
"""

import argparse
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader
from torchgeo.datasets import RasterDataset, stack_samples
from torchgeo.samplers import GridGeoSampler

from jobs.bench.harness.null import named

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


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
    dataset = RasterDataset(options.input)
    sampler = GridGeoSampler(dataset, size=options.tile_size, stride=options.tile_size)
    batches = DataLoader(
        dataset, batch_size=options.batch_size, sampler=sampler, num_workers=workers, collate_fn=stack_samples
    )
    embeddings = []
    with torch.inference_mode():
        for batch in batches:
            pixels = (batch["image"].float() / 255 - MEAN) / STD
            embeddings.append(network(pixels.to(device)).cpu())
    options.output.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"embedding": list(torch.cat(embeddings).numpy())}), options.output / "embeddings.parquet")


if __name__ == "__main__":
    main()
