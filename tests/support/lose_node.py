"""Run a job on three nodes, remove one of them and add another. test_faults runs it in its own process.

    python tests/support/lose_node.py INPUT OUTPUT

The head node has only CPUs, so reading and writing run there; the models run on logical GPUs of the two others.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from ray.cluster_utils import Cluster

STORE_BYTES = 100 << 20
SETTINGS = "--model tiny:slow_network --weights random --precision float32 --batch-size 8 --rows-per-part 16"


def main() -> int:
    source, output = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": STORE_BYTES})
    workers = [cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE_BYTES) for _ in range(2)]
    command = [sys.executable, "jobs/embed.py", "--input", source, "--output", output, *SETTINGS.split()]
    job = subprocess.Popen([*command, "--actors", "1:2"], env={**os.environ, "RAY_ADDRESS": cluster.address})
    while job.poll() is None and len(list(Path(output).glob("_commits/*.json"))) < 3:
        time.sleep(0.1)
    cluster.remove_node(workers[0], allow_graceful=False)
    print(f"lost a node, the job {'continues' if job.poll() is None else 'has ended'}", flush=True)
    cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE_BYTES)
    print(f"another node joined, the job {'continues' if job.poll() is None else 'has ended'}", flush=True)
    code = job.wait()
    cluster.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main())
