"""Whole jobs in their own processes, as a user starts them: on real files, a real S3 server and a real cluster."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import images
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import RayCluster, S3Server
from whole import SLOW, TINY, Jobs, count_commits, embeddings, jpeg, same, wait_for, write_folder, write_tar

from pipeline.images.decode import decode
from pipeline.output.verify import verify
from pipeline.predictors.base import Allotment
from pipeline.predictors.embed import Embedder
from pipeline.storage import access

pytestmark = pytest.mark.slow

COLUMNS = ["image_id", "source", "member", "shard", "row", "width", "height"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of shard, with 20 good images per kind."""
    folder = tmp_path_factory.mktemp("archive")
    write_folder(folder / "loose", 20)
    members: dict[str, bytes] = {}
    for i in range(20):
        members |= {f"a/{i:03d}.jpg": jpeg(100 + i), f"a/{i:03d}.cls": str(i % 4).encode()}
    write_tar(folder / "shard-0000.tar", dict(list(members.items())[:20]))
    write_tar(folder / "shard-0001.tar", dict(list(members.items())[20:]))
    with zipfile.ZipFile(folder / "images.zip", "w") as file:
        for i in range(20):
            file.writestr(f"z/{i:03d}.png", images.encode(images.tile("desert", 200 + i, (50, 40)), "PNG"))
    table = pa.table({"image": [{"bytes": jpeg(300 + i), "path": f"p{i}.jpg"} for i in range(20)]})
    pq.write_table(table, folder / "images.parquet", row_group_size=7)
    return folder


def bytes_of(image_id: str) -> bytes:
    """The encoded image of an image_id, read without the project's own readers."""
    uri, _, member = image_id.partition("#")
    if uri.endswith(".tar"):
        with tarfile.open(uri) as tar:
            return tar.extractfile(member).read()  # type: ignore[union-attr]
    if uri.endswith(".zip"):
        return zipfile.ZipFile(uri).read(member)
    if uri.endswith(".parquet"):
        return next(r["bytes"] for r in pq.read_table(uri)["image"].to_pylist() if r["path"] == member)
    return Path(uri).read_bytes()


