"""Open Parquet files for reads on the caller's thread only."""

from typing import Any

import pyarrow.parquet as pq


def open_parquet(file: Any, **options: Any) -> pq.ParquetFile:
    """Open a binary file for reads with `use_threads=False`. Raises pa.ArrowException and OSError.

    By default pyarrow 26 prefetches on a thread of its own, which may hold the last reference to the Python file. If it
    releases the file while the interpreter exits, the process aborts. This happened in 1 % of `jobs/verify.py` runs.
    """
    return pq.ParquetFile(file, pre_buffer=False, **options)
