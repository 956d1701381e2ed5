"""How many planted copies of photos `duplicates` finds, by the vectors of an EfficientNet-Lite0 and by hashes.

    python jobs/bench/duplicates.py photos/
    python jobs/bench/duplicates.py photos/ --seed 7 --json figures.json

Each photo gets up to four copies, drawn by --seed: resized, recompressed, cropped, brightened. The job embeds photos
and copies with --phash, and `duplicates` chooses its threshold itself. Precision and recall are those of the pairs of a
copy and its original or another copy of it. Needs the extra [bench].
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from jobs.bench.harness import command, lite0
from jobs.bench.harness.contest import JOBS
from pipeline.errors import SettingRefused

COPY_SHARE = 1 / 3
"""Photos that have a copy of each kind."""
Pair = tuple[str, str]


def resized(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, int]:
    factor = rng.uniform(0.4, 0.8)
    return image.resize((round(image.width * factor), round(image.height * factor))), 90


def recompressed(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, int]:
    return image, int(rng.integers(25, 60))


def cropped(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, int]:
    left, top, right, bottom = rng.uniform(0, 0.06, 4)
    width, height = image.size
    box = width * left, height * top, width * (1 - right), height * (1 - bottom)
    return image.crop(tuple(map(round, box))), 90


def brightened(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, int]:
    return ImageEnhance.Brightness(image).enhance(rng.uniform(1.15, 1.4)), 90


KINDS: dict[str, Callable[[Image.Image, np.random.Generator], tuple[Image.Image, int]]] = {
    "resized": resized, "recompressed": recompressed, "cropped": cropped, "brightened": brightened,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("photos", metavar="PHOTOS", type=Path, help="a folder of JPEGs")
    flags.add_argument("--seed", metavar="N", type=int, default=1, help="of the copies (default: 1)")
    flags.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    return flags


def main() -> int:
    options = parser().parse_args()
    return command.guarded(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    photos = sorted(path for path in options.photos.glob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if len(photos) < 100:
        raise SettingRefused(f"{options.photos} has {len(photos)} JPEGs: the benchmark needs 100 or more")
    command.check_writable(options.json)
    lite0.network()  # refuses a missing package at once
    with tempfile.TemporaryDirectory(prefix="nightshift-") as temporary:
        folder = Path(temporary)
        copies = plant(photos, folder / "photos", options.seed)
        command.say(f"{len(photos)} photos and {copies} copies")
        figures = measure(folder)
    for each in figures:
        print("{by}: F1 {f1:.4f}, precision {precision:.4f}, recall {recall:.4f} ({kinds}); {limit}".format(**each))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return 0


def plant(photos: list[Path], folder: Path, seed: int) -> int:
    """Write the photos and copies, `<photo>.<kind>.jpg`. Returns the number of copies."""
    folder.mkdir()
    rng, copies = np.random.default_rng(seed), 0
    for photo in photos:
        (folder / f"{photo.stem}.original.jpg").write_bytes(photo.read_bytes())
        for kind, change in KINDS.items():
            if rng.random() < COPY_SHARE:
                image, quality = change(Image.open(photo).convert("RGB"), rng)
                image.save(folder / f"{photo.stem}.{kind}.jpg", quality=quality)
                copies += 1
    return copies


def measure(folder: Path) -> list[dict[str, Any]]:
    """The figures by vectors and by hashes."""
    photos, out = folder / "photos", folder / "out"
    network = ["--model", lite0.MODEL, "--weights", "DEFAULT", "--phash", "--quiet"]
    _run([JOBS / "embed.py", "--input", photos, "--output", out, *network])
    names = [path.name for path in photos.iterdir()]
    figures = []
    for by, flags in (("vectors", []), ("hashes", ["--hash"])):
        found = folder / f"{by}.parquet"
        limit = _run([JOBS / "duplicates.py", out, "--to", found, *flags]).splitlines()[1]
        figures.append({"by": by, "limit": limit, **scores(names, found)})
    return figures


def _run(line: list[Any]) -> str:
    environment = {**os.environ, "RAY_ADDRESS": "local"} if "embed.py" in str(line[0]) else dict(os.environ)
    return subprocess.run(
        [sys.executable, *map(str, line)], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def scores(names: list[str], found: Path) -> dict[str, Any]:
    """Precision, recall and F1 of all pairs, and recall by kind of copy, of pairs with the original."""
    expected = _pairs({name: name.partition(".")[0] for name in names})
    groups = {row["image_id"].rpartition("/")[2]: row["group"] for row in pq.read_table(found).to_pylist()}
    pairs = _pairs(groups)
    right = len(pairs & expected)
    precision, recall = right / max(len(pairs), 1), right / len(expected)
    kinds = []
    for kind in KINDS:
        of_kind = {pair for pair in expected if {each.split(".")[1] for each in pair} == {kind, "original"}}
        kinds.append(f"{kind} {len(of_kind & pairs) / max(len(of_kind), 1):.3f}")
    f1 = 2 * right / (len(pairs) + len(expected))
    return {"f1": f1, "precision": precision, "recall": recall, "kinds": ", ".join(kinds)}


def _pairs(group_of: dict[str, Any]) -> set[Pair]:
    groups: dict[Any, list[str]] = {}
    for name, group in group_of.items():
        groups.setdefault(group, []).append(name)
    return {pair for members in groups.values() for pair in combinations(sorted(members), 2)}


if __name__ == "__main__":
    sys.exit(main())