def test_every_kind_of_shard_becomes_rows_of_its_images(jobs: Jobs, archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = jobs.run("embed", "--input", archive, "--output", out, *TINY, "--rows-per-part", 16, "--batch-size", 8)
    assert "80 of 80 planned: 80 rows, 0 errors" in done.stdout
    assert f'pandas.read_parquet("{out}")' in done.stdout
    table = pd.read_parquet(out)
    assert list(table.columns) == [*COLUMNS, "embedding"]
    predictor = Embedder(model="tiny:network", weights="random", precision="float32")
    predictor.prepare()
    predictor.load(Allotment())
    for row in table.itertuples():
        decoded = decode(bytes_of(row.image_id), predictor.transform, exact=False)
        assert (row.width, row.height) == (decoded.width, decoded.height)
        expected = predictor.predict(decoded.pixels[None])["embedding"]
        np.testing.assert_allclose(row.embedding, expected[0], rtol=1e-4, atol=1e-5)
    check_files(out)


def check_files(out: Path) -> None:
    """Check schema, order within a part, footer, `_report.json`, `_run.json` and `verify`."""
    for path in out.glob("results/*.parquet"):
        file = pq.ParquetFile(path)
        types = dict(zip(file.schema_arrow.names, map(str, file.schema_arrow.types), strict=True))
        assert types == {
            "image_id": "string", "source": "string", "member": "string", "shard": "int32", "row": "int64",
            "width": "int32", "height": "int32", "embedding": "fixed_size_list<element: float not null>[8]",
        }  # fmt: skip
        keys = file.read(["shard", "row"]).to_pandas().apply(tuple, axis=1).tolist()
        assert keys == sorted(keys)
        footer = json.loads(file.schema_arrow.metadata[b"nightshift"])
        run = json.loads((out / "_run.json").read_text())
        assert footer["fingerprint"] == run["fingerprint"]
        assert footer["model"] == "tiny:network"
    report = json.loads((out / "_report.json").read_text())
    assert (report["planned"], report["rows"], report["errors"], report["status"]) == (80, 80, 0, "done")
    assert report["core_seconds"] > sum(report["stage_seconds"].values()) / 10, "CPU time of whole processes"
    assert report["gpu_seconds"] == 0
    assert report["bytes_written"] == sum(path.stat().st_size for path in out.glob("*/part-*.parquet"))
    assert report["cost"] is None
    assert set(report["stage_seconds"]) == {"read", "decode", "predict", "write"}
    assert (out / "_SUCCESS").exists()
    assert next(verify(str(out)).lines()).startswith(f"{out}: planned 80 = 80 rows + 0 errors, in ")
    assert verify(str(out)).is_whole


def test_classify_with_labels_kept_columns_and_embeddings(jobs: Jobs, archive: Path, tmp_path: Path) -> None:
    out, labels = tmp_path / "out", tmp_path / "labels.txt"
    labels.write_text("forest\nwater\nurban\nfield\ndesert\n")
    done = jobs.run(
        "classify", "--input", archive / "shard-{0000..0001}.tar", "--output", out, *TINY,
        "--labels", labels, "--top-k", 3, "--embeddings", "--keep", "cls:truth", "--cluster", "3xg6.xlarge",
    )  # fmt: skip
    report = json.loads((out / "_report.json").read_text())
    assert report["cost"]["usd"] == pytest.approx(3 * 0.8048 * report["wall_seconds"] / 3600, abs=1e-4)
    assert report["cost"]["usd_per_million_images"] == pytest.approx(report["cost"]["usd"] / 20 * 1e6, rel=0.05)
    assert "on demand for this attempt on 3xg6.xlarge" in done.stdout
    table = pd.read_parquet(out)
    added = ["label", "label_id", "score", "top_labels", "top_label_ids", "top_scores", "embedding"]
    assert list(table.columns) == [*COLUMNS, *added, "truth"]
    assert table["truth"].tolist() == [str(i % 4) for i in range(20)]
    for row in table.itertuples():
        assert row.label == row.top_labels[0] == ["forest", "water", "urban", "field", "desert"][row.label_id]
        assert len(row.top_scores) == 3
        assert row.score == row.top_scores[0] == max(row.top_scores)


def test_killed_jobs_resume_and_give_the_same_results(jobs: Jobs, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "loose", 240)
    settings = ("--input", folder, *SLOW, "--batch-size", 8, "--rows-per-part", 16)
    jobs.run("embed", *settings, "--output", tmp_path / "uninterrupted")
    out = tmp_path / "out"
    for kill_after in (3, 7):
        process = jobs.start("embed", *settings, "--output", out)
        wait_for(lambda kill_after=kill_after: count_commits(out) >= kill_after)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
    done = jobs.run("embed", *settings, "--output", out)
    assert "images were done before, by earlier attempts" in done.stdout
    assert verify(str(out)).is_whole, list(verify(str(out)).lines())
    assert same(embeddings(out), embeddings(tmp_path / "uninterrupted"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_a_report_in_three_seconds(
    jobs: Jobs, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    folder = write_folder(tmp_path / "loose", 200)
    settings = ("--input", folder, "--output", tmp_path / "out", *SLOW, "--batch-size", 8, "--rows-per-part", 16)
    process = jobs.start("embed", *settings)
    wait_for(lambda: count_commits(tmp_path / "out") >= 2)
    process.send_signal(number)
    started = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - started < 3
    assert process.returncode == code, err
    assert "run the same command again to continue" in err
    report = json.loads((tmp_path / "out" / "_report.json").read_text())
    assert report["status"] == "Interrupted"
    assert 0 < report["rows"] < 200
    verified = jobs.run("verify", tmp_path / "out", code=5)
    assert "are missing" in verified.stdout
    jobs.run("embed", *settings)
    assert "planned 200 = 200 rows + 0 errors" in jobs.run("verify", tmp_path / "out").stdout


def test_a_finished_output_is_kept_or_refused_or_overwritten(jobs: Jobs, tmp_path: Path) -> None:
    folder, out = write_folder(tmp_path / "loose", 12), tmp_path / "out"
    settings = ("--input", folder, "--output", out)
    jobs.run("embed", *settings, *TINY)
    before = {path.name: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    jobs.run("embed", *settings, *TINY)
    assert {path.name: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    err = jobs.run("embed", *settings, *TINY, "--seed", 7, "--limit", 5, code=2).stderr
    assert "limit was not set and is 5" in err
    assert "random, seed 7" in err
    jobs.run("embed", *settings, *TINY, "--limit", 5, "--overwrite")
    assert len(pd.read_parquet(out)) == 5
    assert verify(str(out)).is_whole
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        err = jobs.run("embed", "--input", folder, "--output", tmp_path / "mine", *TINY, *more, code=2).stderr
        assert "thesis.txt" in err
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_s3_as_input_and_output(jobs: Jobs, s3: S3Server, archive: Path) -> None:
    for info in access.list_objects(str(archive)):
        access.write(s3.uri(f"in/{info.uri[len(str(archive)) + 1 :]}"), access.read(info.uri))
    plan = json.loads(jobs.run("embed", "--input", s3.uri("in"), "--output", s3.uri("out"), *TINY, "--dry-run").stdout)
    assert (plan["shards_by_kind"], plan["images"]) == ({"objects": 1, "parquet": 1, "tar": 2, "zip": 1}, 40)
    assert list(access.list_objects(s3.uri("out"))) == []
    jobs.run("embed", "--input", s3.uri("in"), "--output", s3.uri("out"), *TINY)
    assert "planned 80 = 80 rows + 0 errors" in jobs.run("verify", s3.uri("out")).stdout
    environment = {"endpoint_url": s3.endpoint, "key": "testing-key", "secret": "testing-secret"}
    assert len(pd.read_parquet(s3.uri("out"), storage_options=environment)) == 80


@pytest.fixture
def web(archive: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(archive)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_each_bad_image_is_one_error_row(jobs: Jobs, tmp_path: Path, web: str) -> None:
    folder = write_folder(tmp_path / "in" / "loose", 10)
    loose = {
        "empty.jpg": (b"", "empty"),
        "truncated.jpg": (images.truncated(), "truncated"),
        "text.jpg": (b"this is no image", "not_an_image"),
        "chunk.png": (images.broken_png_data(), "corrupt"),
        "bomb.png": (images.bomb(), "too_large"),
    }
    for name, (data, _) in loose.items():
        (folder / name).write_bytes(data)
    cut = write_tar(tmp_path / "in" / "cut.tar", {f"{i}.jpg": jpeg(i) for i in range(6)})
    with tarfile.open(cut) as tar:
        middle_of_fourth = tar.getmembers()[3].offset_data + 100
    cut.write_bytes(cut.read_bytes()[:middle_of_fourth])
    pq.write_table(pa.table({"image": [jpeg(1), None, jpeg(2)]}), tmp_path / "in" / "nulls.parquet")
    uris = tmp_path / "uris.txt"
    uris.write_text(f"{web}/loose/0000.jpg?signature=secret\n{web}/none.jpg\n")
    out = tmp_path / "out"
    settings = ("--input", tmp_path / "in", uris, "--output", out, *TINY)
    assert "more than --max-error-rate 0.05 allows" in jobs.run("embed", *settings, code=3).stderr
    jobs.run("embed", *settings, "--max-error-rate", 0.5)
    errors = pd.read_parquet(out / "_errors").set_index("image_id")
    kinds = errors[["stage", "error_type"]].apply(tuple, axis=1).to_dict()
    assert {f"{folder}/{name}": ("decode", kind) for name, (_, kind) in loose.items()}.items() <= kinds.items()
    assert kinds[f"{tmp_path}/in/nulls.parquet#1"] == ("read", "null")
    assert kinds[f"{web}/none.jpg"] == ("read", "not_found")
    assert [kind for image_id, kind in kinds.items() if "cut.tar" in image_id] == [("read", "truncated")]
    assert len(kinds) == 8
    assert errors["message"].str.len().min() > 5
    good = pd.read_parquet(out)["image_id"].tolist()
    assert sum("cut.tar" in image_id for image_id in good) == 3
    assert f"{web}/loose/0000.jpg" in good
    assert not any(b"secret" in path.read_bytes() for path in out.glob("*.json"))
    assert verify(str(out)).is_whole


def test_two_drivers_on_one_output(jobs: Jobs, tmp_path: Path) -> None:
    settings = ("--input", write_folder(tmp_path / "loose", 600), "--output", tmp_path / "out", *SLOW)
    first = jobs.start("embed", *settings, "--rows-per-part", 64)
    wait_for(lambda: (tmp_path / "out" / "_lock.json").exists())
    assert f"in use by process {first.pid}" in jobs.run("embed", *settings, code=4).stderr
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert verify(str(tmp_path / "out")).is_whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--input", "none", *TINY), "none does not exist"),
        (("--model", "resnet19"), "resnet18"),
        (("--model", "resnet18", "--weights", "none.pt"), "none.pt"),
        (("--actors", "0"), "--actors is '0'"),
        ((*TINY, "--gpus-per-actor", "1"), "the cluster has 0 GPUs"),
        (("--config", "none.yaml"), "none.yaml"),
        ((*TINY, "--cluster", "8xg6.2xlrge"), "g6.2xlarge"),
    ],
)
def test_bad_settings_end_at_once_with_one_line(
    jobs: Jobs, archive: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    inputs = () if "--input" in arguments else ("--input", archive / "loose")
    done = jobs.run("embed", *inputs, "--output", tmp_path / "out", *arguments, code=2)
    assert message in done.stderr
    assert done.stderr.startswith("nightshift: ")


def test_a_predictor_of_the_user(ray_cluster: RayCluster, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "loose", 10)
    script = tmp_path / "brightness.py"
    script.write_text(
        "import sys\nimport pyarrow as pa\nfrom pipeline import Predictor, RunConfig, run\n"
        "class Brightness(Predictor):\n"
        "    columns = pa.schema([('brightness', pa.float32())])\n"
        "    def predict(self, pixels):\n"
        "        if pixels.mean(axis=(1, 2, 3)).max() > 254: raise RuntimeError('too bright')\n"
        "        return {'brightness': pixels.mean(axis=(1, 2, 3), dtype='float32')}\n"
        "report = run(RunConfig(input=sys.argv[1], output=sys.argv[2], max_error_rate=0.5), Brightness())\n"
        "print(report.rows, report.errors)\n"
    )
    (folder / "white.png").write_bytes(images.encode(images.tile().convert("L").point(lambda _: 255), "PNG"))
    environment = {**os.environ, **ray_cluster.environment}
    command = [sys.executable, str(script), str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["10", "1"]
    table = pd.read_parquet(tmp_path / "out")
    for row in table.itertuples():
        pixels = decode(Path(row.image_id).read_bytes(), Embedder.transform, exact=False).pixels
        assert row.brightness == pytest.approx(pixels.mean(), abs=0.01)
    errors = pd.read_parquet(tmp_path / "out" / "_errors")
    assert errors[["stage", "error_type", "message"]].values.tolist() == [
        ["predict", "failed", f"RuntimeError: too bright ({script}:7)"]
    ]
