"""The files that a command writes for the user: checked before the work, and replaced at its end."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import SettingRefused

SIDECAR = ".aux.xml"
"""Where GDAL and QGIS look for what a GeoTIFF cannot hold, such as the names of classes."""
GEO_EXTRA = "pip install 'nightshift[geo]'"


def need_geo(command: str, *modules: str) -> None:
    """Raise SettingRefused if a module of the extra [geo] is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise SettingRefused(f"{command} needs {module}: {GEO_EXTRA}")


def check_target(
    path: Path, flag: str, suffixes: tuple[str, ...], overwrite: bool, *, replaces_folder: bool = False
) -> None:
    """Raise SettingRefused for a file that cannot be written or must not be replaced.

    replaces_folder: the path may be a folder, which the caller replaces.
    """
    if "://" in str(path) or ":/" in str(path):
        raise SettingRefused(f"{flag} {path} is a URI: give a local file, and copy it to its place afterwards")
    if path.suffix.lower() not in suffixes:
        raise SettingRefused(f"{flag} {path} must end with {' or '.join(suffixes)}")
    if path.is_dir() and not replaces_folder:
        raise SettingRefused(f"{flag} {path} is a folder; remove it, or choose another name")
    if path.exists() and not overwrite:
        raise SettingRefused(f"{flag} {path} exists; choose another name or add --overwrite")
    if not path.absolute().parent.is_dir():
        raise SettingRefused(f"{flag} {path}: there is no folder {path.absolute().parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise SettingRefused(f"{flag} {path}: no permission to write to {path.absolute().parent}")


@contextmanager
def replaced(*paths: Path) -> Iterator[Path]:
    """A folder for temporary files, beside the first path. At the end, files of these names replace the paths.

    A file `NAME.aux.xml` goes with its path, and an old one is removed. After an error nothing is replaced.
    """
    parent = paths[0].absolute().parent
    with tempfile.TemporaryDirectory(prefix=f".{paths[0].name}-", dir=parent) as folder:
        yield Path(folder)
        for path in paths:
            sidecar = path.with_name(path.name + SIDECAR)
            sidecar.unlink(missing_ok=True)
            for target in (path, sidecar):
                if (made := Path(folder, target.name)).exists():
                    shutil.move(made, target)  # paths may be on different disks
