"""The names that users import, and the files that they install."""

import inspect
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pipeline
from jobs.nightshift import COMMANDS
from pipeline import errors

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "Allotment", "Classifier", "Embedder", "Forecast", "Output", "PixelFormat", "Predictor", "Report", "RunConfig",
    "Transform", "Verification", "__version__", "estimate", "flag", "open_output", "run", "verify",
    # errors that end a job
    "InputRefused", "Interrupted", "NightshiftError", "NotWhole", "OutputLocked", "OutputRefused", "Refused",
    "SettingRefused", "StorageRefused", "TooManyErrors", "WeightsRefused",
    # errors of one image
    "DecodeError", "ImageError", "PredictError", "ReadError",
}  # fmt: skip
DEMOS = {"demo", "demo_archive", "demo_land_cover", "demo_picture", "demo_scene"}


def run_python(code: str) -> str:
    """Standard output of the code in a new process, in which nothing of the package is imported yet."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_names() -> None:
    """A snapshot: a name that is added or removed changes the public API."""
    assert set(pipeline.__all__) == NAMES
    assert list(pipeline.__all__) == sorted(pipeline.__all__)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_can_be_imported(name: str) -> None:
    namespace: dict[str, object] = {}
    exec(f"from pipeline import {name}", namespace)
    if name != "__version__":
        assert inspect.getdoc(namespace[name]), f"{name} has no docstring"


def test_every_error_is_public() -> None:
    classes = {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert classes <= NAMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'embed'"):
        pipeline.embed  # noqa: B018


def test_a_function_is_not_hidden_by_a_package_of_its_name() -> None:
    code = (
        "import pipeline.estimates.costs, pipeline.output.verify, pipeline.runner, pipeline\n"
        "from pipeline import estimate, run, verify\n"
        "print(all(map(callable, (pipeline.estimate, pipeline.run, pipeline.verify, estimate, run, verify))))"
    )
    assert run_python(code) == "True\n"


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, pipeline; print(sorted({'ray', 'torch', 'pyarrow', 'pandas'} & set(sys.modules)))"
    assert run_python(code) == "[]\n"


def test_the_types_are_public() -> None:
    assert (ROOT / "pipeline/py.typed").read_text() == ""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel of this checkout, built in a copy: setuptools writes next to the code."""
    copy = tmp_path_factory.mktemp("wheel") / "project"
    copy.mkdir()
    for folder in ("pipeline", "jobs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("nightshift-*.whl")
    with zipfile.ZipFile(built) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_whole_package(wheel: set[str]) -> None:
    paths = [
        path
        for path in (ROOT / "pipeline").rglob("*")
        if path.suffix in (".py", ".yaml", ".html", ".css", ".js", ".typed")
    ]
    files = {path.relative_to(ROOT).as_posix() for path in [*paths, ROOT / "pipeline/py.typed"]}
    assert {"pipeline/py.typed", "pipeline/estimates/prices.yaml"} <= files
    assert {name for name in wheel if name.startswith("pipeline/")} == files


def test_the_wheel_holds_the_jobs_but_no_benchmarks(wheel: set[str]) -> None:
    jobs = {name for name in wheel if name.startswith("jobs/")}
    submission = {path.relative_to(ROOT).as_posix() for path in (ROOT / "jobs/submission").glob("*.py")}
    assert len(submission) >= 5
    assert jobs == {*(f"jobs/{name}.py" for name in {"nightshift", *COMMANDS, *DEMOS}), *submission}
    assert {name.split("/")[0] for name in wheel} == {"pipeline", "jobs"}
