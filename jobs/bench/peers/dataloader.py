"""Peer: a torchvision ResNet with a plain PyTorch DataLoader, over loose images or tars of a folder, or a bucket.

python jobs/bench/peers/dataloader.py INPUT OUTPUT --model resnet18 --batch-size 64
"""

import argparse
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision import transforms

from jobs.bench.harness.null import named

preprocess = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)

Item = tuple[str, Tensor]


class Files(Dataset[Item]):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Item:
        return str(self.paths[i]), preprocess(Image.open(self.paths[i]).convert("RGB"))


class Objects(Dataset[Item]):
    """The objects of a bucket. Each worker makes its own client, since clients do not survive a fork."""

    def __init__(self, uri: str) -> None:
        self.bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        self.client: Any = None
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{prefix}/")
        self.keys = [each["Key"] for page in pages for each in page["Contents"]]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Item:
        self.client = self.client or _client()
        data = self.client.get_object(Bucket=self.bucket, Key=self.keys[i])["Body"].read()
        return f"s3://{self.bucket}/{self.keys[i]}", preprocess(Image.open(io.BytesIO(data)).convert("RGB"))


class Tars(IterableDataset[Item]):
    """Each of n workers reads every n-th tar."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for path in self.paths[first::step]:
            with tarfile.open(path) as tar:
                for member in tar:
                    yield (
                        f"{path}#{member.name}",
                        preprocess(Image.open(cast(IO[bytes], tar.extractfile(member))).convert("RGB")),
                    )


def _client() -> Any:
    import boto3  # only for buckets

    return boto3.client("s3")


def dataset(uri: str) -> Dataset[Item]:
    if uri.startswith("s3://"):
        return Objects(uri)
    tars = sorted(Path(uri).glob("*.tar"))
    return Tars(tars) if tars else Files(sorted(Path(uri).iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT")
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=256 if torch.cuda.is_available() else 64)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = named(options.model)
    network.fc = torch.nn.Identity()
    network = network.eval().to(device)

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names, embeddings = [], []
    with torch.inference_mode():
        for paths, pixels in DataLoader(dataset(options.input), batch_size=options.batch_size, num_workers=workers):
            names += paths
            embeddings.append(network(pixels.to(device)).cpu())
    options.output.mkdir(parents=True, exist_ok=True)
    table = pa.table({"path": names, "embedding": list(torch.cat(embeddings).numpy())})
    pq.write_table(table, options.output / "embeddings.parquet")


if __name__ == "__main__":
    main()
