"""How the stages share a cluster. Arithmetic only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from pipeline.errors import SettingRefused

if TYPE_CHECKING:
    from pipeline.predictors import Predictor

MAX_DECODE_THREADS = 8
CPUS_PER_WRITER = 4  # one more costs a laptop more to start than it saves
ACTOR_SHARE = 0.95
"""An actor asks for a little less than a reader: stages that ask for the same Ray makes one, and runs both in turn."""


@dataclass(frozen=True, slots=True)
class Layout:
    """CPUs are Ray's logical ones; the numbers add up to no more than there are.

    On CPUs alone the network gets every core's threads: Ray's numbers then only say how many stages run side by side,
    and the operating system shares the cores between decoding and the network. Where machines of unknown size are yet
    to come, each actor has one thread and asks for a core of its own.
    """

    cpus: float
    read_cpus: float
    actors: tuple[int, int]
    actor_cpus: float
    actor_gpus: float
    actor_threads: int | None
    writers: int

    @staticmethod
    def of(config: RunConfig, cpus: float, node_gpus: Sequence[float], grows: bool = False) -> "Layout":
        """For a cluster of so many logical CPUs. grows: an autoscaler adds nodes where actors ask for them.

        node_gpus: logical GPUs of each machine: an actor has all of its own on one.
        Raises SettingRefused for what does not fit.
        """
        asked, share, gpus = config.actor_range(), config.gpu_share(), sum(node_gpus)
        if share is None:
            share = 1.0 if gpus >= 1 else 0.0
        more_to_come = grows and asked is not None
        room = _actors_on(node_gpus, share)
        _check(config, cpus, gpus, share, room, grows, more_to_come)
        writers = max(1, int(cpus) // CPUS_PER_WRITER)
        if asked and more_to_come:
            writers = max(writers, asked[1])
        if share:
            return Layout(cpus, 1.0, asked or (room, room), 0.0, share, None, writers)
        actors = asked or (max(1, int(cpus) // 4),) * 2
        if more_to_come and (not cpus or actors[0] < actors[1]):
            return Layout(cpus, 1.0, actors, ACTOR_SHARE, 0.0, 1, writers)
        read_cpus = min(1.0, cpus / 2)
        actor_cpus = min(1.0, (cpus - read_cpus) / actors[1])
        if actor_cpus < 0.01:
            raise SettingRefused(f"--actors {config.actors} does not fit: the cluster has {cpus:g} CPUs; ask for fewer")
        actor_cpus = math.floor(actor_cpus * ACTOR_SHARE * 100) / 100
        return Layout(cpus, read_cpus, actors, actor_cpus, 0.0, max(1, int(cpus) // actors[1]), writers)

    def fit(self, predictor: "Predictor", batch_size: int | None) -> int:
        """Tell a predictor what each of its actors gets; returns the images a batch, where None are asked for too."""
        chosen = batch_size or (256 if self.actor_gpus else 64)
        predictor.threads, predictor.batch_size = self.actor_threads, chosen
        predictor.gpu_share = self.actor_gpus
        return chosen

    def read_tasks(self, units: int) -> tuple[int, int]:
        """How many run at once beside the actors, with so many units of work, and the decode threads of each: together
        one a core, also where actors take some of them, since a network that is waited for needs them all, and one that
        waits needs none."""
        free = self.cpus - self.actors[1] * self.actor_cpus
        if free < 0:  # more actors than there is room for yet
            free = self.cpus
        tasks = max(1, min(units, int(free / self.read_cpus)))
        return tasks, max(1, min(MAX_DECODE_THREADS, int(self.cpus) // tasks))


def _actors_on(node_gpus: Sequence[float], share: float) -> int:
    """How many actors find room; those that share a GPU have their share of the same one."""
    if share <= 1:
        return sum(int(gpus) * int(1 / share + 1e-9) for gpus in node_gpus) if share else 0
    return sum(int(gpus // share) for gpus in node_gpus)


def _check(
    config: RunConfig, cpus: float, gpus: float, share: float, room: int, grows: bool, more_to_come: bool
) -> None:
    remedy = "; say with --actors MIN:MAX how many actors it may start machines for" if grows else ""
    if share and not room and not more_to_come:
        apart = ", on no machine as many" if share <= gpus else ""
        raise SettingRefused(f"--gpus-per-actor is {share:g}, and the cluster has {gpus:g} GPUs{apart}{remedy}")
    if not cpus and not more_to_come:
        raise SettingRefused(f"nothing can be read: the cluster has 0 CPUs{remedy}")
    if config.decoder == "gpu" and not share:
        raise SettingRefused(
            f"--decoder gpu decodes on the network's GPU, and the network has none: the cluster has {gpus:g} GPUs, "
            f"--gpus-per-actor is {config.gpus_per_actor}; take --decoder fast"
        )
