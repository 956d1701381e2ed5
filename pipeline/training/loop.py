"""Fine-tuning in one worker: the classifier alone, then all layers, until the hold-out gets no better.

The loop is plain PyTorch. Several workers each compute a share of each batch, and average their gradients.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from pipeline.errors import NightshiftError
from pipeline.inference.normalize import FromPixels
from pipeline.inference.session import choose_dtype
from pipeline.models.record import state_of
from pipeline.models.spec import ModelSpec, build_for
from pipeline.training.augment import Batches, Crops, centres, seed_of
from pipeline.training.decoded import open_pixels
from pipeline.training.fit import best_temperature, log_loss
from pipeline.training.history import ALL, FROZEN, Epoch, write_history

HEAD_FACTOR = 10.0
"""Learning rate of the classifier, as a multiple of that of the last layers, divided by the mean squared length of its
inputs: a step then changes the logits alike for all networks."""
DEPTH_GROUPS, DEPTH_FACTOR = 4, 0.5
"""The layers before the classifier are four groups by depth. Each group learns half as fast as the one after it."""
MOMENTUM = 0.9
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises. It then falls along a cosine."""
MAX_GRADIENT_NORM = 1.0
TEST_BATCH_SIZE = 64
LOADERS = 4
"""Processes that augment images for one GPU."""
RESULT = "result.pt"


class Worker(Protocol):
    """One of the processes of a training.

    rank: from 0. workers: number of processes. cores: of the CPU, for this one. device: of its network.
    """

    rank: int
    workers: int
    cores: int
    device: torch.device

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module with the gradients averaged over all workers."""

    def latest(self) -> AbstractContextManager[Path | None]:
        """The state that was saved last, None at the start."""

    def report(self, epoch: Epoch, save: Callable[[Path], None]) -> None:
        """End an epoch. save: writes the state, in the worker of rank 0."""


@dataclass(frozen=True)
class LoopSettings:
    """The settings of the loop; see `FinetuneConfig`. batch_size: images of all workers together."""

    augment: str = "photo"
    epochs: int = 20
    frozen_epochs: int = 2
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    patience: int = 5
    batch_size: int = 32
    seed: int = 0
    precision: str = "auto"


@dataclass(frozen=True)
class Task:
    """Everything that a worker needs. Picklable.

    file, shape, dtype: of the pixels, as in `open_pixels`. rows: the labelled images among them [M]. targets: class of
    each [M]. fit, stop: positions in `rows` of the images to train on, and of those that end the training.
    weights: of the classes [C]. start: weight [C, dim] and bias [C] of the classifier. square: mean squared length of
    its inputs.
    folder: where the worker of rank 0 writes its result.
    """

    spec: ModelSpec
    file: str
    shape: tuple[int, int, int, int]
    dtype: str
    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    fit: NDArray[np.int64]
    stop: NDArray[np.int64]
    weights: NDArray[np.float32]
    start: tuple[NDArray[np.float32], NDArray[np.float32]]
    square: float
    folder: str
    settings: LoopSettings


def train(task: Task, worker: Worker) -> None:
    """Train to the end, or from the state that was saved last to the end, and write RESULT.

    Raises NightshiftError if the loss is not finite.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.set_num_threads(worker.cores)
    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)  # several workers of a machine may see all of its GPUs
    training = _Training(task, worker)
    with worker.latest() as saved:
        if saved:
            training.load(saved)
    if not training.history:
        training.start()
    training.run()
    training.finish()


