"""Ray Train runs a training loop on some workers, and continues it from its last saved state."""

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.train
import ray.train.torch

from pipeline.engine import cluster
from pipeline.engine.flow import unwrap_ray_errors
from pipeline.errors import NightshiftError, SettingRefused, message_line
from pipeline.threads import in_background

STATE = "state.pt"
POLL_SECONDS = 0.5
MAX_FAILURES = 3
"""Workers that may be lost in a training, on spot machines for example."""

R = TypeVar("R")


def resources() -> tuple[int, int]:
    """CPUs and GPUs of the cluster that Ray is connected to."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return (int(sum(each.get("CPU", 0) for each in alive)), int(sum(each.get("GPU", 0) for each in alive)))


def check(workers: int, *, gpu: bool) -> None:
    """Raise SettingRefused if the cluster has no room for so many workers, and no autoscaler that makes room."""
    cpus, gpus = resources()
    have, what = (gpus, "GPUs") if gpu else (cpus, "CPUs")
    if workers > have and not cluster.cluster_grows():
        raise SettingRefused(f"--workers is {workers}, and the cluster has {have} {what}: ask for at most {have}")


def on_worker(function: Callable[..., R], *arguments: Any, gpu: bool) -> R:
    """Call a function in a process of the cluster, with a GPU or without."""
    remote = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=MAX_FAILURES)(function)
    with unwrap_ray_errors():
        result: R = ray.get(remote.remote(*arguments))
    return result


def train(
    loop: Callable[[Any, Any], None],
    task: Any,
    *,
    workers: int,
    gpu: bool,
    folder: str,
    name: str,
    poll: Callable[[], None],
) -> None:
    """Run `loop(task, worker)` on some workers, from the last state of an earlier training with this name.

    worker: a `RayWorker`. folder: for states; with several machines one that all of them share. poll: called from time
    to time. Raises the NightshiftError of a worker.
    """
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"loop": loop, "task": task},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=folder,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    done: Future[Any] = Future()
    in_background(lambda: _fit(trainer, done))  # in the main thread Ray would take over SIGINT
    try:
        while True:
            poll()
            try:
                done.result(POLL_SECONDS)
                break
            except TimeoutError:
                if done.done():
                    raise
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    poll()


def _fit(trainer: Any, done: "Future[Any]") -> None:
    try:
        done.set_result(trainer.fit())
    except BaseException as error:
        done.set_exception(error)


def _cause(error: Any) -> Exception:
    """The NightshiftError of a worker, or another error with its reason."""
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    for failure in failures:
        cause: Any = failure
        while cause is not None:
            if isinstance(cause, NightshiftError):
                return cause
            cause = getattr(cause, "_base_exc", None) or getattr(cause, "cause", None) or cause.__cause__
    reason = message_line(failures[0])
    return NightshiftError(f"the training failed: {reason}; run the same command again to continue, or see Ray's logs")


def _work(config: dict[str, Any]) -> None:
    """Runs in each worker of Ray Train."""
    worker = RayWorker()
    config["loop"](config["task"], worker)


class RayWorker:
    """One worker of a training; see `pipeline.training.loop.Worker`."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.workers = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.cores = max(1, (os.cpu_count() or 1) // context.get_local_world_size())

    def parallel(self, module: Any) -> Any:
        """The module with the gradients averaged over all workers."""
        return ray.train.torch.prepare_model(module, move_to_device=False)

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """The state that was saved last, None at the start."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder) / STATE

    def report(self, epoch: Any, save: Callable[[Path], None]) -> None:
        """End an epoch, and save the state in the worker of rank 0."""
        figures = {"epoch": epoch.number, "stop_loss": epoch.stop_loss, "accuracy": epoch.accuracy}
        if self.rank:
            ray.train.report(figures)
            return
        with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
            save(Path(folder) / STATE)
            ray.train.report(figures, checkpoint=ray.train.Checkpoint.from_directory(folder))
