"""One network on the sample: its vectors, and its speed and cost by the estimate of a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import schema
from pipeline.comparison.job import NetworkResult
from pipeline.config import RunConfig
from pipeline.coverage import END
from pipeline.errors import InputRefused, SettingRefused
from pipeline.estimates import forecast
from pipeline.estimates.machines import Prices
from pipeline.output import directory
from pipeline.planning import plan as plans
from pipeline.planning.archive import Archive
from pipeline.predictors.base import Allotment
from pipeline.predictors.embed import Embedder
from pipeline.stages import value_sample
from pipeline.stages.load import Loader, check_settings, harmonize_of
from pipeline.stages.predict import Predict
from pipeline.storage import uris

BATCH_SIZE = 64
THREADS = 4
VECTOR = "embedding"
COLUMNS = ("image_id", "source", "member")


@dataclass(frozen=True)
class Embedded:
    """The images of a sample with their vectors. Has what `labels.find` needs of an output.

    uri: the archive, for messages. table: image_id, source, member, the kept columns and the vector. failures: image_id
    of those that could not be read.
    """

    uri: str
    table: pa.Table
    failures: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.table)

    @property
    def failed(self) -> int:
        return len(self.failures)

    def require(self, columns: Sequence[str]) -> None:
        """Raise InputRefused if the images lack one of these columns."""
        if missing := [name for name in columns if name not in self.table.column_names]:
            raise InputRefused(f"--input {self.uri} has no column {', '.join(missing)}: name it with --keep")

    def batches(self, columns: Sequence[str], /) -> Iterator[pa.RecordBatch]:
        """The rows of all images, in order."""
        self.require(columns)
        yield from self.table.select(list(columns)).to_batches()

    def errors(self, columns: Sequence[str], /) -> Iterator[pa.RecordBatch]:
        """The images that could not be read; only their image_id."""
        assert list(columns) == ["image_id"]
        yield pa.record_batch({"image_id": pa.array(self.failures, pa.string())})

    def vectors(self) -> NDArray[np.float32]:
        """float32 [rows, dim]."""
        column = self.table[VECTOR].combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return np.array(flat, np.float32).reshape(len(column), -1)


def embed(run: RunConfig, embedder: Embedder) -> Embedded:
    """Embed the images of an archive with a prepared network, in this process.

    Raises InputRefused if no image can be read.
    """
    check_settings(run, embedder)
    archive = Archive(run)
    if embedder.specification:
        archive.use_bands(embedder.specification.bands, harmonize_of(run, embedder))
    archive.use_for(embedder.pixel_format.bands, takes_8_bits=embedder.pixel_format.dtype == "uint8")
    with directory.draft(archive) as plan:
        if value_sample.is_needed(run, embedder):
            run, _ = value_sample.settle(run, embedder, archive.options(), plan)
        rows = pa.concat_tables(_tables(run, embedder, archive, plan))
    is_error = pc.is_valid(rows["error_type"])
    failures = tuple(rows.filter(is_error)["image_id"].to_pylist())
    table = rows.filter(pc.invert(is_error))
    name = " ".join(map(uris.redact, run.input))
    if not len(table):
        raise InputRefused(f"--input {name}: none of its {len(failures)} images could be read")
    kept = [each for each in run.keep_names().values() if each in table.column_names]
    return Embedded(name, table.select([*COLUMNS, *kept, VECTOR]), failures)


def _tables(run: RunConfig, embedder: Embedder, archive: Archive, plan: plans.Plan) -> Iterator[pa.Table]:
    """The rows of images and of errors, with their vectors."""
    loader = Loader.of(run, embedder, archive.options(), rows_per_table=BATCH_SIZE, threads=THREADS, keep=plan.keep)
    predict = Predict(embedder, loader.kept, Allotment(batch_size=BATCH_SIZE))
    for shard in plans.read_shards(plan):
        for table in loader.load(shard, ((0, END if shard.rows is None else shard.rows),)):
            rows = predict(table)
            is_image = pc.and_not(pc.is_null(rows[schema.SHARD_ROWS]), pc.fill_null(rows[schema.IS_EMPTY], False))
            yield rows.filter(is_image)


def speed(run: RunConfig, embedder: Embedder, cost_cluster: str, name: str) -> NetworkResult:
    """A result with the speed of a run on this machine, and its cost per million images on a cluster."""
    measured = forecast.estimate(replace(run, cluster=None), embedder)
    usd, source = _cost(measured, run, cost_cluster)
    spec = embedder.spec
    return NetworkResult(
        name,
        spec.weights,
        embedding_dim=spec.embedding_dim,
        images_per_second=measured.estimate.images_per_second,
        usd_per_million=usd,
        gpu_source=source,
    )


def _cost(measured: forecast.Forecast, run: RunConfig, cost_cluster: str) -> tuple[float | None, str]:
    """US dollars per million images, and where the speed of its GPU comes from."""
    assert measured.workload is not None
    try:
        estimate = measured.workload.on(Prices.load(run.prices).cluster(cost_cluster))
    except SettingRefused as error:
        return None, str(error)
    return estimate.usd_per_million, estimate.gpu_source
