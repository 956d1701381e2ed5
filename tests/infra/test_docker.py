"""infra/docker: pinned base images, a user that is not root, and a small build context."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from servers import ROOT

DOCKER = ROOT / "infra" / "docker"


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint has no build for this machine")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def instructions() -> list[list[str]]:
    lines = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def test_base_images_are_pinned_and_users_are_not_root() -> None:
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
    assert stages["base"].startswith(f"python:{version}."), "constraints.txt is for this version of Python"


def test_a_login_shell_of_the_image_finds_ray(tmp_path: Path) -> None:
    """`ray up` uses a login shell, in which Debian's /etc/profile resets PATH before it reads the image's file."""
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


def test_the_linker_searches_the_folder_where_gke_mounts_the_driver() -> None:
    stage, variables = "", []
    for words in instructions():
        stage = words[3] if words[0] == "FROM" else stage
        variables += [(stage, word) for word in words if word.startswith("LD_LIBRARY_PATH=")]
    assert variables == [("cuda", "LD_LIBRARY_PATH=/usr/local/nvidia/lib64")]


def test_the_build_context_is_exactly_what_is_copied() -> None:
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    admitted = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        word for words in instructions() if words[0] == "COPY" and "--from" not in words[1] for word in words[1:-1]
    }
    assert copied == admitted
    assert all((ROOT / name).exists() for name in admitted)


def test_the_project_names_no_package_index() -> None:
    assert ["ARG", "TORCH_INDEX"] in instructions(), "set by the builder; it has no default"
    assert not re.search(r"https?://", (DOCKER / "Dockerfile").read_text())
