"""Peer: Daft's own recipe for image inference: from_glob_path, download, decode_image, a batch method, write_parquet.

    python jobs/bench/peers/daft_udf.py INPUT OUTPUT --model resnet18 --batch-size 64

Daft reads loose images, and has no reader of tars.
"""

# Not named daft.py: as a script it would be first on the path, and `import daft` would import this file.

import argparse
from pathlib import Path

import daft
import numpy as np
import torch
from daft import functions
from torchvision import transforms

from jobs.bench.harness.null import named

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("input", metavar="INPUT")
parser.add_argument("output", metavar="OUTPUT", type=Path)
parser.add_argument("--model", default="resnet18")
parser.add_argument("--batch-size", type=int, default=256 if torch.cuda.is_available() else 64)
options = parser.parse_args()

transform = transforms.Compose(
    [
        transforms.ToTensor(),
        transforms.Resize(256, antialias=True),
        transforms.CenterCrop(224),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)
with torch.device("meta"):
    width = named(options.model).fc.in_features


@daft.cls
class Embed:
    def __init__(self, model: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        network = named(model)
        network.fc = torch.nn.Identity()
        self.network = network.eval().to(self.device)

    @daft.method.batch(  # type: ignore[untyped-decorator]
        return_dtype=daft.DataType.embedding(daft.DataType.float32(), width), batch_size=options.batch_size
    )
    def embed(self, images: daft.Series) -> list[np.ndarray]:
        batch = torch.stack([transform(np.asarray(image)) for image in images.to_pylist()])
        with torch.inference_mode():
            return list(self.network(batch.to(self.device)).cpu().numpy())


frame = daft.from_glob_path(f"{options.input}/*").select("path")
frame = frame.with_column("image", functions.decode_image(functions.download(daft.col("path")), mode="RGB"))
frame = frame.with_column("embedding", Embed(options.model).embed(daft.col("image")))
frame.select("path", "embedding").write_parquet(str(options.output))
