"""Peer: Ray Data's own recipe for batch inference: read_images or read_webdataset, map, map_batches, write_parquet.

python jobs/bench/peers/ray_data.py INPUT OUTPUT --model resnet18 --batch-size 64
"""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torchvision import transforms

from jobs.bench.harness.null import named

transform = transforms.Compose(
    [
        transforms.ToTensor(),
        transforms.Resize(256, antialias=True),
        transforms.CenterCrop(224),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


def preprocess_file(row: dict[str, Any]) -> dict[str, Any]:
    return {"path": row["path"], "image": transform(row["image"]).numpy()}


def preprocess_sample(row: dict[str, Any]) -> dict[str, Any]:
    image = row["jpg" if "jpg" in row else "png"]
    rgb = np.stack([image] * 3, axis=2) if image.ndim == 2 else image  # Ray does not convert grey images of a tar
    return {"path": row["__key__"], "image": transform(rgb).numpy()}


class Embed:
    def __init__(self, model: str) -> None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(cpus)  # in an actor of one CPU Ray sets one thread
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        network = named(model)
        network.fc = torch.nn.Identity()
        self.network = network.eval().to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            embedding = self.network(torch.from_numpy(batch["image"]).to(self.device)).cpu().numpy()
        return {"path": batch["path"], "embedding": embedding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=256 if torch.cuda.is_available() else 64)
    options = parser.parse_args()

    ray.init(include_dashboard=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    tars = [str(path) for path in sorted(Path(options.input).glob("*.tar"))]
    if tars:
        images = ray.data.read_webdataset(tars).map(preprocess_sample)
    else:
        images = ray.data.read_images(options.input, mode="RGB", include_paths=True).map(preprocess_file)
    images.map_batches(
        Embed,
        fn_constructor_args=(options.model,),
        batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
        num_gpus=min(1, torch.cuda.device_count()),
    ).write_parquet(str(options.output))


if __name__ == "__main__":
    main()
