"""Label a small archive of tiles, and map a satellite scene, both drawn for this: embed, fit a head, classify, verify.

    python jobs/demo.py FOLDER

The network is a ResNet-18 with random weights (seeded): nothing is downloaded. A head learns the kinds of tiles from
ten labels each, in seconds, and names the others; so does another head with windows of the scene. Run the command again
after a stop: finished steps are skipped, and an unfinished one continues. The scene needs the extra [geo].
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd

JOBS = Path(__file__).resolve().parent
NETWORK = ["--model", "resnet18", "--weights", "random"]
WINDOWS = ["--tile-size", "96", "--tile-stride", "48", "--resize", "96", "--crop", "96"]
"""Overlapping windows of the scene, which the network gets as they are."""
LABELS_PER_KIND = 10
KIND = r"(\w+)-\d+\.\w+$"
"""The kind of a tile in its image_id."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder for archive/, embeddings/, labels/, scene/")
    parser.add_argument("--images", metavar="N", default="600", help="images in the archive (default: 600)")
    given = parser.parse_args()
    folder, has_geo = given.folder, find_spec("rasterio") is not None
    try:
        label_archive(folder, given.images)
        if has_geo:
            map_scene(folder / "scene")
    except subprocess.CalledProcessError as error:
        print(f"demo: {shlex.join(error.cmd)} ended with {error.returncode}", file=sys.stderr)
        return int(error.returncode)
    show(folder)
    draw(folder)
    if has_geo:
        show_scene(folder / "scene")
    else:
        print("\nno map without the extra [geo]: pip install 'nightshift[geo]'")
    suggest(folder)
    return 0


def label_archive(folder: Path, images: str) -> None:
    """Embed the tiles of FOLDER/archive, fit a head to some of them, and classify all."""
    make_archive(folder, images)
    tiles = ["--input", f"{folder}/archive/tars", f"{folder}/archive/loose"]
    call_on_ray("embed.py", folder / "embeddings", *tiles, *NETWORK, "--keep", "cls")
    head = folder / "head.safetensors"
    if not head.exists():
        label_tiles(folder)
        fit(folder / "embeddings", folder / "labels.csv", head)
    of_embeddings = ["--from", f"{folder}/embeddings", "--head", f"{head}"]
    call_on_ray("classify.py", folder / "labels", *of_embeddings, "--top-k", "3", "--keep", "cls")
    call("verify.py", f"{folder}/embeddings")
    call("verify.py", f"{folder}/labels")


def map_scene(folder: Path) -> None:
    """Embed the windows of FOLDER/scene.tif, fit a head to some of them, classify all, and draw FOLDER/map.png."""
    from jobs import demo_land_cover

    make_scene(folder)
    call_on_ray("embed.py", folder / "windows", "--input", f"{folder}/scene.tif", *NETWORK, *WINDOWS)
    head = folder / "land-cover.safetensors"
    if not head.exists():
        label_windows(folder)
        fit(folder / "windows", folder / "labels.csv", head)
    of_windows = ["--from", f"{folder}/windows", "--head", f"{head}"]
    call_on_ray("classify.py", folder / "land-cover", *of_windows)
    call("verify.py", f"{folder}/windows")
    call("verify.py", f"{folder}/land-cover")
    if not (folder / "map.png").exists():
        files = ["--to", f"{folder}/map.tif", "--png", f"{folder}/map.png", "--colors", f"{folder}/colors.csv"]
        call("map.py", f"{folder}/land-cover", *files, "--overwrite")
        demo_land_cover.shrink(folder / "map.png", folder / "map-small.png")


def make_archive(folder: Path, images: str) -> None:
    """Make FOLDER/archive unless it exists. It is renamed to `archive` only when it is complete."""
    if (folder / "archive").exists():
        return
    call("demo_archive.py", f"{folder}/archive.unfinished", "--images", images)
    (folder / "archive.unfinished").rename(folder / "archive")


