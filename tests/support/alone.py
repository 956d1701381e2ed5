"""A training without Ray: one worker in this process, whose states are files."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.engine import cluster, trainer


class Killed(Exception):
    """The worker ended in mid-training."""


class Alone:
    """The only worker of a training. dies_after: epoch after whose state it is killed."""

    rank, workers, cores = 0, 1, 2
    device = torch.device("cpu")

    def __init__(self, folder: Path, dies_after: int | None = None) -> None:
        self.folder, self.dies_after = folder, dies_after
        self.epochs: list[int] = []

    def parallel(self, module: nn.Module) -> nn.Module:
        return module

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        path = self.folder / "state.pt"
        yield path if path.exists() else None

    def report(self, epoch: Any, save: Callable[[Path], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self.folder / "new.pt")
        shutil.move(self.folder / "new.pt", self.folder / "state.pt")
        self.epochs.append(epoch.number)
        if epoch.number == self.dies_after:
            raise Killed


def without_ray(monkeypatch: pytest.MonkeyPatch, dies_after: int | None = None) -> None:
    """Let `finetune` train in this process."""

    def train(loop: Callable[..., None], task: Any, *, folder: str, poll: Callable[[], None], **_: Any) -> None:
        loop(task, Alone(Path(folder), dies_after))
        poll()

    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(trainer, "resources", lambda: (2, 0))
    monkeypatch.setattr(trainer, "on_worker", lambda function, *arguments, gpu: function(*arguments))
    monkeypatch.setattr(trainer, "train", train)
