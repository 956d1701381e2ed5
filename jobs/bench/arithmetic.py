"""What a billion images cost, computed from what was measured on two cores: the tables of SCALE.md.

    python -m jobs.bench.arithmetic

Prints Markdown. Every input is a constant here with its source; change one and the tables follow (a test compares them
with the page).
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

BILLION = 10**9
MACHINES = 8
BATCH_SIZE = 256  # of pipeline.layout.Layout.fit, on a GPU
READ_TASKS = 10_000  # pipeline.engine.MAX_READ_TASKS
PIXEL_BYTES = 224 * 224 * 3
CORES_PER_VCPU = 0.5
"""Of the measured core: a vCPU is a hyperthread, and two of one core are taken to do no more than one alone."""
CORES_PER_VCPU_AT_BEST = 0.65


@dataclass(frozen=True)
class Costs:
    """Core-milliseconds of a measured core: an image's, but for the driver's. SCALE.md has their measurement."""

    get: float = 0.40
    decode: float = 3.90
    ray_decoding: float = 0.90
    daemons: float = 0.10
    transfer: float = 0.35  # more of the daemons' where all pixels go from node to node
    actor: float = 0.18
    driver_per_batch: float = 11.6
    driver_per_task: float = 14.5

    @property
    def driver(self) -> float:
        return self.driver_per_batch / BATCH_SIZE + self.driver_per_task * READ_TASKS / BILLION

    @property
    def image(self) -> float:
        """On the machines together, the driver among them."""
        return self.get + self.decode + self.ray_decoding + self.daemons + self.actor + self.driver


@dataclass(frozen=True)
class Machine:
    """usd_hour: list price on demand in us-east-1; edit."""

    name: str
    vcpus: int
    usd_hour: float


@dataclass(frozen=True)
class Network:
    """l4_rate: images/s of one L4 in half precision."""

    name: str
    l4_rate: float


@dataclass(frozen=True)
class Published:
    """images/s of all machines."""

    what: str
    machine: Machine
    rate: float


@dataclass(frozen=True)
class Run:
    """A billion images. rate: images/s of all machines. usd_hour: of all machines."""

    rate: float
    bound: str
    usd_hour: float

    @property
    def hours(self) -> float:
        return BILLION / self.rate / 3600

    @property
    def gpu_hours(self) -> float:
        return MACHINES * self.hours

    @property
    def usd_per_million(self) -> float:
        return self.usd_hour * 1e6 / self.rate / 3600


COSTS = Costs()
SMALL, MIDDLE, LARGE = (
    Machine("g6.xlarge", 4, 0.8048),
    Machine("g6.2xlarge", 8, 0.9776),
    Machine("g6.4xlarge", 16, 1.3232),
)
GPU_MACHINES = (SMALL, MIDDLE, LARGE)
DECODER = Machine("c6a.4xlarge", 16, 0.612)
NODE_BYTES_A_SECOND = 2.5e9 / 8  # what a g6.xlarge may receive all day
# timm's RTX 4090 (Ada, as the L4 is), mixed precision, channels last, × 300 / 1,008, the memory bandwidths in GB/s.
NETWORKS = (Network("ResNet-18", 18_247 * 300 / 1_008), Network("ResNet-50", 5_089 * 300 / 1_008))
PUBLISHED = (
    Published("Daft, slowest and", SMALL, 2_551),
    Published("fastest of its runs", SMALL, 3_055),
    Published("Ray Data", SMALL, 1_761),
    Published("Ray Data", MIDDLE, 4_110),
    Published("Ray Data", LARGE, 5_550),
)


def together(machine: Machine, network: Network, costs: Costs = COSTS, cores_per_vcpu: float = CORES_PER_VCPU) -> Run:
    """Every machine decodes for its own GPU."""
    decoding = 1000 * machine.vcpus * cores_per_vcpu / costs.image
    bound = "decoding" if decoding < network.l4_rate else "GPU"
    return Run(MACHINES * min(decoding, network.l4_rate), bound, MACHINES * machine.usd_hour)


def apart(network: Network, costs: Costs = COSTS) -> tuple[Run, int]:
    """Eight of the smallest GPU machines, and as many that only decode as these need: their number too."""
    crossing = NODE_BYTES_A_SECOND / PIXEL_BYTES
    rate = MACHINES * min(crossing, network.l4_rate)
    cores = rate * (costs.image + costs.transfer) / 1000 - MACHINES * SMALL.vcpus * CORES_PER_VCPU
    decoders = -int(-cores // (DECODER.vcpus * CORES_PER_VCPU))
    bound = "network card" if crossing < network.l4_rate else "GPU"
    return Run(rate, bound, MACHINES * SMALL.usd_hour + decoders * DECODER.usd_hour), decoders


def driver_core_hours(costs: Costs = COSTS) -> float:
    """Of a billion images."""
    return BILLION * costs.driver / 1000 / 3600


def driver_limit(costs: Costs = COSTS) -> float:
    """images/s at which the driver fills one core, and its loop, which is one thread, can do no more."""
    return 1000 / costs.driver


def markdown(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tables() -> list[str]:
    """The page's, in its order."""
    return [_inputs(), _billion(), _driver(), _published()]


