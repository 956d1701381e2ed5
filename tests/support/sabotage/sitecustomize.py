"""Kill a job at a chosen moment while it writes. Every Python process with this folder on its path imports this module.

SABOTAGE="<where>:<n>:<folder>": at the n-th write of this kind, the driver and the writing process are killed with
SIGKILL. The writes are counted over all processes by files in the folder; <folder>/driver has the driver's process id.
where: part-half, before-commit, commit-half, after-commit.
"""

import os
import signal

WHERE, COUNT, FOLDER = os.environ.get("SABOTAGE", "::").split(":")


def die() -> None:
    with open(os.path.join(FOLDER, "driver")) as file:
        os.kill(int(file.read()), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def is_the_nth(path: str) -> bool:
    """Count the writes of the chosen kind. Returns True at the n-th one."""
    is_commit = "/_commits/" in path
    is_part = path.endswith(".parquet") and "/part-" in path and "/_errors/" not in path
    if not (is_part if WHERE.startswith("part") else is_commit):
        return False
    for number in range(1, 10_000):
        try:
            os.close(os.open(os.path.join(FOLDER, f"{WHERE}-{number}"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return number == int(COUNT)
    return False


def plant() -> None:
    from pipeline.storage.local import TEMPORARY, LocalStore

    write_whole = LocalStore._temporary
    create = LocalStore.create

    def write_half(path: str, data: bytes, temporary_folder: str | None = None) -> str:
        if WHERE.endswith("-half") and is_the_nth(path):
            folder, name = os.path.split(path)
            with open(os.path.join(temporary_folder or folder, f".{name}.half{TEMPORARY}"), "wb") as file:
                file.write(data[: len(data) // 2])
            die()
        return write_whole(path, data, temporary_folder)

    def create_or_die(self: LocalStore, path: str, data: bytes) -> None:
        is_chosen = WHERE in ("before-commit", "after-commit") and is_the_nth(path)
        if is_chosen and WHERE == "before-commit":
            die()
        create(self, path, data)
        if is_chosen:
            die()

    LocalStore._temporary = staticmethod(write_half)
    LocalStore.create = create_or_die


if WHERE:
    plant()
