"""Make a small archive, embed and classify it, prove the outputs whole, and look at them.

    python jobs/demo.py FOLDER

The weights are random (seeded), so nothing is downloaded and the labels mean nothing. Run it again: no step passes
--overwrite, so what is done stays, and what a stop left unfinished goes on.
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
ONE_THREAD = {"use_threads": False}  # a process that ends right after pyarrow 26 read on threads of its own can abort


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where archive/, embeddings/ and labels/ go")
    parser.add_argument("--images", metavar="N", default="600", help="size of the archive (default: 600)")
    given = parser.parse_args()
    folder = given.folder
    try:
        make_archive(folder, given.images)
        images = ["--input", f"{folder}/archive/tars", f"{folder}/archive/loose"]
        call("embed.py", *images, "--output", f"{folder}/embeddings", *NETWORK)
        call("classify.py", *images, "--output", f"{folder}/labels", *NETWORK, "--top-k", "3", "--keep", "cls")
        call("verify.py", f"{folder}/embeddings")
        call("verify.py", f"{folder}/labels")
    except subprocess.CalledProcessError as error:
        print(f"demo: {shlex.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
        return int(error.returncode)
    show(folder)
    return 0


def make_archive(folder: Path, images: str) -> None:
    """Make FOLDER/archive unless it is there; it gets its name when it is complete."""
    if (folder / "archive").exists():
        return
    call("make_demo_archive.py", f"{folder}/archive.unfinished", "--images", images)
    (folder / "archive.unfinished").rename(folder / "archive")


def call(job: str, *arguments: str) -> None:
    """Run a job with this Python, after printing the command as one would type it. Raises CalledProcessError."""
    command = [os.path.relpath(sys.executable), os.path.relpath(JOBS / job), *arguments]
    print(f"\n$ {shlex.join(command)}", flush=True)
    if code := wait(subprocess.Popen(command)):
        raise subprocess.CalledProcessError(code, command)


def wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a job, as a shell tells it. Ctrl-C reaches the job too, and it ends by itself."""
    while True:
        try:
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            continue


def show(folder: Path) -> None:
    """Read both outputs back, print a few rows of them, the errors by kind, and what to type next."""
    embeddings = pd.read_parquet(folder / "embeddings", columns=["image_id", "embedding"], **ONE_THREAD)
    rows = pd.read_parquet(folder / "labels", **ONE_THREAD).merge(embeddings, on="image_id")
    table = rows[["image_id", "width", "height", "cls", "label", "score"]].assign(
        image_id=rows["image_id"].str.rpartition("/")[2],
        cls=rows["cls"].fillna("-"),
        embedding=[f"{np.round(vector[:3], 3)} …" for vector in rows["embedding"]],
    )
    step = max(1, len(rows) // 6)
    print(f"\n{len(rows):,} images, each with a label and {len(rows['embedding'][0])} numbers; here one in {step}:")
    print(table.iloc[::step].to_string(index=False))
    print("\nbroken on purpose, one row each in _errors/:")
    print(errors_by_type(folder / "embeddings" / "_errors"))
    python = os.path.relpath(sys.executable)
    print("\nnext:")
    print(f"  {python} jobs/embed.py --input YOUR_FOLDER --output embeddings --model resnet50")
    print(f"  {python} -c 'import pandas; print(pandas.read_parquet(\"{folder}/labels\"))'")
    lab = f"NIGHTSHIFT_DEMO={shlex.quote(str(folder.resolve()))} {python} -m jupyterlab notebooks/query_results.ipynb"
    print(f"  {python} -m pip install jupyterlab && {lab}")


def errors_by_type(folder: Path) -> str:
    """How many of each, a line a type. The folder is not there where no image failed, as in a small archive."""
    if not folder.exists():
        return "none"
    return str(pd.read_parquet(folder, **ONE_THREAD)["error_type"].value_counts().to_string(header=False))


if __name__ == "__main__":
    sys.exit(main())
