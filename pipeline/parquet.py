"""Parquet files, opened so that only the caller's thread reads them."""

from typing import Any

import pyarrow.parquet as pq


def open_parquet(file: Any, **options: Any) -> pq.ParquetFile:
    """A binary file, for reads with `use_threads=False`. Raises pa.ArrowException and OSError.

    By default pyarrow 26 reads ahead on a thread of its own. That may hold the last reference to the Python file, and
    where it lets go while the interpreter ends, the process aborts: one `jobs/verify.py` in a hundred did.
    """
    return pq.ParquetFile(file, pre_buffer=False, **options)
