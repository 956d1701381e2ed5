"""How the stages share a cluster. Arithmetic only, without Ray."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.errors import SettingRefused
from pipeline.predictors.base import Allotment

MAX_DECODE_THREADS = 8
CPUS_PER_WRITER = 4  # starting one more costs a laptop more than it saves
GPU_BATCH_SIZE, CPU_BATCH_SIZE = 256, 64
ACTOR_SHARE = 0.95
"""Ray fuses stages with equal resource requests, and then runs them in turn; actors ask for slightly less than readers,
so that it does not."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Logical CPUs and GPUs of each stage, which add up to no more than the cluster has.

    Without GPUs the network gets threads on every core: Ray's numbers then only say how many stages run side by side,
    and the operating system shares the cores between decoding and the network. If machines of unknown size are yet to
    come, each actor has one thread and asks for a core of its own.

    actors: (least, most). actor_threads: None for all cores of a machine.
    """

    cpus: float
    read_cpus: float
    actors: tuple[int, int]
    actor_cpus: float
    actor_gpus: float
    actor_threads: int | None
    writers: int

    @staticmethod
    def of(config: RunConfig, cpus: float, node_gpus: Sequence[float], grows: bool = False) -> "Allocation":
        """For a cluster with so many logical CPUs.

        node_gpus: logical GPUs of each machine; the GPUs of one actor are on one machine.
        grows: an autoscaler adds machines for waiting actors.
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
            return Allocation(cpus, 1.0, asked or (room, room), 0.0, share, None, writers)
        actors = asked or (max(1, int(cpus) // 4),) * 2
        if more_to_come and (not cpus or actors[0] < actors[1]):
            return Allocation(cpus, 1.0, actors, ACTOR_SHARE, 0.0, 1, writers)
        read_cpus = min(1.0, cpus / 2)
        actor_cpus = min(1.0, (cpus - read_cpus) / actors[1])
        if actor_cpus < 0.01:
            raise SettingRefused(f"--actors {config.actors} does not fit: the cluster has {cpus:g} CPUs; ask for fewer")
        actor_cpus = math.floor(actor_cpus * ACTOR_SHARE * 100) / 100
        return Allocation(cpus, read_cpus, actors, actor_cpus, 0.0, max(1, int(cpus) // actors[1]), writers)

    def assign(self, batch_size: int | None, images: int | None = None) -> Allotment:
        """What each actor gets. batch_size: None to choose one. images: expected by all actors together."""
        chosen = batch_size or (GPU_BATCH_SIZE if self.actor_gpus else CPU_BATCH_SIZE)
        expected = None if images is None else images // self.actors[1]
        return Allotment(self.actor_threads, chosen, self.actor_gpus, expected)

    def read_tasks(self, units: int) -> tuple[int, int]:
        """(read tasks that run at once beside the actors, decode threads of each), for so many units of work.

        The threads are one per core, also of cores that actors have: a network that is waited for needs all cores, and
        one that waits needs none.
        """
        free = self.cpus - self.actors[1] * self.actor_cpus
        if free < 0:  # more actors than there is room for yet
            free = self.cpus
        tasks = max(1, min(units, int(free / self.read_cpus)))
        return tasks, max(1, min(MAX_DECODE_THREADS, int(self.cpus) // tasks))


def _actors_on(node_gpus: Sequence[float], share: float) -> int:
    """How many actors find room. Actors that share a GPU have their share of the same one."""
    if share <= 1:
        return sum(int(gpus) * int(1 / share + 1e-9) for gpus in node_gpus) if share else 0
    return sum(int(gpus // share) for gpus in node_gpus)


def _check(
    config: RunConfig, cpus: float, gpus: float, share: float, room: int, grows: bool, more_to_come: bool
) -> None:
    remedy = "; set --actors MIN:MAX to say for how many actors it may start machines" if grows else ""
    if share and not room and not more_to_come:
        apart = ", but no machine has as many" if share <= gpus else ""
        raise SettingRefused(f"--gpus-per-actor is {share:g}, and the cluster has {gpus:g} GPUs{apart}{remedy}")
    if not cpus and not more_to_come:
        raise SettingRefused(f"nothing can be read: the cluster has 0 CPUs{remedy}")
    if config.decoder == "gpu" and not share:
        raise SettingRefused(
            f"--decoder gpu decodes on the network's GPU, and the network has none: the cluster has {gpus:g} GPUs, "
            f"--gpus-per-actor is {config.gpus_per_actor}; use --decoder fast"
        )
