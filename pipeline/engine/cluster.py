"""The connection to Ray, and the resources of its cluster."""

import logging
import os
import socket
from typing import Any

import ray
from ray.autoscaler.v2.utils import is_autoscaler_v2

from pipeline.config import RunConfig
from pipeline.engine import interrupts
from pipeline.engine.allocation import Allocation
from pipeline.errors import NightshiftError, SettingRefused, message_line
from pipeline.stages.load import MIN_DECODE_BYTES

LOCAL = "local"
CONNECT_TIMEOUT_SECONDS = 10
DECODE_SHARE = 0.5  # of a node's memory, for pixels that its read tasks are decoding


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (as `ray job submit` does), else start one on this machine. Quietly.

    Not with `ray.init()`'s own search for a cluster: it would join any other job of this machine, and end with it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray ends a worker that is idle for a second if there are more than cores; the next part would wait for a new one.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    if not ray.is_initialized():
        _init(os.environ.get("RAY_ADDRESS", LOCAL))
        interrupts.catch_again()  # Ray has set handlers of its own


def _init(address: str) -> None:
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    if address == LOCAL:
        _start(quiet)
        return
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit() and "://" not in address:
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_SECONDS).close()  # Ray would wait for ever
        ray.init(address=address, **quiet)
    except OSError as error:  # ConnectionError among them
        raise SettingRefused(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error
    except ValueError as error:
        raise SettingRefused(
            f"RAY_ADDRESS is {address!r}: it is HOST:PORT of a cluster's GCS, auto, or local"
        ) from error
    except RuntimeError as error:  # another version of Ray or of Python, in several lines
        raise SettingRefused(f"RAY_ADDRESS={address}: {' '.join(str(error).split())}") from error


def _start(quiet: dict[str, Any]) -> None:
    try:
        ray.init(address=LOCAL, include_dashboard=False, **quiet)
    except Exception as error:  # of many classes, Exception itself among them
        raise NightshiftError(
            f"Ray did not start on this machine: {message_line(error)}; if the machine is overloaded or short of "
            "memory or disk space, run the same command again later"
        ) from error


def allocate(config: RunConfig) -> Allocation:
    """Share the cluster that Ray is connected to among the stages. Raises SettingRefused for what does not fit."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = sum(each.get("CPU", 0.0) for each in resources)
    return Allocation.of(config, cpus, [each.get("GPU", 0.0) for each in resources], cluster_grows())


def decode_bytes(read_cpus: float) -> int:
    """Bytes that one read task may decode at once, on the node with the least memory per CPU."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    per_cpu = [node["memory"] / node["CPU"] for node in nodes if node.get("CPU") and "memory" in node]
    return max(MIN_DECODE_BYTES, int(DECODE_SHARE * read_cpus * min(per_cpu, default=0)))


def cluster_grows() -> bool:
    """Whether an autoscaler adds nodes to this cluster. Knows version 2, which `ray up` and infra/kuberay use."""
    return bool(is_autoscaler_v2(fetch_from_server=True))