def features_of(
    spec: ModelSpec, file: str, shape: tuple[int, int, int, int], dtype: str, rows: Sequence[int]
) -> NDArray[np.float32]:
    """The embeddings of the network as it is, float32 [N, dim], of the centres of images.

    Computed on a GPU if this process has one, and otherwise on all cores.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels = open_pixels(file, shape, dtype)
    network = FromPixels(build_for(spec, 1), spec, torch.float32).to(device).eval()
    parts = [np.empty((0, spec.embedding_dim), np.float32)]
    with torch.inference_mode():
        for some in _pieces(rows):
            parts.append(network(centres(pixels, some, spec.transform.crop).to(device))[0].cpu().numpy())
    return np.concatenate(parts)


class _Training:
    """The state of a training: the network, the best one so far, the optimizer, and the history."""

    def __init__(self, task: Task, worker: Worker) -> None:
        self.task, self.worker, self.settings = task, worker, task.settings
        self.pixels = open_pixels(task.file, task.shape, task.dtype)
        self.network = build_for(task.spec, len(task.weights))
        self.module = FromPixels(self.network, task.spec, torch.float32).to(worker.device)
        self.targets = dict(zip(task.rows.tolist(), task.targets.tolist(), strict=True))
        self.weights = torch.from_numpy(task.weights).to(worker.device)
        self.history: list[Epoch] = []
        self.best: dict[str, Tensor] = {}
        self.saved_optimizer: dict[str, Any] = {}
        dtype = choose_dtype(self.settings.precision, worker.device)
        self.mixed = dtype is torch.bfloat16
        fit_rows = task.rows[task.fit].tolist()
        self.batches = Batches(fit_rows, self.settings.batch_size, self.settings.seed, worker.rank, worker.workers)
        self.loader = self._loader()

    def _loader(self) -> "DataLoader[tuple[Tensor, int]]":
        is_gpu = self.worker.device.type == "cuda"
        crops = Crops(self.pixels, self.settings.augment, self.task.spec.transform.crop, self.settings.seed)
        loaders = LOADERS if is_gpu else 0
        return DataLoader(
            crops, batch_sampler=self.batches, num_workers=loaders, persistent_workers=loaders > 0, pin_memory=is_gpu
        )

    def start(self) -> None:
        """Give the classifier its first weights, and test it."""
        weight, bias = (torch.from_numpy(each).to(self.worker.device) for each in self.task.start)
        layer: Any = self.network.classifier
        with torch.no_grad():
            layer.weight.copy_(weight.reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(bias)
        self._end_epoch(FROZEN, None, 0.0, 0.0, None)

    def load(self, path: Path) -> None:
        """Continue from a state that `save` wrote."""
        state = torch.load(path, map_location=self.worker.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.best, self.saved_optimizer = state["best"], state["optimizer"]
        self.history = [Epoch(**each) for each in state["history"]]

    def save(self, path: Path, optimizer: "_Optimizer | None") -> None:
        """Write the state after an epoch."""
        state = {
            "module": self.module.state_dict(),
            "best": self.best,
            "optimizer": optimizer.state() if optimizer else {},
            "history": [asdict(each) for each in self.history],
        }
        torch.save(state, path)

    def run(self) -> None:
        """The epochs that are left of both phases."""
        for phase, first, count in (
            (FROZEN, 1, self.settings.frozen_epochs),
            (ALL, 1 + self.settings.frozen_epochs, self.settings.epochs),
        ):
            done = self.history[-1].number
            if done < first + count - 1 and not self.is_over():
                self._run_phase(phase, range(max(first, done + 1), first + count), count)

    def is_over(self) -> bool:
        """Whether the images that end the training have been worse than the best epoch for `patience` epochs."""
        last, best = self.history[-1], max(each.number for each in self.history if each.is_best)
        return last.phase == ALL and last.number - max(best, self.settings.frozen_epochs) >= self.settings.patience

    def _run_phase(self, phase: str, numbers: range, count: int) -> None:
        optimizer = _Optimizer(self.module, phase, self.settings, count * len(self.batches), self.task.square)
        if self.history[-1].phase == phase and self.history[-1].number:
            optimizer.load(self.saved_optimizer)
        parallel = self.worker.parallel(self.module)
        for number in numbers:
            started = time.monotonic()
            loss = self._epoch(number, phase, parallel, optimizer)
            self._end_epoch(phase, loss, optimizer.learning_rate, time.monotonic() - started, optimizer)
            if self.is_over():
                return

    def _epoch(self, number: int, phase: str, parallel: nn.Module, optimizer: "_Optimizer") -> float:
        """Train on all images once. Returns the mean loss."""
        torch.manual_seed(seed_of(self.settings.seed, number, self.worker.rank))  # of dropout
        self.module.train(phase == ALL)
        _keep_running_means(self.module)
        self.batches.epoch = number
        total = torch.zeros((), device=self.worker.device)
        for whole, (pixels, rows) in zip(self.batches.whole(), self.loader, strict=True):
            target = torch.tensor([self.targets[row] for row in rows.tolist()], device=self.worker.device)
            all_targets = torch.tensor([self.targets[row] for row in whole.tolist()], device=self.worker.device)
            with self._autocast():
                _, logits = parallel(pixels.to(self.worker.device, non_blocking=True))
            losses = functional.cross_entropy(
                logits, target, self.weights, reduction="none", label_smoothing=self.settings.label_smoothing
            )
            share = losses.sum() / self.weights[all_targets].sum()  # of the mean loss of the batch
            optimizer.step(share * self.worker.workers)  # since gradients are averaged over the workers
            total += share.detach()
        mean: float = sum(self._gathered(float(total))) / len(self.batches)
        if not math.isfinite(mean):
            raise NightshiftError(
                f"the loss of epoch {number} is {mean}: start again with a smaller --learning-rate than "
                f"{self.settings.learning_rate:g}, or with --precision float32"
            )
        return mean

    def _end_epoch(
        self, phase: str, loss: float | None, rate: float, seconds: float, optimizer: "_Optimizer | None"
    ) -> None:
        """Test the network, and save the state."""
        logits = self.logits(self.task.rows[self.task.stop])
        classes = self.task.targets[self.task.stop]
        targets = np.eye(len(self.task.weights), dtype=np.float32)[classes]
        stop_loss = log_loss(logits, targets, best_temperature(logits, targets, multi_label=False), multi_label=False)
        is_best = all(stop_loss < each.stop_loss for each in self.history)
        if is_best:
            self.best = {name: each.detach().clone() for name, each in self.module.state_dict().items()}
        accuracy = float((logits.argmax(axis=1) == classes).mean())
        self.history.append(Epoch(len(self.history), phase, loss, stop_loss, accuracy, is_best, rate, seconds))
        self.worker.report(self.history[-1], lambda path: self.save(path, optimizer))
        if not self.worker.rank:
            write_history(Path(self.task.folder), self.history)

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [N, C] of images. Each worker computes a share of them."""
        self.module.eval()
        own = rows[self.worker.rank :: self.worker.workers].tolist()
        parts = [np.empty((0, len(self.task.weights)), np.float32)]
        with torch.inference_mode():
            for some in _pieces(own):
                images = centres(self.pixels, some, self.task.spec.transform.crop)
                _, logits = self.module(images.to(self.worker.device))
                parts.append(logits.cpu().numpy())
        whole = np.empty((len(rows), len(self.task.weights)), np.float32)
        for rank, part in enumerate(self._gathered(np.concatenate(parts))):
            whole[rank :: self.worker.workers] = part
        return whole

    def finish(self) -> None:
        """Write the network of the best epoch, and its logits of all images."""
        self.module.load_state_dict(self.best)
        logits = self.logits(self.task.rows)
        if self.worker.rank:
            return
        state = {name: each.cpu() for name, each in state_of(self.network, self.task.spec.head).items()}
        history = [asdict(each) for each in self.history]
        path = Path(self.task.folder) / RESULT
        torch.save({"state": state, "logits": torch.from_numpy(logits), "history": history}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def _gathered(self, value: Any) -> list[Any]:
        """The values of all workers, by rank."""
        if self.worker.workers == 1:
            return [value]
        values: list[Any] = [None] * self.worker.workers
        distributed.all_gather_object(values, value)
        return values

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.worker.device.type, torch.bfloat16) if self.mixed else nullcontext()


