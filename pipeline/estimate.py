"""How long a job will take on a cluster, what it will cost, and what holds it up. Arithmetic only.

Every resource of a cluster allows so many images a second; the least of them is the job's speed. What one image costs
is measured on a sample (`pipeline.sample`), on a core of the machine at hand: cores elsewhere are taken to be as fast.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.errors import SettingRefused
from pipeline.machines import REFERENCE, Cluster, Machine, Prices

STARTUP_SECONDS = 15.0
"""Ray, its workers and the network, until the first image; `jobs/benchmark.py` has it as start-up."""

RAY_CORE_SECONDS_PER_IMAGE = 3e-4
RAY_CORE_SECONDS_PER_PIXEL_BYTE = 1.6e-8
"""What Ray, its daemons and the driver take beside the stages: what jobs with a network that does nothing took on two
cores and the stages alone did not, 2.5 to 3.2 core-ms an image of 224 × 224 and 0.2 to 0.5 a tile of 64 × 64.
`jobs/bench_estimate.py` tells how far off they are."""

RAY_SHARE_OF_READERS = 0.6
"""Of that, what the read tasks themselves have to do."""

RESNET50_FLOPS = 8.18e9
"""Of one image of 224 × 224, a multiply-add as two."""

WORTH_A_CHANGE = 0.95
"""A shape of cluster that costs more than this share of the given one is not called better."""

CPU, READERS, ACTORS, GPU, NETWORK_CARDS, STORE = "CPUs", "readers", "actors", "GPUs", "network cards", "store"
EXPLAINED = {
    CPU: "all cores are busy",
    READERS: "no more read tasks run at once: by their CPUs, or since there are too few shards",
    ACTORS: "the model actors are busy; not all cores work for them",
    GPU: "all GPUs are busy, CPUs wait for them",
    NETWORK_CARDS: "what the machines' network cards carry: images in, pixels to the GPUs, results out",
    STORE: "the store answers no faster, as measured from this machine",
}


@dataclass(frozen=True, slots=True)
class Costs:
    """What one image costs on average.

    read, decode, write, predict: core-seconds; predict: of the network on a CPU. predict_seconds: wall time of one
    actor for it, which kept predict_cores cores busy. Where the network ran on a GPU these three say nothing of CPUs.
    read_seconds: wall time of one stream of reading, load_seconds: of one that also decodes, on one thread.
    gpu_seconds: by the name of a GPU, where measured.
    flops: of the network, a multiply-add as two; None where nobody has counted them.
    encoded_bytes: as stored. pixel_bytes: as sent to the network. result_bytes: as written.
    """

    read: float
    decode: float
    write: float
    predict: float
    read_seconds: float
    load_seconds: float
    predict_seconds: float
    encoded_bytes: float
    pixel_bytes: float
    result_bytes: float
    predict_cores: float = 1.0
    flops: float | None = None
    gpu_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ray(self) -> float:
        """Core-seconds of what carries the images from stage to stage."""
        return RAY_CORE_SECONDS_PER_IMAGE + RAY_CORE_SECONDS_PER_PIXEL_BYTE * self.pixel_bytes

    def loading(self, threads: int) -> float:
        """Wall time of one stream of reading that decodes on so many threads."""
        share_decoded = self.decode / max(self.read + self.decode, 1e-12)
        return self.load_seconds * (1 - share_decoded + share_decoded / threads)

    def stages(self, on_gpu: bool) -> dict[str, float]:
        """Core-seconds by stage, with the network on a CPU or on a GPU."""
        stages = {"read": self.read, "decode": self.decode, "write": self.write, "Ray": self.ray}
        return stages if on_gpu else {**stages, "network": self.predict}


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How a job shares a cluster among its stages: read tasks at once, decode threads of each, model actors, and the
    vCPUs that one of them computes on without a GPU."""

    read_tasks: int
    threads: int
    actors: int
    actor_threads: int = 1


@dataclass(frozen=True)
class Estimate:
    """limits: images/s that each resource allows, by its name. Dollars are None where a machine has no price."""

    cluster: Cluster
    images: int
    limits: dict[str, float]
    gpu_source: str = ""

    @property
    def bottleneck(self) -> str:
        return min(self.limits, key=lambda name: self.limits[name])

    @property
    def images_per_second(self) -> float:
        return self.limits[self.bottleneck]

    @property
    def hours(self) -> float:
        return (STARTUP_SECONDS + self.images / self.images_per_second) / 3600

    @property
    def usd(self) -> float | None:
        """On demand, the whole cluster from start to end."""
        return None if self.cluster.usd_per_hour is None else self.hours * self.cluster.usd_per_hour

    @property
    def spot_usd(self) -> float | None:
        return None if self.cluster.spot_usd_per_hour is None else self.hours * self.cluster.spot_usd_per_hour

    @property
    def usd_per_million(self) -> float | None:
        """Without the start."""
        if self.cluster.usd_per_hour is None:
            return None
        return self.cluster.usd_per_hour / 3600 / self.images_per_second * 1e6

    @property
    def busy(self) -> dict[str, float]:
        """Share of each resource that the job uses."""
        return {name: self.images_per_second / limit for name, limit in self.limits.items()}


