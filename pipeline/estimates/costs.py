"""Duration, cost and bottleneck of a job on a cluster. Arithmetic only.

Every resource of a cluster limits the images per second; the smallest limit is the speed of the job. The cost per image
is measured on a sample (`pipeline.estimates.sample`) on this machine; cores elsewhere are assumed to be as fast.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.errors import SettingRefused
from pipeline.estimates.machines import REFERENCE_MODEL, Cluster, Machine, Prices

STARTUP_SECONDS = 15.0
"""Time until the first image: Ray, its workers and the network start. `jobs/bench/compare.py` measures it."""

RAY_CORE_SECONDS_PER_IMAGE = 3e-4
RAY_CORE_SECONDS_PER_PIXEL_BYTE = 1.6e-8
"""CPU time of Ray, its daemons and the driver.

It is the difference between whole jobs with a network that does nothing and the stages alone, on two cores: 2.5 to 3.2
core-ms per image of 224 × 224 pixels, 0.2 to 0.5 per tile of 64 × 64. `jobs/bench/estimates.py` measures the error.
"""

RAY_SHARE_OF_READERS = 0.6
"""Share of Ray's CPU time that the read tasks spend."""

RESNET50_FLOPS = 8.18e9
"""Floating-point operations per image of 224 × 224 pixels; a multiply-add counts as two."""

MAX_BETTER_COST = 0.95
"""A cluster counts as better only if it costs at most this share of the given one."""

CPU, READERS, ACTORS, GPU, NETWORK_CARDS, STORE = "CPUs", "readers", "actors", "GPUs", "network cards", "store"
EXPLANATIONS = {
    CPU: "all cores are busy",
    READERS: "the read tasks are busy; their number is limited by the CPUs or by the number of shards",
    ACTORS: "the model actors are busy, but they do not use all cores",
    GPU: "all GPUs are busy, and CPUs wait for them",
    NETWORK_CARDS: "the machines' network cards are busy with images, with pixels for the GPUs, or with results",
    STORE: "the store is not faster, as measured from this machine",
}


