"""A job on three nodes of which one is lost and another comes: run by test_faults in a process of its own.

    python tests/lose_node.py INPUT OUTPUT

The head has CPUs only, so reading and writing go there; the models sit on logical GPUs of the two others.
"""

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

STORE_BYTES = 100 << 20


def main() -> int:
    source, output = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": STORE_BYTES})
    workers = [cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE_BYTES) for _ in range(2)]
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    from jobs import embed

    def pre_empt() -> None:
        while len(list(Path(output).glob("_commits/*.json"))) < 3:
            time.sleep(0.1)
        for node in workers:
            with contextlib.suppress(ValueError):  # the one that this driver is connected to may not be lost
                cluster.remove_node(node, allow_graceful=False)
                break
        print("lost a node", flush=True)
        cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE_BYTES)
        print("another one came", flush=True)

    pre_emption = threading.Thread(target=pre_empt)
    pre_emption.start()
    settings = "--model tiny:slow_network --weights random --precision float32 --batch-size 8 --rows-per-part 16"
    code = embed.main(["--input", source, "--output", output, *settings.split(), "--actors", "1:2"])
    pre_emption.join()
    ray.shutdown()
    cluster.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main())
