"""The report of a run, from its ledger: `_report.json` and the summary on the screen."""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from pipeline.config import RunConfig
from pipeline.errors import (
    Interrupted,
    NightshiftError,
    OutputLocked,
    OutputRefused,
    StorageRefused,
    counted,
    printable,
)
from pipeline.estimates.machines import Cluster
from pipeline.output import ledger as ledgers
from pipeline.output.ledger import Ledger
from pipeline.output.run_record import RunRecord
from pipeline.planning import left_out
from pipeline.planning.plan import Plan
from pipeline.planning.update import Change
from pipeline.storage import access, uris

NAME = "_report.json"


@dataclass(frozen=True, slots=True)
class Report:
    """Counts and rates of a run so far.

    The whole run, all attempts together:
    output: URI. model: name of the network. status: "done", "failed", or the class of the error that ended it.
    planned: number of images; None while some shards are uncounted.
    rows, errors: images with a result, and bad images. errors_by_type: `<stage>/<error_type>` → images.
    parts: number of files with results. attempt: number of the last attempt, from 1.
    stage_seconds: wall time by stage, summed over images and workers.
    networks: how the network ran (device, number format, compiled or not) → images.
    core_seconds: CPU time of the workers. gpu_seconds: time in which a GPU had a batch in flight.
    bytes_read: of encoded images. bytes_written: of results and errors.
    left_out: numbers of files of the archive that are not read, by suffix. members_left_out: of members of tars and
    zips.
    empty_shards: number of tars and zips without an image. unended_tars: of tars without an end mark, perhaps cut.
    empty: number of images without data, which are counted and not written.
    null_columns: kept columns without a value in any row.
    constant_images: images with a result whose pixels are all equal after --scale.
    unchanged, removed: images or whole shards that the last --update skipped, and that are missing from the archive.

    The last attempt alone:
    resumed_images: images that earlier attempts had done. wall_seconds: duration. images_per_second: without the
    resumed images.
    cost: on the machines of --cluster; None if they or their prices are unknown.
    """

    output: str
    status: str
    model: str
    planned: int | None
    rows: int
    errors: int
    parts: int
    attempt: int
    resumed_images: int
    wall_seconds: float
    images_per_second: float
    bytes_read: int
    errors_by_type: dict[str, int] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    networks: dict[str, int] = field(default_factory=dict)
    unchanged: int = 0
    removed: int = 0
    core_seconds: float = 0.0
    gpu_seconds: float = 0.0
    bytes_written: int = 0
    cost: dict[str, Any] | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    empty_shards: int = 0
    null_columns: list[str] = field(default_factory=list)
    constant_images: int = 0
    members_left_out: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    unended_tars: int = 0

    @staticmethod
    def of(
        plan: Plan,
        ledger: Ledger,
        model: str,
        status: str,
        wall_seconds: float,
        change: Change | None = None,
        cluster: Cluster | None = None,
        keep: Iterable[str] = (),
    ) -> "Report":
        """Sum up the ledger. wall_seconds: of this attempt. cluster: its machines, for the cost. keep: kept columns."""
        earlier, current = ledger.earlier, ledger.current
        seconds = earlier.seconds + current.seconds
        images = current.rows + current.errors + current.empty
        nulls = earlier.nulls + current.nulls
        return Report(
            output=plan.output,
            status=status,
            model=model,
            planned=plan.images(ledger.coverage.totals),
            rows=ledger.rows,
            errors=ledger.errors,
            parts=earlier.parts + current.parts,
            attempt=ledger.attempt,
            resumed_images=earlier.rows + earlier.errors + earlier.empty,
            wall_seconds=round(wall_seconds, 3),
            images_per_second=round(images / wall_seconds, 2) if wall_seconds else 0.0,
            bytes_read=earlier.bytes_read + current.bytes_read,
            errors_by_type=dict((earlier.errors_by_type + current.errors_by_type).most_common()),
            stage_seconds={name: round(seconds[name], 3) for name in ("read", "decode", "predict", "write")},
            networks=dict((earlier.networks + current.networks).most_common()),
            unchanged=change.unchanged if change else 0,
            removed=change.removed if change else 0,
            core_seconds=round(earlier.core_seconds + current.core_seconds, 3),
            gpu_seconds=round(earlier.gpu_seconds + current.gpu_seconds, 3),
            bytes_written=earlier.bytes_written + current.bytes_written,
            cost=_cost(cluster, wall_seconds, images),
            left_out=dict(plan.left_out),
            null_columns=[name for name in keep if ledger.rows and nulls[name] == ledger.rows],
            empty_shards=plan.empty_shards(ledger.coverage.totals),
            constant_images=earlier.constant + current.constant,
            members_left_out=dict(ledger.left_out),
            empty=ledger.empty,
            unended_tars=ledger.unended,
        )

    def save(self) -> None:
        """Write `_report.json`."""
        access.write(uris.join(self.output, NAME), json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def load(output: str) -> "Report":
        """Read `_report.json`. Raises FileNotFoundError, and OutputRefused if it is damaged."""
        return Report(**access.read_record(uris.join(output, NAME)))

    def already_done(self, change: Change | None) -> "Report":
        """The report of an attempt that found nothing to do. change: of an update."""
        report = replace(self, resumed_images=self.rows + self.errors + self.empty)
        if change is None:
            return report
        return replace(report, unchanged=change.unchanged, removed=change.removed, left_out=dict(change.left_out))

    def show(self) -> None:
        """Print a summary on standard output."""
        console = Console(soft_wrap=True)
        for name, value in self._lines():
            console.print(f"[dim]{name:<8}[/dim] {escape(printable(value))}", highlight=False)

    def _lines(self) -> Iterator[tuple[str, str]]:
        planned_text = f" of {self.planned:,} planned" if self.planned is not None else ""
        done, empty = self.rows + self.errors + self.empty, f", {self.empty:,} empty" if self.empty else ""
        yield "images", f"{done:,}{planned_text}: {self.rows:,} rows, {self.errors:,} errors{empty}"
        for kind, count in self.errors_by_type.items():
            yield "", f"{count:,} × {kind}"
        if self.left_out:
            yield "left out", left_out.describe(self.left_out)
        if self.members_left_out:
            yield "" if self.left_out else "left out", f"in tars and zips: {left_out.describe(self.members_left_out)}"
        if self.empty_shards:
            yield "empty", left_out.describe_empty(self.empty_shards)
        if self.unended_tars:
            yield "tars", left_out.describe_unended(self.unended_tars)
        if self.null_columns:
            yield "keep", f"{', '.join(self.null_columns)}: no image has a value; check the names in --keep"
        if self.constant_images:
            are = "image is" if self.constant_images == 1 else "images are"
            text = "one colour after --scale: all values are equal, outside of its range, or no data"
            yield "scale", f"{self.constant_images:,} {are} {text}"
        if self.unchanged or self.removed:
            missing = (
                f"; {self.removed:,} are no longer in the archive, see _plan/removed.parquet" if self.removed else ""
            )
            objects = f"{self.unchanged:,} images or shards are unchanged"
            yield "update", f"{self.resumed_images:,} images were done before; {objects}{missing}"
        elif self.resumed_images:
            yield "resumed", f"{self.resumed_images:,} images were done before, by earlier attempts"
        yield "speed", f"{self.images_per_second:,.1f} images/s over {self.wall_seconds:,.1f} s"
        yield "stages", " · ".join(f"{name} {seconds:,.1f} s" for name, seconds in self.stage_seconds.items())
        gpu = f" · {self.gpu_seconds:,.1f} GPU-seconds" if self.gpu_seconds else ""
        moved = f"{decimal(self.bytes_read)} read, {decimal(self.bytes_written)} written"
        yield "used", f"{self.core_seconds:,.1f} core-seconds{gpu} · {moved}"
        if self.cost:
            million = self.cost["usd_per_million_images"]
            each = f", ${million:,.2f} per million images" if million is not None else ""
            yield "cost", f"${self.cost['usd']:,.2f} on demand for this attempt on {self.cost['cluster']}{each}"
        for network, count in self.networks.items():
            if network:
                yield "network", f"{self.model}: {network}{f' ({count:,} images)' if len(self.networks) > 1 else ''}"
        named = list(filter(None, self.networks))
        if self.gpu_seconds and named and all(network.startswith("cpu") for network in named):
            yield "", "the actors had a GPU but computed on the CPU, because torch could not use the GPU"
        yield "output", f"{self.output}  ({counted(self.parts, 'part')}, {self.status})"
        yield "open it", f'pandas.read_parquet("{self.output}")'


def _cost(cluster: Cluster | None, wall_seconds: float, images: int) -> dict[str, Any] | None:
    """Cost of an attempt on a cluster, on demand; None if a price is unknown. The cost is that of all its machines."""
    if cluster is None or cluster.usd_per_hour is None:
        return None
    usd = wall_seconds / 3600 * cluster.usd_per_hour
    return {
        "cluster": str(cluster),
        "usd_per_hour": cluster.usd_per_hour,
        "machine_hours": round(wall_seconds / 3600 * cluster.machines, 4),
        "usd": round(usd, 4),
        "usd_per_million_images": round(usd / images * 1e6, 4) if images else None,
    }


@contextmanager
def reported(
    config: RunConfig, record: RunRecord, plan: Plan, ledger: Ledger, change: Change | None, cluster: Cluster | None
) -> Iterator[None]:
    """Write `_report.json` and the attempt's record when the work in the context ends, however it ends.

    Writes nothing if another driver has taken over the output. Raises TooManyErrors at the end of the work.
    """
    started = time.monotonic()
    status = "failed"
    try:
        yield
        ledgers.check_error_rate(ledger, plan, config.max_error_rate)
        status = "done"
    except NightshiftError as error:
        status = type(error).__name__
        raise
    except KeyboardInterrupt:
        status = Interrupted.__name__
        raise
    finally:
        if status != OutputLocked.__name__:
            seconds, kept = time.monotonic() - started, config.keep_names().values()
            report = Report.of(plan, ledger, record.model, status, seconds, change, cluster, kept)
            # If the work failed, raise its error and not that of a store to which this report cannot be written.
            suppressed = () if status == "done" else (OSError, StorageRefused, OutputLocked, OutputRefused)
            with contextlib.suppress(*suppressed):
                ledgers.check_newest(ledger)
                report.save()
                ledgers.end(ledger, status)