@dataclass(frozen=True, slots=True)
class Costs:
    """Mean cost per image.

    read, decode, write: core-seconds. predict: core-seconds of the network on a CPU. predict_seconds: wall time of one
    actor, which kept predict_cores cores busy. If the network ran on a GPU, these three do not describe CPUs.
    read_seconds: wall time of one reader. load_seconds: wall time of one reader that also decodes, on one thread.
    encoded_bytes: size as stored. pixel_bytes: size as sent to the network. result_bytes: size as written.
    flops: floating-point operations of the network, a multiply-add counts as two; None if unknown.
    gpu_seconds: measured seconds on one GPU, by its name.
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
        """Core-seconds of Ray, which moves images from stage to stage."""
        return RAY_CORE_SECONDS_PER_IMAGE + RAY_CORE_SECONDS_PER_PIXEL_BYTE * self.pixel_bytes

    def loading(self, threads: int) -> float:
        """Wall time of one reader that decodes on this many threads."""
        share_decoded = self.decode / max(self.read + self.decode, 1e-12)
        return self.load_seconds * (1 - share_decoded + share_decoded / threads)

    def stages(self, on_gpu: bool) -> dict[str, float]:
        """Core-seconds by stage, with the network on a CPU or on a GPU."""
        stages = {"read": self.read, "decode": self.decode, "write": self.write, "Ray": self.ray}
        return stages if on_gpu else {**stages, "network": self.predict}


@dataclass(frozen=True, slots=True)
class Parallelism:
    """How a job shares a cluster among its stages.

    read_tasks: at once. threads: decode threads per read task. actors: model actors. actor_threads: vCPUs that one
    actor computes on, if it has no GPU.
    """

    read_tasks: int
    threads: int
    actors: int
    actor_threads: int = 1


@dataclass(frozen=True)
class Estimate:
    """Speed and cost of a job on a cluster. Costs are in US dollars, and None if a machine has no price.

    limits: images/s that each resource allows, by its name. gpu_source: origin of the GPU rates.
    """

    cluster: Cluster
    images: int
    limits: dict[str, float]
    gpu_source: str = ""

    @property
    def bottleneck(self) -> str:
        """Name of the resource with the lowest limit."""
        return min(self.limits, key=lambda name: self.limits[name])

    @property
    def images_per_second(self) -> float:
        return self.limits[self.bottleneck]

    @property
    def hours(self) -> float:
        return (STARTUP_SECONDS + self.images / self.images_per_second) / 3600

    @property
    def usd(self) -> float | None:
        """Cost of the job on demand: the whole cluster from start to end."""
        return None if self.cluster.usd_per_hour is None else self.hours * self.cluster.usd_per_hour

    @property
    def spot_usd(self) -> float | None:
        """Cost of the job at spot prices."""
        return None if self.cluster.spot_usd_per_hour is None else self.hours * self.cluster.spot_usd_per_hour

    @property
    def usd_per_million(self) -> float | None:
        """Cost per million images on demand, without the start-up."""
        if self.cluster.usd_per_hour is None:
            return None
        return self.cluster.usd_per_hour / 3600 / self.images_per_second * 1e6

    @property
    def busy(self) -> dict[str, float]:
        """Share of each resource that the job uses, 0 to 1."""
        return {name: self.images_per_second / limit for name, limit in self.limits.items()}


@dataclass(frozen=True)
class Workload:
    """A job: its network, its number of images, and the cost per image.

    parallelism: function from the vCPUs and GPUs of a cluster to the parallelism of the job on it.
    """

    model: str
    images: int
    costs: Costs
    prices: Prices
    parallelism: Callable[[int, int], Parallelism]

    def on(self, cluster: Cluster) -> Estimate:
        """Estimate the job on a cluster. Raises SettingRefused if the speed of a GPU is unknown."""
        costs = self.costs
        parallelism = self.parallelism(cluster.vcpus, cluster.gpus)
        limits = {
            CPU: cluster.cores / sum(costs.stages(on_gpu=cluster.gpus > 0).values()),
            READERS: parallelism.read_tasks / (costs.loading(parallelism.threads) + RAY_SHARE_OF_READERS * costs.ray),
            STORE: parallelism.read_tasks / costs.read_seconds,
        }
        if cluster.gpus:
            limits[GPU] = sum(
                count * machine.gpus * self.gpu_rate(machine.gpu) for count, machine in cluster.groups if machine.gpus
            )
        else:
            cores = parallelism.actors * parallelism.actor_threads * cluster.cores / cluster.vcpus
            limits[ACTORS] = cores / (costs.predict_seconds * costs.predict_cores)
        network = self._card_limit(cluster)
        if network is not None:
            limits[NETWORK_CARDS] = network
        return Estimate(cluster, self.images, limits, self._gpu_sources(cluster))

    def gpu_rate(self, gpu: str) -> float:
        """images/s of this network on one GPU.

        Measured, or from the price file, or scaled from that file's rate of ResNet-50 by floating-point operations.
        Raises SettingRefused if none of these is known.
        """
        if gpu in self.costs.gpu_seconds:
            return 1 / self.costs.gpu_seconds[gpu]
        if gpu not in self.prices.gpus:
            raise SettingRefused(
                f"the speed of GPU {gpu!r} is unknown: add it to `gpus:` in a copy of prices.yaml, and pass that with "
                f"--prices (known: {', '.join(self.prices.gpus)})"
            )
        rates = self.prices.gpus[gpu].images_per_second
        if self.model in rates:
            return rates[self.model]
        if not self.costs.flops:
            raise SettingRefused(
                f"the network's floating-point operations cannot be counted, so its speed on a {gpu} is unknown: run "
                "the estimate on a machine with that GPU"
            )
        return rates[REFERENCE_MODEL] * RESNET50_FLOPS / self.costs.flops

    def better(self, given: Estimate) -> Estimate | None:
        """The cheapest similar cluster that is no slower and clearly cheaper than the given one; None if none is."""
        estimates = [self.on(cluster) for cluster in self._similar(given.cluster)]
        no_slower = [each for each in estimates if each.hours <= given.hours * 1.001 and each.usd is not None]
        best = min(no_slower, key=lambda each: (each.usd, each.hours), default=None)
        if best is None or best.usd is None or (given.usd is not None and best.usd > MAX_BETTER_COST * given.usd):
            return None
        return best

    def _similar(self, cluster: Cluster) -> Iterator[Cluster]:
        """Clusters that differ in one respect: size of the machines, their number, or the additional CPU machines.

        For a cluster with the local machine: each single machine of the price file. If the local machine has GPUs, only
        machines with GPUs, because the network's speed on a CPU was not measured.
        """
        machines = self.prices.machines.values()
        if cluster.is_local:
            for machine in machines:
                if self._has_rate(machine) if machine.gpus else not cluster.gpus:
                    yield Cluster(((1, machine),))
            return
        for place, (count, machine) in enumerate(cluster.groups):
            others = cluster.groups[:place] + cluster.groups[place + 1 :]
            for other in machines:
                if other.gpu == machine.gpu:
                    yield from (Cluster((*others, (number, other))) for number in range(1, 2 * count + 1))
        with_gpus = tuple(group for group in cluster.groups if group[1].gpus)
        if with_gpus:
            yield Cluster(with_gpus)
            for machine in machines:
                if not machine.gpus:
                    max_machines = 2 * cluster.machines
                    yield from (Cluster((*with_gpus, (number, machine))) for number in range(1, max_machines + 1))

    def _has_rate(self, machine: Machine) -> bool:
        is_rated = bool(machine.gpu in self.prices.gpus and self.costs.flops)
        return is_rated or machine.gpu in self.costs.gpu_seconds

    def _card_limit(self, cluster: Cluster) -> float | None:
        """images/s that the network cards can carry; None if the speed of one is unknown.

        Each machine reads and decodes images in proportion to its cores. Each GPU receives pixels from all machines.
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