@dataclass(frozen=True)
class Workload:
    """A job: its network, how many images, and what one of them costs.

    parallelism: vCPUs and GPUs of a cluster → how the job would be laid out on it.
    """

    model: str
    images: int
    costs: Costs
    prices: Prices
    parallelism: Callable[[int, int], Parallelism]

    def on(self, cluster: Cluster) -> Estimate:
        """Raises SettingRefused where nothing is known of a GPU, or of this network on it."""
        costs = self.costs
        at_once = self.parallelism(cluster.vcpus, cluster.gpus)
        limits = {
            CPU: cluster.cores / sum(costs.stages(on_gpu=cluster.gpus > 0).values()),
            READERS: at_once.read_tasks / (costs.loading(at_once.threads) + RAY_SHARE_OF_READERS * costs.ray),
            STORE: at_once.read_tasks / costs.read_seconds,
        }
        if cluster.gpus:
            limits[GPU] = sum(
                count * machine.gpus * self.gpu_rate(machine.gpu) for count, machine in cluster.groups if machine.gpus
            )
        else:
            cores = at_once.actors * at_once.actor_threads * cluster.cores / cluster.vcpus
            limits[ACTORS] = cores / (costs.predict_seconds * costs.predict_cores)
        network = self._card_limit(cluster)
        if network is not None:
            limits[NETWORK_CARDS] = network
        return Estimate(cluster, self.images, limits, self._gpu_sources(cluster))

    def gpu_rate(self, gpu: str) -> float:
        """images/s of this network on one GPU: as measured, as the table says, or its ResNet-50's by operations."""
        if gpu in self.costs.gpu_seconds:
            return 1 / self.costs.gpu_seconds[gpu]
        if gpu not in self.prices.gpus:
            raise SettingRefused(
                f"nothing is known of the speed of a GPU {gpu!r}: add it under `gpus:` in a file for --prices "
                f"(known: {', '.join(self.prices.gpus)})"
            )
        rates = self.prices.gpus[gpu].images_per_second
        if self.model in rates:
            return rates[self.model]
        if not self.costs.flops:
            raise SettingRefused(
                f"the network's floating-point operations cannot be counted, so its speed on a {gpu} cannot be told: "
                "plan on a machine that has one"
            )
        return rates[REFERENCE] * RESNET50_FLOPS / self.costs.flops

    def better(self, given: Estimate) -> Estimate | None:
        """The cheapest shape near to the given one that is no slower and costs clearly less; None if there is none."""
        found = [self.on(shape) for shape in self._near(given.cluster)]
        no_slower = [each for each in found if each.hours <= given.hours * 1.001 and each.usd is not None]
        best = min(no_slower, key=lambda each: (each.usd, each.hours), default=None)
        if best is None or best.usd is None or (given.usd is not None and best.usd > WORTH_A_CHANGE * given.usd):
            return None
        return best

    def _near(self, cluster: Cluster) -> Iterator[Cluster]:
        """One change away: machines of another size with the same GPU, fewer or more of them, other CPU machines
        beside them. Of a machine of one's own: each machine of the prices, one of it; of one with GPUs only those
        with GPUs, since nobody has measured the network on its CPU."""
        machines = self.prices.machines.values()
        if cluster.is_local:
            for machine in machines:
                if self._knows(machine) if machine.gpus else not cluster.gpus:
                    yield Cluster(((1, machine),))
            return
        for place, (count, machine) in enumerate(cluster.groups):
            others = cluster.groups[:place] + cluster.groups[place + 1 :]
            for like in machines:
                if like.gpu == machine.gpu:
                    yield from (Cluster((*others, (number, like))) for number in range(1, 2 * count + 1))
        with_gpus = tuple(group for group in cluster.groups if group[1].gpus)
        if with_gpus:
            yield Cluster(with_gpus)
            for machine in machines:
                if not machine.gpus:
                    most = 2 * cluster.machines
                    yield from (Cluster((*with_gpus, (number, machine))) for number in range(1, most + 1))

    def _knows(self, machine: Machine) -> bool:
        is_rated = bool(machine.gpu in self.prices.gpus and self.costs.flops)
        return is_rated or machine.gpu in self.costs.gpu_seconds

    def _card_limit(self, cluster: Cluster) -> float | None:
        """images/s that the network cards carry; None where the speed of one is not known.

        Every machine reads and decodes by its cores, and every GPU takes images from whichever machine has some.
        """
        costs, limits = self.costs, []
        for _, machine in cluster.groups:
            if machine.network_gbit is None:
                return None
            decoded = machine.cores / cluster.cores
            predicted = machine.gpus / cluster.gpus if cluster.gpus else decoded
            incoming = decoded * costs.encoded_bytes + predicted * (1 - decoded) * costs.pixel_bytes
            outgoing = decoded * (1 - predicted) * costs.pixel_bytes + predicted * costs.result_bytes
            limits.append(machine.network_gbit * 1e9 / 8 / max(incoming, outgoing))
        return min(limits)

    def _gpu_sources(self, cluster: Cluster) -> str:
        names = dict.fromkeys(machine.gpu for _, machine in cluster.groups if machine.gpus)
        return "; ".join(f"{name}, {self._gpu_source(name)}" for name in names)

    def _gpu_source(self, gpu: str) -> str:
        if gpu in self.costs.gpu_seconds:
            return "measured here"
        rate = self.prices.gpus[gpu]
        scaled = "" if self.model in rate.images_per_second else "; from ResNet-50 by floating-point operations"
        return rate.source + scaled
