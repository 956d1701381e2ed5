"""Pack the working directory into one zip, which is all that the cluster gets of this machine."""

from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from pathspec import GitIgnoreSpec

from pipeline.errors import SettingRefused

MAX_BYTES = 100 << 20
EXCLUDED = GitIgnoreSpec.from_lines([".git", ".venv", "venv", "__pycache__", "/data"])
Rules = tuple[tuple[Path, GitIgnoreSpec], ...]
"""(folder, its .gitignore), from the top folder down."""


def pack(folder: Path, target: Path) -> None:
    """Write the files of a folder to a zip. Equal files make equal bytes, which Ray then does not upload again.

    Raises SettingRefused, before it writes anything, if the files are larger than MAX_BYTES together.
    """
    paths = []
    size_bytes = 0
    for path in files(folder):
        paths.append(path)
        size_bytes += path.stat().st_size
        if size_bytes > MAX_BYTES:
            raise SettingRefused(
                f"--working-dir {folder} has more than {MAX_BYTES >> 20} MB, and every node copies it: add files that "
                "the job does not need to its .gitignore, or use another folder"
            )
    with ZipFile(target, "w", ZIP_DEFLATED) as archive:
        for path in paths:
            entry = ZipInfo(path.relative_to(folder).as_posix(), date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = ZIP_DEFLATED
            entry.external_attr = path.stat().st_mode << 16
            archive.writestr(entry, path.read_bytes())


def files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, sorted, except EXCLUDED and those that its .gitignore files name.

    Follows links to files, but not links to folders.
    """
    return _below(folder, folder, ())


def _below(current: Path, top: Path, rules: Rules) -> Iterator[Path]:
    gitignore = current / ".gitignore"
    if gitignore.is_file():
        rules = (*rules, (current, GitIgnoreSpec.from_lines(gitignore.read_text().splitlines())))
    for path in sorted(current.iterdir()):
        is_folder = path.is_dir()
        if _matches(EXCLUDED, path, top, is_folder) or _is_ignored(path, is_folder, rules):
            continue
        if not is_folder and path.is_file():
            yield path
        elif is_folder and not path.is_symlink():
            yield from _below(path, top, rules)


def _is_ignored(path: Path, is_folder: bool, rules: Rules) -> bool:
    """Decide as git does: by the last matching pattern of the .gitignore that is nearest to the file."""
    answers = (_matches(spec, path, base, is_folder) for base, spec in reversed(rules))
    return next((answer for answer in answers if answer is not None), False)


def _matches(spec: GitIgnoreSpec, path: Path, base: Path, is_folder: bool) -> bool | None:
    """True if the path is ignored, False if a pattern with "!" includes it, None if no pattern matches."""
    return spec.check_file(f"{path.relative_to(base).as_posix()}{'/' if is_folder else ''}").include
