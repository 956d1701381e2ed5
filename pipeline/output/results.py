"""The rows that a run has written, by shard: which are done, and values of their columns."""

from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import coverage
from pipeline.coverage import Ranges
from pipeline.errors import OutputRefused, message_line
from pipeline.output import ledger as ledgers
from pipeline.storage import access, uris
from pipeline.storage.parquet import open_parquet

CACHED_PARTS = 4

Numbers = NDArray[np.int64]


class RunResults:
    """The committed rows of an output directory. Reads the commits once, and of a part only the columns asked for."""

    def __init__(self, output: str) -> None:
        self.output = output
        self._read = lru_cache(CACHED_PARTS)(self._columns)

    def covered(self, shard: int) -> Ranges:
        """The rows of a shard that are done, as results or as errors."""
        return coverage.normalize(each for _, ranges in self._commits.get(shard, ()) for each in ranges)

    def hashes(self, shard: int, column: str) -> tuple[Numbers, Numbers]:
        """Rows of a shard that are results, and their values of a column of int64, where it is not null."""
        tables = [self._read(part, column) for part, _ in self._commits.get(shard, ()) if part]
        empty = pa.table({"row": pa.array([], pa.int64()), column: pa.array([], pa.int64())})
        rows = [table.filter(pc.equal(table["shard"], shard)).select(["row", column]) for table in tables]
        table = pa.concat_tables([empty, *rows]).drop_null()
        return table["row"].to_numpy(), table[column].to_numpy()

    @cached_property
    def _commits(self) -> dict[int, list[tuple[str | None, Ranges]]]:
        """The part and the rows of each commit, by shard."""
        commits: dict[int, list[tuple[str | None, Ranges]]] = {}
        for commit in ledgers.valid_commits(self.output, ledgers.last_attempt(self.output)):
            for shard, ranges in commit.ranges.items():
                commits.setdefault(shard, []).append((commit.part, ranges))
        return commits

    def _columns(self, part: str, column: str) -> Any:
        """shard, row and one column of a part; that column is null if the part does not have it."""
        uri = uris.join(self.output, part)
        try:
            with access.open_read(uri) as file:
                parquet = open_parquet(file, page_checksum_verification=True)
                has_column = column in parquet.schema_arrow.names
                table = parquet.read(["shard", "row", *([column] if has_column else [])], use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise OutputRefused(
                f"{uri} cannot be read: {message_line(error)}; run jobs/verify.py {self.output} --repair, which "
                "removes it, and then the same command without --update, which computes it again"
            ) from error
        return table if has_column else table.append_column(column, pa.nulls(len(table), pa.int64()))
