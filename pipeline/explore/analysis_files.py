"""The files of `analyze --to FOLDER`. They appear together, at the end."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import SettingRefused

IMAGES, CHANGES = "images.parquet", "changes.parquet"
CLUSTERS, CLASSES, FIGURES = "clusters.parquet", "classes.parquet", "analysis.json"
FILES = (IMAGES, CHANGES, CLUSTERS, CLASSES, FIGURES)


class AnalysisFiles:
    """Writes the files to a folder, None for none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._writers: dict[str, pq.ParquetWriter] = {}

    def write_images(self, rows: pa.Table) -> None:
        self._append(IMAGES, rows)

    def write_changes(self, rows: pa.Table) -> None:
        self._append(CHANGES, rows)

    def write_analysis(self, figures: Mapping[str, Any], clusters: pa.Table, classes: pa.Table) -> None:
        """Write the small files, and end the large ones."""
        for writer in self._writers.values():
            writer.close()
        if self.folder is None:
            return
        for name, table in ((CLUSTERS, clusters), (CLASSES, classes)):
            if table.num_columns:
                pq.write_table(table, self.folder / name)
        (self.folder / FIGURES).write_text(json.dumps(figures, indent=1), encoding="utf-8")

    def _append(self, name: str, rows: pa.Table) -> None:
        if self.folder is None:
            return
        if name not in self._writers:
            self._writers[name] = pq.ParquetWriter(self.folder / name, rows.schema, compression="zstd")
        if len(rows):
            self._writers[name].write_table(rows)


def check_folder(to: Path, overwrite: bool) -> None:
    """Raise SettingRefused for a folder that cannot be written, or that has other files."""
    if "://" in str(to) or ":/" in str(to):
        raise SettingRefused(f"--to {to} is a URI: give a local folder, and copy it to its place afterwards")
    if to.exists() and not to.is_dir():
        raise SettingRefused(f"--to {to} is a file: give a folder")
    names = sorted(path.name for path in to.iterdir()) if to.is_dir() else []
    if foreign := [name for name in names if name not in FILES]:
        raise SettingRefused(f"--to {to} has other files ({foreign[0]}): give a new folder")
    if names and not overwrite:
        raise SettingRefused(f"--to {to} has an analysis; choose another folder or add --overwrite")
    parent = to.absolute().parent
    if not parent.is_dir():
        raise SettingRefused(f"--to {to}: there is no folder {parent}")
    if not os.access(to if to.is_dir() else parent, os.W_OK):
        raise SettingRefused(f"--to {to}: no permission to write to {to if to.is_dir() else parent}")


@contextmanager
def opened(to: Path | None, overwrite: bool) -> Iterator[AnalysisFiles]:
    """Files for an analysis, in a temporary folder until the context ends. After an error nothing is replaced.

    Raises SettingRefused as `check_folder` does.
    """
    if to is None:
        yield AnalysisFiles(None)
        return
    check_folder(to, overwrite)
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.absolute().parent) as temporary:
        yield AnalysisFiles(Path(temporary))
        to.mkdir(exist_ok=True)
        for name in FILES:
            (to / name).unlink(missing_ok=True)
        for path in Path(temporary).iterdir():
            os.replace(path, to / path.name)
