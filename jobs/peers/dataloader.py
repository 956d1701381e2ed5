"""Peer: a torchvision ResNet under a plain PyTorch DataLoader, over loose images or tars.

python jobs/peers/dataloader.py INPUT OUTPUT --model resnet18 --batch-size 64
"""

import argparse
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchvision import transforms

preprocess = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


class Files(Dataset):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[str, Tensor]:
        return str(self.paths[i]), preprocess(Image.open(self.paths[i]).convert("RGB"))


class Tars(IterableDataset):
    """Each worker reads every n-th tar."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for path in self.paths[first::step]:
            with tarfile.open(path) as tar:
                for member in tar:
                    yield f"{path}#{member.name}", preprocess(Image.open(tar.extractfile(member)).convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT", type=Path)
    parser.add_argument("output", metavar="OUTPUT", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=64)
    given = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = torchvision.models.get_model(given.model)
    network.fc = torch.nn.Identity()
    network = network.eval().to(device)

    tars = sorted(given.input.glob("*.tar"))
    dataset = Tars(tars) if tars else Files(sorted(given.input.iterdir()))
    names, found = [], []
    with torch.inference_mode():
        for paths, pixels in DataLoader(dataset, batch_size=given.batch_size, num_workers=os.cpu_count() or 1):
            names += paths
            found.append(network(pixels.to(device)).cpu())
    given.output.mkdir(parents=True, exist_ok=True)
    table = pa.table({"path": names, "embedding": list(torch.cat(found).numpy())})
    pq.write_table(table, given.output / "embeddings.parquet")


if __name__ == "__main__":
    main()