class _Optimizer:
    """SGD on the classifier or on all layers, with a learning rate that depends on the depth and on the step.

    The classifier starts at its optimum, where gradients are small. Adam scales them up, and would leave it at once.
    """

    def __init__(self, module: FromPixels, phase: str, settings: LoopSettings, steps: int, square: float) -> None:
        assert module.network.classifier is not None
        head = list(module.network.classifier.parameters())
        own = {id(each) for each in head}
        body = [each for each in module.parameters() if id(each) not in own]
        for each in body:
            each.requires_grad_(phase == ALL)
        groups = [{"params": head, "lr": settings.learning_rate * HEAD_FACTOR / max(square, 1e-3)}]
        if phase == ALL:
            groups += by_depth(body, settings.learning_rate)
        self.parameters = [each for group in groups for each in group["params"]]  # type: ignore[attr-defined]
        self.sgd = torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True, weight_decay=settings.weight_decay)
        self.schedule = LambdaLR(self.sgd, lambda step: rate_factor(step, steps))

    @property
    def learning_rate(self) -> float:
        """Of the classifier, at the next step."""
        return float(self.sgd.param_groups[0]["lr"])

    def step(self, loss: Tensor) -> None:
        self.sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        self.sgd.step()
        self.schedule.step()

    def state(self) -> dict[str, Any]:
        return {"sgd": self.sgd.state_dict(), "schedule": self.schedule.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.sgd.load_state_dict(state["sgd"])
        self.schedule.load_state_dict(state["schedule"])


def _keep_running_means(module: nn.Module) -> None:
    """Let batch normalisation use the means of the pretraining: those of few small batches would harm the network."""
    for each in module.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            each.eval()


def rate_factor(step: int, steps: int) -> float:
    """Share of the learning rate at a step: it rises linearly over WARM_UP of the steps, then falls along a cosine."""
    rise = math.ceil(WARM_UP * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def by_depth(parameters: Sequence[nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
    """Groups of parameters, in the order of the layers, with the learning rate of each; the last has the highest."""
    size = -(-len(parameters) // DEPTH_GROUPS) or 1
    parts = [list(parameters[first : first + size]) for first in range(0, len(parameters), size)]
    return [
        {"params": part, "lr": learning_rate * DEPTH_FACTOR ** (len(parts) - 1 - number)}
        for number, part in enumerate(parts)
    ]


def _pieces(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    return (rows[first : first + TEST_BATCH_SIZE] for first in range(0, len(rows), TEST_BATCH_SIZE))
