"""The tables of SCALE.md: what a billion images cost on eight L4, computed by `pipeline.estimates`.

    python -m jobs.bench.harness.scale

Prints Markdown. Machines, prices and GPU rates are those of `pipeline/estimates/prices.yaml`. The cost of an image was
measured as SCALE.md describes. A test compares these tables with the page.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.engine.allocation import Allocation
from pipeline.estimates.costs import Costs, Estimate, Parallelism, Workload
from pipeline.estimates.machines import Prices

BILLION = 10**9
READ_TASKS = 10_000  # pipeline.engine.flow.MAX_READ_TASKS
BATCH_SIZE = 256  # of pipeline.engine.allocation.Allocation.assign, on a GPU
PHOTO_BYTES, PIXEL_BYTES = 110_000, 224 * 224 * 3

GET, DECODE = 0.40e-3, 3.90e-3
"""Core-seconds per image: of a GET, and of reading from a tar, decoding and writing."""
DRIVER_PER_BATCH, DRIVER_PER_TASK = 11.6e-3, 14.5e-3
"""Core-seconds of the driver."""

GPU_MACHINES = ("g6.xlarge", "g6.2xlarge", "g6.4xlarge")
CPU_MACHINE, MAX_CPU_MACHINES = "c7i.4xlarge", 20
MACHINES = 8


@dataclass(frozen=True)
class Network:
    """name: as in the price file. embedding_dim: float32 values of a result."""

    title: str
    name: str
    embedding_dim: int


@dataclass(frozen=True)
class Published:
    """images_per_second: of eight of these machines with ResNet-18."""

    title: str
    machine: str
    images_per_second: int


NETWORKS = (Network("ResNet-18", "resnet18", 512), Network("ResNet-50", "resnet50", 2_048))
PUBLISHED = (
    Published("Daft, slowest run", "g6.xlarge", 2_551),
    Published("Daft, fastest run", "g6.xlarge", 3_055),
    Published("Ray Data", "g6.xlarge", 1_761),
    Published("Ray Data", "g6.2xlarge", 4_110),
    Published("Ray Data", "g6.4xlarge", 5_550),
)

PRICES = Prices.load()


def workload(network: Network) -> Workload:
    """A billion photos on S3."""
    costs = Costs(
        read=GET,
        decode=DECODE,
        write=0.0,
        predict=0.0,
        read_seconds=GET,
        load_seconds=GET + DECODE,
        predict_seconds=0.0,
        encoded_bytes=PHOTO_BYTES,
        pixel_bytes=PIXEL_BYTES,
        result_bytes=4 * network.embedding_dim,
    )
    return Workload(network.name, BILLION, costs, PRICES, _parallelism)


def _parallelism(vcpus: int, gpus: int) -> Parallelism:
    allocation = Allocation.of(RunConfig(input="s3://photos", output="s3://embeddings"), vcpus, [gpus])
    return Parallelism(*allocation.read_tasks(READ_TASKS), allocation.actors[1])


def estimate(network: Network, shape: str) -> Estimate:
    return workload(network).on(PRICES.cluster(shape))


def with_cpu_machines(network: Network) -> Estimate:
    """Eight of the smallest GPU machines, with the number of CPU machines that costs least per image."""
    shapes = (f"{MACHINES}x{GPU_MACHINES[0]}+{count}x{CPU_MACHINE}" for count in range(1, MAX_CPU_MACHINES + 1))
    return min((estimate(network, shape) for shape in shapes), key=lambda each: each.usd_per_million or 0.0)


def driver_core_seconds() -> float:
    """Per image of the billion."""
    return DRIVER_PER_BATCH / BATCH_SIZE + DRIVER_PER_TASK * READ_TASKS / BILLION


def tables() -> list[str]:
    """Those of the page, in its order."""
    return [_inputs(), _billion(), _driver(), _published()]


def _inputs() -> str:
    per_image = {"GET": GET, "read, decode, write": DECODE, "Ray": workload(NETWORKS[0]).costs.ray}
    driver = {f"driver, {BATCH_SIZE} images": DRIVER_PER_BATCH, "driver, a task": DRIVER_PER_TASK}
    costs = per_image | driver
    return markdown(("input", *costs), [("core-ms", *(f"{1000 * seconds:.2f}" for seconds in costs.values()))])


def _billion() -> str:
    header = ("computed", "network", "images/s", "bottleneck", "hours", "GPU-hours", "$ per million")
    return markdown(header, (_row(network, each) for network in NETWORKS for each in _estimates(network)))


def _estimates(network: Network) -> Iterator[Estimate]:
    for machine in GPU_MACHINES:
        yield estimate(network, f"{MACHINES}x{machine}")
    yield with_cpu_machines(network)


def _row(network: Network, each: Estimate) -> Sequence[str]:
    groups = " + ".join(f"{count} × {machine.name}" for count, machine in each.cluster.groups)
    shape = f"{groups}, {each.cluster.vcpus} vCPU"
    rate, gpu_hours = f"{each.images_per_second:,.0f}", f"{each.cluster.gpus * each.hours:,.0f}"
    return shape, network.title, rate, each.bottleneck, f"{each.hours:.1f}", gpu_hours, _usd(each)


def _driver() -> str:
    header = ("computed, a billion images", "driver's core-hours", "at most images/s", "at least hours")
    hours = BILLION * driver_core_seconds() / 3600
    return markdown(header, [("one driver", f"{hours:.0f}", f"{1 / driver_core_seconds():,.0f}", f"{hours:.1f}")])


def _published() -> str:
    header = ("8 machines, ResNet-18", "vCPU each", "images/s", "$ per million", "")
    rows = []
    for each in PUBLISHED:
        run = Estimate(PRICES.cluster(f"{MACHINES}x{each.machine}"), BILLION, {"published": each.images_per_second})
        rows.append((each.title, each.machine, run, "published"))
    rows += [
        ("Nightshift", machine, estimate(NETWORKS[0], f"{MACHINES}x{machine}"), "computed") for machine in GPU_MACHINES
    ]
    return markdown(
        header,
        (
            (title, str(PRICES.machines[machine].vcpus), f"{run.images_per_second:,.0f}", _usd(run), source)
            for title, machine, run, source in rows
        ),
    )


def _usd(each: Estimate) -> str:
    return f"{each.usd_per_million:.2f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> int:
    print("\n\n".join(tables()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
