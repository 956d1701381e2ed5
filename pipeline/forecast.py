"""What a job will take, before it is run: a sample of its archive, an estimate, and a better shape of cluster."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from pipeline import gpu, models, output, sample
from pipeline.config import RunConfig
from pipeline.errors import SettingRefused
from pipeline.estimate import EXPLAINED, STARTUP_SECONDS, Estimate, Parallelism, Workload
from pipeline.layout import Layout
from pipeline.loader import Loader
from pipeline.machines import LOCAL, Cluster, Machine, Prices
from pipeline.plan import Plan
from pipeline.predictors import NetworkPredictor
from pipeline.sample import Sample
from pipeline.sources.discover import Archive

WIDTH = 100
OTHER_GPU = r"(?i:Ti|Super|D|Laptop|Max-Q|MIG)"
"""A word that makes it another GPU than the one whose name comes before."""


@dataclass(frozen=True)
class Forecast:
    """parallelism: how the job would share the cluster among its stages. core_seconds: of an image, by stage.

    gpu_rates: images/s of the network on one GPU, by its name. better: a shape that is cheaper and no slower, or None.
    assumed: what could not be measured here, in words.
    """

    model: str
    shards: int
    uncounted_shards: int
    size_bytes: int
    sample: Sample
    estimate: Estimate
    better: Estimate | None
    parallelism: Parallelism
    core_seconds: dict[str, float]
    gpu_rates: dict[str, float]
    assumed: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "shards": self.shards,
            "uncounted_shards": self.uncounted_shards,
            "size_bytes": self.size_bytes,
            "sample": asdict(self.sample),
            "estimate": _figures(self.estimate),
            "parallelism": asdict(self.parallelism),
            "core_seconds_per_image": self.core_seconds,
            "gpu_images_per_second": self.gpu_rates,
            "better": self.better and _figures(self.better),
            "assumed": list(self.assumed),
        }

    def show(self) -> None:
        """Print it on standard output."""
        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self._lines():
            table.add_row(name, value)
        console.print(table, highlight=False)

    def _lines(self) -> Iterator[tuple[str, str]]:
        found, estimate, cluster = self.sample, self.estimate, self.estimate.cluster
        about = "about " if self.uncounted_shards else ""
        yield "archive", f"{about}{found.images:,} images in {self.shards:,} shards, {decimal(self.size_bytes)}"
        bad = f", {found.error_rate:.1%} of them bad" if found.error_rate else ""
        yield "sample", f"{found.sampled:,} images of {found.width} × {found.height}{bad}, from {found.shards} shards"
        gpus = f", {cluster.gpus} GPUs" if cluster.gpus else ""
        yield "cluster", f"{cluster}: {cluster.vcpus} vCPUs taken as {cluster.cores:g} cores{gpus}"
        yield "time", f"[b]{duration(estimate.hours)}[/b] at {estimate.images_per_second:,.1f} images/s"
        yield "cost", f"[b]{_cost(estimate)}[/b]"
        yield "held up by", f"[b]{estimate.bottleneck}[/b]: {EXPLAINED[estimate.bottleneck]}"
        busy = sorted(estimate.busy.items(), key=lambda pair: -pair[1])
        yield "busy", ", ".join(f"{name} {share:.0%}" for name, share in busy)
        stages = ", ".join(f"{name} {1000 * seconds:.2g}" for name, seconds in self.core_seconds.items())
        yield "an image", f"{stages} ms of a core; {decimal(round(found.costs.encoded_bytes))} to read"
        if self.gpu_rates:
            rates = ", ".join(f"{rate:,.0f} images/s on one {gpu}" for gpu, rate in self.gpu_rates.items())
            yield "network", f"{self.model}: {rates} ({estimate.gpu_source})"
        else:
            yield "network", f"{self.model}: {found.network}"
        yield "better", self._better()
        if self.assumed:
            yield "assumed", "; ".join(self.assumed)

    def _better(self) -> str:
        if self.better is None:
            return "no shape of cluster near this one is cheaper and no slower"
        time, cost = duration(self.better.hours), _cost(self.better)
        return f"{self.better.cluster}: {time}, {cost}; then held up by {self.better.bottleneck}"


def forecast(config: RunConfig, predictor: NetworkPredictor, say: Callable[[str], None]) -> Forecast:
    """Sample the archive on the machine at hand and reckon from there. say: takes what is being done.

    Raises the errors of `pipeline.errors`; those of settings before anything is measured.
    """
    prices = Prices.load(config.prices)
    here = _this_machine(prices)
    cluster = prices.cluster(config.cluster or LOCAL, here)
    _check(config, cluster)
    archive = Archive(config)
    predictor.prepare()
    sampled = replace(config, decoder=_sampled_decoder(config, cluster, here))
    machine = here if cluster.gpus else replace(here, gpus=0, gpu="")  # the network is measured on what it will run on
    with output.draft(archive) as plan:
        found = _sample(sampled, predictor, archive, plan, machine, say)
    if sampled.decoder == "gpu":  # what is known of other GPUs does not tell how fast they decode
        prices = replace(prices, gpus={})
    workload = Workload(predictor.model, found.images, found.costs, prices, _parallelism(config, plan.shards))
    estimate = workload.on(cluster)
    return Forecast(
        predictor.model,
        plan.shards,
        plan.uncounted_shards,
        plan.size_bytes,
        found,
        estimate,
        workload.better(estimate),
        workload.parallelism(cluster.vcpus, cluster.gpus),
        found.costs.stages(on_gpu=cluster.gpus > 0),
        {each.gpu: workload.gpu_rate(each.gpu) for _, each in cluster.groups if each.gpus},
        tuple(_assumptions(config, sampled, cluster)),
    )


def _check(config: RunConfig, cluster: Cluster) -> None:
    """Raises SettingRefused for what a plan does not reckon with, and for what does not fit the cluster."""
    for flag, value in (("--actors", config.actors), ("--gpus-per-actor", config.gpus_per_actor)):
        if value != "auto":
            raise SettingRefused(f"{flag} is {value}: a plan compares clusters, each with {flag} auto; leave it out")
    Layout.of(config, cluster.vcpus, [cluster.gpus])


def _this_machine(prices: Prices) -> Machine:
    """With its GPUs, by the name that the prices have for them."""
    count, name = gpu.gpus_here()
    return Machine.local(count, known_gpu(name, prices.gpus))


def known_gpu(name: str, known: Iterable[str]) -> str:
    """The longest of the known names that stands in a GPU's own as whole words; its own where none does.

    An RTX 3090 Ti is no RTX 3090.
    """
    found = [gpu for gpu in known if re.search(rf"(?<!\w){re.escape(gpu)}(?!\w)(?!.*\b{OTHER_GPU}\b)", name)]
    return max(found, key=len, default=name)


def _sampled_decoder(config: RunConfig, cluster: Cluster, here: Machine) -> str:
    """How the sample is decoded: as the job will, unless that is on GPUs that this machine does not have."""
    gpus = {machine.gpu for _, machine in cluster.groups if machine.gpus}
    return "fast" if config.decoder == "gpu" and gpus != {here.gpu} else config.decoder


def _assumptions(config: RunConfig, sampled: RunConfig, cluster: Cluster) -> Iterator[str]:
    if not cluster.is_local:
        yield "cores there are as fast as here, and the store answers as it does here"
    if sampled.decoder != config.decoder:
        yield f"the CPUs decode, as with --decoder {sampled.decoder}, since there is no such GPU here to try it on"


def _sample(
    config: RunConfig,
    predictor: NetworkPredictor,
    archive: Archive,
    plan: Plan,
    machine: Machine,
    say: Callable[[str], None],
) -> Sample:
    """With the stages of a job on this machine alone."""
    layout = Layout.of(config, machine.vcpus, [machine.gpus])
    batch_size = layout.fit(predictor, config.batch_size)
    loader = Loader.of(config, predictor, archive.options(), rows_per_table=batch_size, keep=plan.keep)
    found = sample.measure(plan, loader, predictor, machine, batch_size, layout.actors[1], say)
    return replace(found, costs=replace(found.costs, flops=models.count_flops(predictor.spec)))


def _parallelism(config: RunConfig, shards: int) -> Callable[[int, int], Parallelism]:
    """On any cluster."""

    def of(vcpus: int, gpus: int) -> Parallelism:
        layout = Layout.of(config, vcpus, [gpus])
        return Parallelism(*layout.read_tasks(shards), layout.actors[1], layout.actor_threads or 1)

    return of


def _figures(estimate: Estimate) -> dict[str, Any]:
    return {
        "cluster": str(estimate.cluster),
        "vcpus": estimate.cluster.vcpus,
        "cores": estimate.cluster.cores,
        "gpus": estimate.cluster.gpus,
        "images": estimate.images,
        "images_per_second": estimate.images_per_second,
        "startup_seconds": STARTUP_SECONDS,
        "hours": estimate.hours,
        "usd": estimate.usd,
        "spot_usd": estimate.spot_usd,
        "usd_per_million_images": estimate.usd_per_million,
        "bottleneck": estimate.bottleneck,
        "limits_images_per_second": estimate.limits,
        "gpu_source": estimate.gpu_source,
    }


def duration(hours: float) -> str:
    """In the unit that people would use."""
    if hours < 2 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 2:
        return f"{60 * hours:.0f} minutes"
    return f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"


def _cost(estimate: Estimate) -> str:
    if estimate.usd is None or estimate.usd_per_million is None:
        return "not known: a machine without a price"
    spot = "" if estimate.spot_usd is None else f", {_dollars(estimate.spot_usd)} spot"
    return f"{_dollars(estimate.usd)} on demand{spot}; {_dollars(estimate.usd_per_million)} a million images"


def _dollars(usd: float) -> str:
    return f"${usd:,.0f}" if usd >= 1000 else f"${usd:,.2f}" if usd >= 0.1 else f"${usd:.4f}"
