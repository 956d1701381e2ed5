"""The working directory as one zip: all that the cluster gets of this machine."""

from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from pathspec import GitIgnoreSpec

from pipeline.errors import SettingRefused

LIMIT_BYTES = 100 << 20
LEFT_OUT = GitIgnoreSpec.from_lines([".git", ".venv", "venv", "__pycache__", "/data"])
Rules = tuple[tuple[Path, GitIgnoreSpec], ...]


def pack(folder: Path, target: Path) -> None:
    """Write the files of a folder to a zip, the same bytes for the same files: Ray uploads what it has not seen yet.

    Raises SettingRefused, before anything is written, if they are larger than LIMIT_BYTES.
    """
    chosen = []
    size_bytes = 0
    for path in files(folder):
        chosen.append(path)
        size_bytes += path.stat().st_size
        if size_bytes > LIMIT_BYTES:
            raise SettingRefused(
                f"--working-dir {folder} holds more than {LIMIT_BYTES >> 20} MB, and every node copies it: name what "
                "the job does not need in its .gitignore, or name another folder"
            )
    with ZipFile(target, "w", ZIP_DEFLATED) as archive:
        for path in chosen:
            entry = ZipInfo(path.relative_to(folder).as_posix(), date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = ZIP_DEFLATED
            entry.external_attr = path.stat().st_mode << 16
            archive.writestr(entry, path.read_bytes())


def files(folder: Path) -> Iterator[Path]:
    """The files below a folder, sorted, without LEFT_OUT and what its .gitignore files name.

    Links to files are followed, links to folders are not.
    """
    return _below(folder, folder, ())


def _below(current: Path, top: Path, rules: Rules) -> Iterator[Path]:
    own = current / ".gitignore"
    if own.is_file():
        rules = (*rules, (current, GitIgnoreSpec.from_lines(own.read_text().splitlines())))
    for path in sorted(current.iterdir()):
        is_folder = path.is_dir()
        if _matches(LEFT_OUT, path, top, is_folder) or _is_ignored(path, is_folder, rules):
            continue
        if not is_folder and path.is_file():
            yield path
        elif is_folder and not path.is_symlink():
            yield from _below(path, top, rules)


def _is_ignored(path: Path, is_folder: bool, rules: Rules) -> bool:
    """As git decides it: by the last pattern that matches, of the .gitignore nearest to the file."""
    found = (_matches(spec, path, base, is_folder) for base, spec in reversed(rules))
    return next((answer for answer in found if answer is not None), False)


def _matches(spec: GitIgnoreSpec, path: Path, base: Path, is_folder: bool) -> bool | None:
    """None where no pattern speaks of the path."""
    return spec.check_file(f"{path.relative_to(base).as_posix()}{'/' if is_folder else ''}").include
