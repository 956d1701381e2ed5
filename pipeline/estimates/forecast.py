"""Forecast of a job before it runs: a sample of its archive, an estimate, and a better cluster."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from pipeline.config import RunConfig
from pipeline.engine.allocation import Allocation
from pipeline.errors import SettingRefused, counted
from pipeline.estimates import sample
from pipeline.estimates.costs import EXPLANATIONS, STARTUP_SECONDS, Estimate, Parallelism, Workload
from pipeline.estimates.machines import LOCAL, Cluster, Machine, Prices
from pipeline.estimates.sample import Sample
from pipeline.inference import gpu
from pipeline.models import spec as model_specs
from pipeline.output import directory
from pipeline.planning import left_out
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan
from pipeline.predictors.network import NetworkPredictor
from pipeline.stages import value_sample
from pipeline.stages.load import Loader, check_settings, harmonize_of

WIDTH = 100
VARIANT = r"(?i:Ti|Super|D|Laptop|Max-Q|MIG)"
"""A word after the name of a GPU that makes it another GPU."""


@dataclass(frozen=True)
class Forecast:
    """The result of `estimate`.

    size_bytes: of all shards. uncounted_shards: shards whose images only reading can count.
    estimate: the job on the given cluster. better: the job on a cheaper cluster that is no slower, or None.
    parallelism: how the job would share the cluster among its stages. core_seconds: per image, by stage.
    gpu_rates: images/s of the network on one GPU, by the GPU's name. assumed: assumptions in words.
    left_out: numbers of files of the archive that are not read, by suffix. workload: to estimate other clusters.
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
    left_out: dict[str, int]
    workload: Workload | None = None

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "model": self.model,
            "shards": self.shards,
            "uncounted_shards": self.uncounted_shards,
            "size_bytes": self.size_bytes,
            "left_out": self.left_out,
            "sample": asdict(self.sample),
            "estimate": _to_json(self.estimate),
            "parallelism": asdict(self.parallelism),
            "core_seconds_per_image": self.core_seconds,
            "gpu_images_per_second": self.gpu_rates,
            "better": self.better and _to_json(self.better),
            "assumed": list(self.assumed),
        }

    def show(self) -> None:
        """Print a summary on standard output."""
        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self._lines():
            table.add_row(name, value)
        console.print(table, highlight=False)

    def _lines(self) -> Iterator[tuple[str, str]]:
        sample, estimate, cluster = self.sample, self.estimate, self.estimate.cluster
        about = "about " if self.uncounted_shards else ""
        yield (
            "archive",
            f"{about}{counted(sample.images, 'image')} in {counted(self.shards, 'shard')}, {decimal(self.size_bytes)}",
        )
        if self.left_out:
            yield "left out", left_out.describe(self.left_out)
        bad = f", {sample.error_rate:.1%} of them bad" if sample.error_rate else ""
        yield (
            "sample",
            f"{counted(sample.sampled, 'image')} of {sample.width} × {sample.height}{bad}, "
            f"from {counted(sample.shards, 'shard')}",
        )
        gpus = f", {counted(cluster.gpus, 'GPU')}" if cluster.gpus else ""
        yield "cluster", f"{cluster}: {counted(cluster.vcpus, 'vCPU')}, counted as {cluster.cores:g} cores{gpus}"
        yield "time", f"[b]{duration(estimate.hours)}[/b] at {estimate.images_per_second:,.1f} images/s"
        yield "cost", f"[b]{_cost(estimate)}[/b]"
        yield "bottleneck", f"[b]{estimate.bottleneck}[/b]: {EXPLANATIONS[estimate.bottleneck]}"
        busy = sorted(estimate.busy.items(), key=lambda pair: -pair[1])
        yield "busy", ", ".join(f"{name} {share:.0%}" for name, share in busy)
        stages = ", ".join(f"{name} {1000 * seconds:.2g}" for name, seconds in self.core_seconds.items())
        yield "per image", f"{stages} core-ms; {decimal(round(sample.costs.encoded_bytes))} to read"
        if self.gpu_rates:
            rates = ", ".join(f"{rate:,.0f} images/s on one {gpu}" for gpu, rate in self.gpu_rates.items())
            yield "network", f"{self.model}: {rates} ({estimate.gpu_source})"
        else:
            yield "network", f"{self.model}: {sample.network}"
        yield "better", self._better()
        if self.assumed:
            yield "assumed", "; ".join(self.assumed)

    def _better(self) -> str:
        if self.better is None:
            return "no similar cluster is cheaper and no slower"
        time, cost = duration(self.better.hours), _cost(self.better)
        return f"{self.better.cluster}: {time}, {cost}; bottleneck {self.better.bottleneck}"


