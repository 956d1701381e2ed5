"""infra/docker: pinned bases, no root, and only what it needs in the build."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

DOCKER = ROOT / "infra" / "docker"


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("there is no hadolint for this machine")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def instructions() -> list[list[str]]:
    lines = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def test_the_images_bases_are_pinned_and_its_users_are_not_root() -> None:
    stages, users = {"scratch": ""}, {}
    for words in instructions():
        if words[0] == "FROM":
            base, stage = words[1], words[3]
            assert base in stages or re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base), f"{base} is not pinned"
            stages[stage] = base
            users[stage] = users.get(base, "root")
        elif words[0] == "USER":
            users[stage] = words[1]
    assert {users["cpu"], users["cuda"]} == {"1000:1000"}
    version = "{}.{}".format(*sys.version_info)
    assert stages["base"].startswith(f"python:{version}."), "constraints.txt is of this Python"


def test_a_login_shell_of_the_image_finds_ray(tmp_path: Path) -> None:
    """`ray up` runs everything in one, and Debian's /etc/profile sets PATH anew before it reads what the image adds."""
    (words,) = (words for words in instructions() if "/etc/profile.d/nightshift.sh" in words)
    line = " ".join(words).split("&&")[-1].replace("/etc/profile.d", str(tmp_path)).replace("/opt/venv", str(tmp_path))
    subprocess.run(["sh", "-c", line], check=True)
    ray_program = tmp_path / "bin" / "ray"
    ray_program.parent.mkdir()
    ray_program.touch(mode=0o755)
    shell = f"PATH=/usr/local/bin:/usr/bin:/bin; . {tmp_path}/nightshift.sh; command -v ray; command -v ls"
    done = subprocess.run(["bash", "--noprofile", "-c", shell], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[0] == str(ray_program)
    assert done.returncode == 0, "the rest of PATH is kept"


def test_the_driver_is_found_where_gke_mounts_it() -> None:
    stage, found = "", []
    for words in instructions():
        stage = words[3] if words[0] == "FROM" else stage
        found += [(stage, word) for word in words if word.startswith("LD_LIBRARY_PATH=")]
    assert found == [("cuda", "LD_LIBRARY_PATH=/usr/local/nvidia/lib64")]


def test_the_build_sees_what_it_copies_and_no_more() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    let_in = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        word for words in instructions() if words[0] == "COPY" and "--from" not in words[1] for word in words[1:-1]
    }
    assert copied == let_in
    assert all((ROOT / name).exists() for name in let_in)


def test_the_project_names_no_package_index() -> None:
    assert ["ARG", "TORCH_INDEX"] in instructions(), "given by who builds, without a default"
    assert not re.search(r"https?://", (DOCKER / "Dockerfile").read_text())
