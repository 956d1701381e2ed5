"""Commits: the record of one part that counts, and sums over such records."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from pipeline.coverage import Ranges, count

RESULTS, ERRORS = "results", "_errors"
"""Folders of the parts."""


@dataclass(frozen=True, slots=True)
class Commit:
    """The record of one part.

    name: `part-<attempt>-<shard>-<row>`, with the first row that the part covers.
    part, errors_part: the files of results and of errors, as paths in the output; None if there is no such file.
    ranges: the rows covered, by shard. totals: number of rows of the shards whose end was read.
    rows, errors: number of rows in the two files. errors_by_type: `<stage>/<error_type>` → images.
    seconds: wall time by stage, summed over images. networks: how the network ran (device, number format) → images.
    core_seconds: CPU time of the worker processes. gpu_seconds: time in which a GPU had a batch in flight, times the
    share of the GPU. bytes_read: of encoded images. bytes_written: of the two files.
    nulls: number of null values by column of the results, without the columns that have none.
    left_out: numbers of members that are not read, by suffix, of the shards in `totals` that have any.
    constant: the rows with a result whose pixels were all equal after `--scale`, by shard.
    empty: number of images without data, which the ranges cover and which are in neither file.
    """

    name: str
    attempt: int
    part: str | None
    errors_part: str | None
    ranges: dict[int, Ranges]
    totals: dict[int, int]
    rows: int
    errors: int
    errors_by_type: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    bytes_read: int = 0
    networks: dict[str, int] = field(default_factory=dict)
    core_seconds: float = 0.0
    gpu_seconds: float = 0.0
    bytes_written: int = 0
    nulls: dict[str, int] = field(default_factory=dict)
    constant: dict[int, Ranges] = field(default_factory=dict)
    left_out: dict[int, dict[str, int]] = field(default_factory=dict)
    empty: int = 0

    @property
    def files(self) -> list[str]:
        """Paths of the files in the output."""
        return [path for path in (self.part, self.errors_part) if path]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes) -> "Commit":
        """Parse the result of `to_json`. Raises AttributeError, KeyError, TypeError or ValueError for other text."""
        record = json.loads(text)
        ranges, constant = _ranges(record.pop("ranges")), _ranges(record.pop("constant", {}))
        totals = {int(shard): rows for shard, rows in record.pop("totals").items()}
        left_out = {int(shard): counts for shard, counts in record.pop("left_out", {}).items()}
        if record["errors_part"]:  # earlier versions stored the name without its folder
            record["errors_part"] = f"{ERRORS}/{record['errors_part'].removeprefix(f'{ERRORS}/')}"
        return Commit(ranges=ranges, totals=totals, constant=constant, left_out=left_out, **record)


def _ranges(record: Mapping[str, Sequence[Sequence[int]]]) -> dict[int, Ranges]:
    """Ranges by shard from JSON, whose keys are strings."""
    return {int(shard): tuple((start, stop) for start, stop in pairs) for shard, pairs in record.items()}


@dataclass
class Tally:
    """Sums over commits.

    parts: number of commits with a part. constant: number of images. The other fields are those of `Commit`.
    """

    rows: int = 0
    errors: int = 0
    parts: int = 0
    bytes_read: int = 0
    errors_by_type: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    networks: Counter[str] = field(default_factory=Counter)
    core_seconds: float = 0.0
    gpu_seconds: float = 0.0
    bytes_written: int = 0
    nulls: Counter[str] = field(default_factory=Counter)
    constant: int = 0
    empty: int = 0

    def add(self, commit: Commit) -> None:
        self.rows += commit.rows
        self.errors += commit.errors
        self.parts += commit.part is not None
        self.bytes_read += commit.bytes_read
        self.errors_by_type.update(commit.errors_by_type)
        self.seconds.update(commit.seconds)
        self.networks.update(commit.networks)
        self.core_seconds += commit.core_seconds
        self.gpu_seconds += commit.gpu_seconds
        self.bytes_written += commit.bytes_written
        self.nulls.update(commit.nulls)
        self.constant += sum(map(count, commit.constant.values()))
        self.empty += commit.empty