def estimate(config: RunConfig, predictor: NetworkPredictor, say: Callable[[str], None] = lambda _: None) -> Forecast:
    """Estimate the duration and the cost of a job from a sample of its archive, measured on this machine.

    Writes nothing to the output. say: called with a line of text at each step. Raises NightshiftError and its
    subclasses (`pipeline.errors`).
    """
    prices = Prices.load(config.prices)
    this_machine = _this_machine(prices)
    cluster = prices.cluster(config.cluster or LOCAL, this_machine)
    _check(config, cluster)
    archive = Archive(config, predictor.pixel_format.bands, predictor.pixel_format.dtype == "uint8")
    if predictor.specification:
        archive.use_bands(predictor.specification.bands, harmonize_of(config, predictor))
    predictor.prepare()
    check_settings(config, predictor)
    decoder = _sampled_decoder(config, cluster, this_machine)
    machine = this_machine if cluster.gpus else replace(this_machine, gpus=0, gpu="")  # for the network's measurement
    with directory.draft(archive) as plan:
        if value_sample.is_needed(config, predictor):
            config, notes = value_sample.settle(config, predictor, archive.options(), plan)
            for note in notes:
                say(note)
        sampled_config = replace(config, decoder=decoder)
        measured = _sample(sampled_config, predictor, archive, plan, machine, say)
    if sampled_config.decoder == "gpu":  # the rates of the price file do not include decoding
        prices = replace(prices, gpus={})
    parallelism = _parallelism(config, plan.shards)
    workload = Workload(predictor.model, measured.images, measured.costs, prices, parallelism)
    expected = workload.on(cluster)
    return Forecast(
        model=predictor.model,
        shards=plan.shards,
        uncounted_shards=plan.uncounted_shards,
        size_bytes=plan.size_bytes,
        sample=measured,
        estimate=expected,
        better=workload.better(expected),
        parallelism=parallelism(cluster.vcpus, cluster.gpus),
        core_seconds=measured.costs.stages(on_gpu=cluster.gpus > 0),
        gpu_rates={each.gpu: workload.gpu_rate(each.gpu) for _, each in cluster.groups if each.gpus},
        assumed=tuple(_assumptions(config, sampled_config, cluster)),
        left_out=dict(plan.left_out),
        workload=workload,
    )


def _check(config: RunConfig, cluster: Cluster) -> None:
    """Raise SettingRefused for settings that an estimate does not support or that do not fit the cluster."""
    for flag, value in (("--actors", config.actors), ("--gpus-per-actor", config.gpus_per_actor)):
        if value != "auto":
            raise SettingRefused(f"{flag} is {value}: an estimate compares clusters with {flag} auto; omit the flag")
    Allocation.of(config, cluster.vcpus, [cluster.gpus])


def _this_machine(prices: Prices) -> Machine:
    """This machine with its GPUs, under their name in the price file."""
    count, name = gpu.gpus_here()
    return Machine.local(count, known_gpu(name, prices.gpus))


def known_gpu(name: str, known: Iterable[str]) -> str:
    """Map a GPU's own name to the longest known name that it contains as whole words, or else return it unchanged.

    A variant is another GPU: "RTX 3090 Ti" is not mapped to "RTX 3090".
    """
    matches = [gpu for gpu in known if re.search(rf"(?<!\w){re.escape(gpu)}(?!\w)(?!.*\b{VARIANT}\b)", name)]
    return max(matches, key=len, default=name)


def _sampled_decoder(config: RunConfig, cluster: Cluster, this_machine: Machine) -> str:
    """The decoder for the sample: the job's, or "fast" if the job decodes on GPUs that this machine does not have."""
    gpus = {machine.gpu for _, machine in cluster.groups if machine.gpus}
    return "fast" if config.decoder == "gpu" and gpus != {this_machine.gpu} else config.decoder


def _assumptions(config: RunConfig, sampled_config: RunConfig, cluster: Cluster) -> Iterator[str]:
    if not cluster.is_local:
        yield "cores of the cluster are as fast as the cores here, and the store is as fast as from here"
    if sampled_config.decoder != config.decoder:
        yield f"the CPUs decode, as with --decoder {sampled_config.decoder}: this machine has no such GPU to measure"


def _sample(
    config: RunConfig,
    predictor: NetworkPredictor,
    archive: Archive,
    plan: Plan,
    machine: Machine,
    say: Callable[[str], None],
) -> Sample:
    """Measure a sample with the stages of a job on this machine alone."""
    allocation = Allocation.of(config, machine.vcpus, [machine.gpus])
    allotment = allocation.assign(config.batch_size)
    loader = Loader.of(config, predictor, archive.options(), rows_per_table=allotment.batch_size, keep=plan.keep)
    measured = sample.measure(plan, loader, predictor, allotment, machine, allocation.actors[1], say)
    return replace(measured, costs=replace(measured.costs, flops=model_specs.count_flops(predictor.spec)))


def _parallelism(config: RunConfig, shards: int) -> Callable[[int, int], Parallelism]:
    """Function from the vCPUs and GPUs of a cluster to the parallelism of the job on it."""

    def of(vcpus: int, gpus: int) -> Parallelism:
        allocation = Allocation.of(config, vcpus, [gpus])
        tasks, threads = allocation.read_tasks(shards)
        return Parallelism(tasks, threads, allocation.actors[1], allocation.actor_threads or 1)

    return of


def _to_json(estimate: Estimate) -> dict[str, Any]:
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
    """Format a duration in seconds, minutes, hours or days, whichever suits its size."""
    if hours < 2 / 60:
        return f"{3600 * hours:.0f} s"
    if hours < 2:
        return f"{60 * hours:.0f} minutes"
    return f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.1f} days"


def _cost(estimate: Estimate) -> str:
    if estimate.usd is None or estimate.usd_per_million is None:
        return "unknown: a machine has no price"
    spot = "" if estimate.spot_usd is None else f", {_dollars(estimate.spot_usd)} spot"
    return f"{_dollars(estimate.usd)} on demand{spot}; {_dollars(estimate.usd_per_million)} per million images"


def _dollars(usd: float) -> str:
    return f"${usd:,.0f}" if usd >= 1000 else f"${usd:,.2f}" if usd >= 0.1 else f"${usd:.4f}"
