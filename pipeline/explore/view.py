"""The rows of an output that an export writes: those of some choices, with vectors of fewer numbers if asked for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline import schema as schemas
from pipeline.explore.pca import Components
from pipeline.explore.table import BATCH_ROWS, Choice, Output
from pipeline.explore.vectors import COLUMN, view_vectors


@dataclass(frozen=True)
class View:
    """Chosen rows of an output. It is read as an `Output` is, by `batches`.

    components: multiply the vectors by these; None to leave them as they are.
    """

    output: Output
    choices: tuple[Choice, ...] = ()
    components: Components | None = None

    @property
    def uri(self) -> str:
        return self.output.uri

    @property
    def record(self) -> Mapping[str, Any]:
        return self.output.record

    @property
    def settings(self) -> Mapping[str, Any]:
        """Those of the run; {} if the vectors are changed, because they are then not of the run's embedding space."""
        return {} if self.components else self.output.settings

    @cached_property
    def schema(self) -> pa.Schema:
        """Schema of the batches."""
        columns = self.output.schema
        if self.components is None:
            return columns
        place = columns.get_field_index(COLUMN)
        return columns.set(place, pa.field(COLUMN, schemas.vector(pa.float32(), self.components.count)))

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.schema.names)

    def batches(self, columns: Sequence[str], batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """Yield the chosen rows in the order of the output. Raises OutputRefused as `Output.batches` does."""
        if not self.choices:
            for batch in self.output.batches(columns, batch_rows):
                yield from self._reduced(pa.Table.from_batches([batch])).to_batches()
            return
        for block in self.output.blocks(columns, self.choices):
            yield from self._reduced(block.table).to_batches(max_chunksize=batch_rows)

    def _reduced(self, table: pa.Table) -> pa.Table:
        if self.components is None or COLUMN not in table.column_names:
            return table
        column = table[COLUMN]
        flat = self.components.project(view_vectors(column, column.type.list_size)).reshape(-1)
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=self.schema.field(COLUMN).type)
        return table.set_column(table.schema.get_field_index(COLUMN), self.schema.field(COLUMN), vectors)
