"""Decoding and the network sized apart: a job on machines with CPUs only and one with a (logical) GPU.

The images come from a server that counts them, so what has been read is known whatever the workers do.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from whole import ROOT, jpeg, wait_for

SHARDS, IMAGES_A_SHARD = 4, 400
SIDE = 448
STORE_BYTES, MACHINES = 100 << 20, 3
STILL_SECONDS = 8.0

JOB = f"""
import os
import sys
import time
from pathlib import Path
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster
from pipeline import Predictor, run, RunConfig, Transform

class Held(Predictor):
    '''Predicts nothing before it is released.'''

    transform = Transform(resize={SIDE}, crop={SIDE})
    columns = pa.schema([("first", pa.uint8())])

    def __init__(self, release):
        self.release = release

    def predict(self, pixels):
        while not Path(self.release).exists():
            time.sleep(0.05)
        return {{"first": pixels[:, 0, 0, 0].copy()}}

store = {{"object_store_memory": {STORE_BYTES}}}
cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 2, **store}})
cluster.add_node(num_cpus=1, **store)
cluster.add_node(num_cpus=1, num_gpus=1, **store)
os.environ["RAY_ADDRESS"] = cluster.address
release, output, *lists = sys.argv[1:]
report = run(RunConfig(input=lists, output=output, batch_size=8), Held(release))
print(report.rows, report.errors)
ray.shutdown()
cluster.shutdown()
"""


@dataclass
class Server:
    """Holds back the first image of each shard until all of them are requested; counts its responses."""

    first: threading.Barrier = field(default_factory=lambda: threading.Barrier(SHARDS, timeout=60))
    given: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def give(self, path: str) -> bool:
        if path.endswith("/0.jpg"):
            try:
                self.first.wait()
            except threading.BrokenBarrierError:
                return False
        with self.lock:
            self.given.add(path)
        return True


@pytest.fixture
def web() -> Iterator[tuple[str, Server]]:
    counted, image = Server(), jpeg(0)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if counted.give(self.path) else 404)
            self.send_header("Content-Length", str(len(image)))
            self.end_headers()
            self.wfile.write(image)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", counted
    server.shutdown()


@pytest.mark.long
def test_decoding_takes_every_cpu_and_waits_for_the_network(web: tuple[str, Server], tmp_path: Path) -> None:
    address, server = web
    lists = [tmp_path / f"{shard}.txt" for shard in range(SHARDS)]
    for shard, path in enumerate(lists):
        path.write_text("".join(f"{address}/{shard}/{i}.jpg\n" for i in range(IMAGES_A_SHARD)))
    release = tmp_path / "release"
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, str(release), str(tmp_path / "output"), *map(str, lists)],
        env={**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: len(server.given) >= SHARDS or server.first.broken or job.poll() is not None)
        assert not server.first.broken, "fewer shards were read at a time than there are CPUs on the three machines"
        wait_for(lambda: is_still(server) or job.poll() is not None)
        waiting = len(server.given)
        release.touch()
        out, err = job.communicate(timeout=200)
    finally:
        job.kill()
    assert job.returncode == 0, err
    assert out.split()[-2:] == [str(SHARDS * IMAGES_A_SHARD), "0"]
    assert waiting * SIDE**2 * 3 < MACHINES * STORE_BYTES, "decoding went on although nothing was predicted"


def is_still(server: Server) -> bool:
    """Whether reading has stopped."""
    before = len(server.given)
    time.sleep(STILL_SECONDS)
    return len(server.given) == before