def make_scene(folder: Path) -> None:
    """Make FOLDER/scene.tif and FOLDER/truth.tif unless the scene exists."""
    folder.mkdir(exist_ok=True)
    if (folder / "scene.tif").exists():
        return
    call("demo_scene.py", f"{folder}/unfinished.tif", "--truth", f"{folder}/truth.tif")
    (folder / "unfinished.tif").rename(folder / "scene.tif")


def label_tiles(folder: Path) -> None:
    """Write FOLDER/labels.csv: the kinds of LABELS_PER_KIND tiles each. They are in the names; a person would look."""
    tiles = read(folder / "embeddings", "image_id").rename(columns={"image_id": "image"})
    tiles["label"] = tiles["image"].str.extract(KIND, expand=False)
    mixed = tiles.sort_values("image").sample(frac=1, random_state=0)
    mixed.groupby("label").head(LABELS_PER_KIND).to_csv(folder / "labels.csv", index=False)


def label_windows(folder: Path) -> None:
    """Write FOLDER/labels.csv from the drawn kinds, where a person would look at the scene, and FOLDER/colors.csv."""
    from jobs import demo_land_cover

    windows = read(folder / "windows", "image_id", *demo_land_cover.PLACE)
    labels = demo_land_cover.choose_labels(windows, folder / "truth.tif", LABELS_PER_KIND)
    labels.to_csv(folder / "labels.csv", index=False)
    pd.DataFrame(demo_land_cover.COLORS.items(), columns=["label", "color"]).to_csv(folder / "colors.csv", index=False)


def fit(embeddings: Path, labels: Path, head: Path) -> None:
    call("fit.py", f"{embeddings}", "--labels", f"{labels}", "--to", f"{head}")


def call_on_ray(job: str, output: Path, *arguments: str) -> None:
    """Run a job with an output. All jobs share one Ray, whose start takes longer than most of them."""
    if not (output / "_SUCCESS").exists():
        start_ray()
    call(job, *arguments, "--output", f"{output}")


def start_ray() -> None:
    """Start Ray on this machine until this process ends, unless RAY_ADDRESS names a cluster."""
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        return
    import ray

    from pipeline.engine import cluster

    cluster.connect()
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


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
    show_head(folder / "head.safetensors")


def show_head(head: Path) -> None:
    """Print the accuracy of a head on labels that it was not fitted on, and where its page is."""
    evaluation = json.loads(head.with_suffix(".json").read_text())
    accuracy = f"{evaluation['accuracy']:.1%} of {evaluation['labels']} labels"
    print(f"\nhold-out accuracy of the head: {accuracy}; its page, with pictures: {head.with_suffix('.html')}")


def show_scene(folder: Path) -> None:
    """Print how well the map agrees with the kinds that were drawn, and where it is."""
    from jobs import demo_land_cover

    labelled = pd.read_csv(folder / "labels.csv").rename(columns={"image": "image_id"})
    windows = read(folder / "windows", "image_id", *demo_land_cover.PLACE)
    pixels = demo_land_cover.compare(folder / "map.tif", folder / "truth.tif", windows.merge(labelled, on="image_id"))
    print(
        f"\na map from {len(windows):,} windows, of which {len(labelled)} were labelled. Of the pixels outside of these"
    )
    print(f"{demo_land_cover.agreement(pixels):.1%} have the class that was drawn. In percent of each kind:")
    print((100 * pixels.div(pixels.sum(axis=1), axis=0)).sort_index().round(1).to_string())
    show_head(folder / "land-cover.safetensors")
    print(f"map: {folder}/map.tif, picture of the map: {folder}/map.png")


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
    """Print four commands to try next."""
    python = os.path.relpath(sys.executable)
    print("\nnext:")
    print(f"  {python} jobs/serve.py {folder}/labels    # the images, their labels and their neighbours, as a web page")
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
