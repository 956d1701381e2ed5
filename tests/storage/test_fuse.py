"""An output on a real FUSE file system, a folder mounted by rclone: without hard links and exclusive renames."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs.bench.harness import s3
from pipeline.errors import NightshiftError
from pipeline.output.lock import Lock
from pipeline.storage import access
from pipeline.threads import ordered_map


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not os.access("/dev/fuse", os.W_OK) or not shutil.which("fusermount3"):
        pytest.skip("no FUSE here: it needs /dev/fuse and Debian's package fuse3")
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("mount")
    command = [s3.rclone(), "mount", str(base), str(folder), "--vfs-cache-mode", "writes"]
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        stack.callback(process.terminate)  # rclone unmounts before it ends
        deadline = time.monotonic() + 30
        while not os.path.ismount(folder):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.skip("rclone cannot mount here")
            time.sleep(0.05)
        yield folder


def test_one_of_many_creators_wins(mount: Path) -> None:
    def create(number: int) -> bool:
        try:
            access.create(f"{mount}/race/one", b"%d" % number)
        except FileExistsError:
            return False
        return True

    won = list(ordered_map(create, range(50), 8, 64))
    assert sum(won) == 1
    assert access.read(f"{mount}/race/one") == b"%d" % won.index(True)
    assert os.listdir(mount / "race") == ["one"]


def test_files_are_written_replaced_listed_and_deleted(mount: Path) -> None:
    folder = f"{mount}/files"
    for data in (b"1", b"22"):
        access.write(f"{folder}/a", data)
        assert access.read(f"{folder}/a") == data
    assert [info.uri for info in access.list_objects(folder)] == [f"{folder}/a"]
    access.delete(f"{folder}/a")
    assert list(access.list_objects(folder)) == []


def test_a_second_driver_is_refused(mount: Path) -> None:
    output = f"{mount}/output"
    with Lock(output), pytest.raises(NightshiftError, match="is in use by process"), Lock(output):
        pass
    with Lock(output):
        pass
