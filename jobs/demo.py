"""Make a small archive, embed it, fit a head to a few labels, classify the archive with it, and verify and show it all.

    python jobs/demo.py FOLDER

The weights are random (seeded): nothing is downloaded. Ten tiles of each kind are labelled; the head learns the kinds
from these, and names the others. Run the command again after a stop: finished steps are skipped, and an unfinished one
continues.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

JOBS = Path(__file__).resolve().parent
NETWORK = ["--model", "resnet18", "--weights", "random"]
LABELS_PER_KIND = 10
KIND = r"(\w+)-\d+\.\w+$"
"""The kind of a tile in its image_id."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder for archive/, embeddings/ and labels/")
    parser.add_argument("--images", metavar="N", default="600", help="images in the archive (default: 600)")
    given = parser.parse_args()
    folder = given.folder
    try:
        make_archive(folder, given.images)
        images = ["--input", f"{folder}/archive/tars", f"{folder}/archive/loose"]
        call("embed.py", *images, "--output", f"{folder}/embeddings", *NETWORK, "--keep", "cls")
        fit(folder)
        of_embeddings = ["--from", f"{folder}/embeddings", "--head", f"{folder}/head.safetensors"]
        call("classify.py", *of_embeddings, "--output", f"{folder}/labels", "--top-k", "3", "--keep", "cls")
        call("verify.py", f"{folder}/embeddings")
        call("verify.py", f"{folder}/labels")
    except subprocess.CalledProcessError as error:
        print(f"demo: {shlex.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
        return int(error.returncode)
    show(folder)
    draw(folder)
    suggest(folder)
    return 0


def make_archive(folder: Path, images: str) -> None:
    """Make FOLDER/archive unless it exists. It is renamed to `archive` only when it is complete."""
    if (folder / "archive").exists():
        return
    call("demo_archive.py", f"{folder}/archive.unfinished", "--images", images)
    (folder / "archive.unfinished").rename(folder / "archive")


def fit(folder: Path) -> None:
    """Label some tiles and fit FOLDER/head.safetensors to them, unless it exists."""
    if (folder / "head.safetensors").exists():
        return
    label(folder)
    labels = ["--labels", f"{folder}/labels.csv", "--to", f"{folder}/head.safetensors"]
    call("fit.py", f"{folder}/embeddings", *labels)


def label(folder: Path) -> None:
    """Write FOLDER/labels.csv: the kinds of LABELS_PER_KIND tiles each. They are in the names; a person would look."""
    tiles = read(folder / "embeddings", "image_id").rename(columns={"image_id": "image"})
    tiles["label"] = tiles["image"].str.extract(KIND, expand=False)
    mixed = tiles.sort_values("image").sample(frac=1, random_state=0)
    mixed.groupby("label").head(LABELS_PER_KIND).to_csv(folder / "labels.csv", index=False)


def call(job: str, *arguments: str) -> None:
    """Print a job's command line and run it with this Python. Raises CalledProcessError."""
    command = [os.path.relpath(sys.executable), os.path.relpath(JOBS / job), *arguments]
    print(f"\n$ {shlex.join(command)}", flush=True)
    if code := wait(subprocess.Popen(command)):
        raise subprocess.CalledProcessError(code, command)


def wait(process: subprocess.Popen[bytes]) -> int:
    """Exit code of a job, as a shell reports it. Ctrl-C also reaches the job, which ends by itself."""
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            continue


def show(folder: Path) -> None:
    """Print a few rows of both outputs, and the number of errors by type."""
    embeddings = read(folder / "embeddings", "image_id", "embedding")
    rows = read(folder / "labels").merge(embeddings, on="image_id")
    table = rows[["image_id", "width", "height", "cls", "label", "score"]].assign(
        image_id=rows["image_id"].str.rpartition("/")[2],
        cls=rows["cls"].fillna("-"),
        embedding=[f"{np.round(vector[:3], 3)} …" for vector in rows["embedding"]],
    )
    step = max(1, len(rows) // 6)
    width = len(rows["embedding"][0])
    print(f"\n{len(rows):,} images, each with a label and an embedding of {width} numbers; 1 in {step} is shown:")
    print(table.iloc[::step].to_string(index=False))
    show_kinds(folder, rows)
    print("\nbroken on purpose, one row each in _errors/:")
    print(errors_by_type(folder / "embeddings" / "_errors"))


def show_kinds(folder: Path, rows: pd.DataFrame) -> None:
    """Print how often the tiles that were not labelled got each label, by the kind in their names."""
    if not (folder / "labels.csv").exists():
        return
    others = rows[~rows["image_id"].isin(pd.read_csv(folder / "labels.csv")["image"])]
    kinds = others["image_id"].str.extract(KIND, expand=False).rename("kind")
    right = (kinds == others["label"]).mean()
    print(f"\nof the {len(others):,} tiles without a label of their own, {right:.1%} got the right one:")
    print(pd.crosstab(kinds, others["label"]).to_string())
    print(f"\nevaluation of the head, with pictures: {folder}/head.html")


def draw(folder: Path) -> None:
    """Draw FOLDER/embeddings.png, unless matplotlib is missing."""
    try:
        from jobs import demo_picture
    except ImportError:
        return
    picture = folder / "embeddings.png"
    demo_picture.draw(read(folder / "embeddings", "image_id", "source", "member", "embedding"), picture)
    print(f"\npicture of the embeddings: {picture}")


def suggest(folder: Path) -> None:
    """Print three commands to try next."""
    python = os.path.relpath(sys.executable)
    print("\nnext:")
    print(f"  {python} jobs/embed.py --input YOUR_FOLDER --output embeddings --model resnet50")
    print(f"  {python} -c 'import pandas; print(pandas.read_parquet(\"{folder}/labels\"))'")
    lab = f"NIGHTSHIFT_DEMO={shlex.quote(str(folder.resolve()))} {python} -m jupyterlab notebooks/query_results.ipynb"
    print(f"  {python} -m pip install jupyterlab && {lab}")


def read(folder: Path, *columns: str) -> pd.DataFrame:
    """The rows of an output, read on one thread: pyarrow 26 can abort if the process ends after a threaded read."""
    return pd.read_parquet(folder, columns=list(columns) or None, use_threads=False)


def errors_by_type(folder: Path) -> str:
    """One line per error type: its name and its number of images."""
    counts = read(folder)["error_type"].value_counts()
    return str(counts.to_string(header=False)) if len(counts) else "none"


if __name__ == "__main__":
    sys.exit(main())