def _inputs() -> str:
    """Of COSTS, each an image's but for the last two."""
    costs = {
        "GET": COSTS.get,
        "decode": COSTS.decode,
        "Ray's decoders": COSTS.ray_decoding,
        "raylets, GCS": COSTS.daemons,
        "crossing": COSTS.transfer,
        "actor": COSTS.actor,
        f"driver, {BATCH_SIZE} images": COSTS.driver_per_batch,
        "driver, a task": COSTS.driver_per_task,
    }
    return markdown(("measured", *costs), iter([("core-ms", *(f"{ms:.2f}" for ms in costs.values()))]))


def _billion() -> str:
    header = ("computed", "network", "images/s", "at best", "bound by", "hours", "GPU-hours", "$ a million")
    return markdown(header, (row for network in NETWORKS for row in _rows(network)))


def _rows(network: Network) -> Iterator[Sequence[str]]:
    for machine in GPU_MACHINES:
        best = together(machine, network, cores_per_vcpu=CORES_PER_VCPU_AT_BEST)
        rate, *others = _cells(together(machine, network))
        yield f"{MACHINES} × {machine.name}, {machine.vcpus} vCPU", network.name, rate, f"{best.rate:,.0f}", *others
    run, decoders = apart(network)
    rate, *others = _cells(run)
    yield f"{MACHINES} × {SMALL.name} + {decoders} × {DECODER.name}", network.name, rate, "", *others


def _driver() -> str:
    header = ("computed, a billion images", "driver's core-hours", "at most images/s", "at least hours")
    limit = driver_limit()
    row = ("one driver", f"{driver_core_hours():.0f}", f"{limit:,.0f}", f"{BILLION / limit / 3600:.1f}")
    return markdown(header, iter([row]))


def _published() -> str:
    header = ("8 machines, ResNet-18", "vCPU each", "images/s", "$ a million", "")
    theirs = ((each.what, each.machine, Run(each.rate, "", MACHINES * each.machine.usd_hour)) for each in PUBLISHED)
    ours = (("Nightshift", machine, together(machine, NETWORKS[0])) for machine in GPU_MACHINES)
    rows = [*((*each, "published") for each in theirs), *((*each, "computed") for each in ours)]
    return markdown(
        header,
        (
            (what, str(machine.vcpus), f"{run.rate:,.0f}", f"{run.usd_per_million:.2f}", source)
            for what, machine, run, source in rows
        ),
    )


def _cells(run: Run) -> tuple[str, ...]:
    return (f"{run.rate:,.0f}", run.bound, f"{run.hours:,.1f}", f"{run.gpu_hours:,.0f}", f"{run.usd_per_million:.2f}")


def main() -> int:
    print("\n\n".join(tables()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
