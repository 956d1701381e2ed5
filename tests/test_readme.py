"""The README's commands, Python, SQL, tables and tree are those of the code."""

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from small_run import SmallRun, run_python, small_run

from jobs import bench_estimate, bench_gpu, benchmark, plan, submit, verify
from pipeline import Classifier, Embedder, NightshiftError, RunConfig, cli, errors, schema
from pipeline.machines import LOCAL, Prices

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "infra/README.md")
BENCHMARKS = {"benchmark": benchmark, "bench_gpu": bench_gpu, "bench_estimate": bench_estimate}
PREDICTORS = {"embed": Embedder, "classify": Classifier}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of every command in the page's bash blocks, without comments."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def table(header: str) -> Iterator[list[str]]:
    """The cells of the README's table with this header, a row at a time."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index(header) + 2
    for line in lines[start:]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split("|")]


def check(words: list[str], folder: Path) -> None:
    """Fail unless the program that a command names would accept its arguments."""
    match words:
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text()
            for target in targets:
                variable, is_variable, _ = target.partition("=")
                if is_variable:
                    assert f"$({variable})" in makefile
                    continue
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
        case ["source", path]:
            assert path == ".venv/bin/activate"
        case ["ray", "job", "submit", *arguments]:
            from ray.dashboard.modules.job.cli import submit as ray_submit

            given = ray_submit.make_context("submit", arguments).params
            assert given["working_dir"] == ".", "without it the cluster has no jobs/"
            check(list(given["entrypoint"]), folder)
        case ["python", "jobs/submit.py", *arguments]:
            before, after = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
            given = submit.parser().parse_args(before)
            check_job(given.job, after, folder)
        case ["python", script, *arguments]:
            assert (ROOT / script).is_file()
            check_job(Path(script).stem, arguments, folder)
        case ["nightshift", job, *arguments]:
            check_job(job, arguments, folder)
        case ["ray", command, *arguments]:
            from ray.scripts.scripts import cli as ray_cli

            given = ray_cli.commands[command].make_context(command, _without_redirection(arguments)).params
            assert "cluster_config_file" not in given or (ROOT / given["cluster_config_file"]).is_file()
        case ["export", assignment]:
            assert re.fullmatch(r"[A-Z_]+=\w+", assignment)
        case ["pip", "install", "--constraint", "constraints.txt", "--editable", extra]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            assert extra[2:-1] in project["optional-dependencies"]
        case ["infra/bare/cluster.sh", command, hosts]:
            done = subprocess.run([ROOT / words[0], command, folder / hosts], capture_output=True, text=True)
            assert "cannot be read" in done.stderr, "parsed, but there is no such list"
        case ["ssh", *arguments]:
            _check_with("ssh", ["-G", *arguments])
        case ["docker" | "kubectl" as program, *arguments]:
            check_help(program, arguments)
        case _:
            pytest.fail(f"nothing here can check the command {shlex.join(words)}")


def _without_redirection(arguments: list[str]) -> list[str]:
    return arguments[: arguments.index(">")] if ">" in arguments else arguments


def _check_with(program: str, arguments: list[str]) -> str:
    """What the program prints; fail if it takes the arguments ill. Without the program nothing can be said."""
    if not shutil.which(program):
        return ""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_help(program: str, arguments: list[str]) -> None:
    """Fail unless the help of a subcommand knows every long flag."""
    shown = _check_with(program, [arguments[0], "--help"])
    if program == "kubectl":
        shown += _check_with(program, ["options"])
    for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert not shown or re.search(rf"{flag}\b", shown), f"{program} {arguments[0]} has no {flag}"


def check_job(job: str, arguments: list[str], folder: Path) -> None:
    if job == "verify":
        places = [word if word.startswith("--") else str(folder / word) for word in arguments]
        assert verify.main(places) == 2, "parsed, but nothing is there"
        return
    if job == "submit":
        given, job_arguments = submit.parse(arguments)
        submit.check(given.job, job_arguments, given.working_dir)
        return
    if job in BENCHMARKS:
        BENCHMARKS[job].parser().parse_args(arguments)
        return
    if job == "plan":
        run_values, network_values, _ = cli.parse(Embedder, "", arguments, plan.Own)
        config = RunConfig(**{"output": "unused", **run_values})
        Prices.load().cluster(config.cluster or LOCAL)
        Embedder(**network_values)
        return
    run_values, predictor_values = cli.parse(PREDICTORS[job], "", arguments)
    RunConfig(**run_values)
    PREDICTORS[job](**predictor_values)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page: str, tmp_path: Path) -> None:
    found = commands(page)
    assert found
    for words in found:
        check(words, tmp_path)


def test_flags_named_in_the_text_exist() -> None:
    flags = {
        field.name.replace("_", "-") for cls in (RunConfig, Embedder, Classifier, plan.Own) for field in fields(cls)
    }
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    flags |= {flag.removeprefix("--") for action in submit.parser()._actions for flag in action.option_strings}
    named = {flag for span in re.findall(r"`([^`\n]+)`", text) for flag in re.findall(r"--([a-z][a-z-]*)", span)}
    assert "max-error-rate" in named
    of_other_jobs = {"trained", "images", "small", "large"}  # fidelity.py, benchmark.py
    assert named <= flags | {"help", "config"} | of_other_jobs


def test_the_error_rate_named_is_the_default() -> None:
    rate = next(field.default for field in fields(RunConfig) if field.name == "max_error_rate")
    assert rate is not MISSING
    assert f"`--max-error-rate` allows ({rate:g})" in (ROOT / "README.md").read_text()


def test_columns_are_those_of_the_schemas() -> None:
    classifier = Classifier(model="resnet18", weights="random", embeddings=True)
    classifier.prepare()
    types = {field.name: str(field.type) for field in [*schema.IDENTITY, *classifier.columns]}
    rows = {name.strip("`"): kind for name, kind, _ in table("| column | type | what it is |")}
    assert set(rows) == set(types)
    order = [name for name in rows if name != "embedding"]
    assert order == [name for name in types if name != "embedding"]
    for name, kind in rows.items():
        found = re.sub(r"(element|item): | not null|\[\d+\]", "", types[name])
        written = kind.replace("&lt;", "<").replace("&gt;", ">").replace("float32 or float16", "float32")
        assert written.replace("float32", "float") == found, name


def test_exit_codes_are_those_of_the_errors() -> None:
    raised = {
        cls.exit_code for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, NightshiftError)
    }
    listed = {int(code) for codes, _ in table("| code | meaning |") for code in codes.split(",")}
    assert listed == raised | {0, 130, 143}


def test_the_tree_is_complete() -> None:
    git = shutil.which("git")
    if not git or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout: which files belong to the project is not known")
    listed = subprocess.run(
        [git, "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = {name for name in listed.stdout.splitlines() if not name.startswith(".") and (ROOT / name).exists()}
    shown = list(tree())
    whole_folders = tuple(name for name in shown if name.endswith("/") and not _has_children(name, shown))
    assert len(shown) == len(set(shown))
    assert {name for name in names if not name.startswith(whole_folders)} == {n for n in shown if not n.endswith("/")}
    assert all((ROOT / name).is_dir() for name in whole_folders)


def tree() -> Iterator[str]:
    """The paths of the README's tree; a line's place is told by its indentation, two spaces a level."""
    folders: list[str] = []
    (block,) = (block for block in blocks("README.md", "text") if block.startswith("pipeline/"))
    for line in block.splitlines():
        name, description = line.split(maxsplit=1)
        assert description
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        yield "".join(folders)


def _has_children(folder: str, names: list[str]) -> bool:
    return any(name.startswith(folder) and name != folder for name in names)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return small_run(tmp_path_factory)


@pytest.fixture
def user_folder(demo: SmallRun, tmp_path: Path) -> Path:
    """A folder as the README's examples find it: outputs, a few photos, weights of one's own."""
    for name in ("embeddings", "labels"):
        (tmp_path / name).symlink_to(demo.folder / name)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.jpg")
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "weights.pt")
    return tmp_path


@pytest.mark.slow
def test_python_runs(user_folder: Path) -> None:
    """Every block by itself, as the main module of one process."""
    found = blocks("README.md", "python")
    assert len(found) >= 3
    script = user_folder / "blocks.py"
    script.write_text(
        "import sys\n"
        f"for number, block in enumerate({found!r}):\n"
        "    print('block', number, flush=True)\n"
        "    exec(compile(block, f'README block {number}', 'exec'), {'__name__': '__main__'})\n"
    )
    printed = run_python(script, cwd=user_folder)
    assert "6 0 {}" in printed, "the report's counts"
    brightness = duckdb.sql(f"SELECT brightness FROM '{user_folder}/brightness/part-*.parquet'").fetchall()
    assert len(brightness) == 6
    assert all(0.3 < value < 0.7 for (value,) in brightness), "noise is mid-grey"


@pytest.mark.slow
def test_sql_runs(user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_folder)
    found = blocks("README.md", "sql")
    assert found
    for query in found:
        assert duckdb.sql(query).fetchall(), query


@pytest.mark.slow
def test_the_output_holds_the_files_that_are_listed(demo: SmallRun) -> None:
    listed = {name.strip("`").rstrip("/") for name, _ in table("| file | what it is |")}
    for output in ("embeddings", "labels"):
        names = {path.name for path in (demo.folder / output).iterdir()}
        assert {re.sub(r"^part-.*\.parquet$", "part-….parquet", name) for name in names} == listed - {"_lock.json"}


@pytest.mark.slow
def test_the_demo_shows_rows_and_errors_and_three_commands(demo: SmallRun) -> None:
    for printed in (demo.first, demo.again):
        assert printed.count("whole: every planned image is exactly one row") == 2
        assert "truncated" in printed
        assert len(printed.partition("\nnext:\n")[2].splitlines()) == 3
    assert "make_demo_archive.py" in demo.first
    assert "make_demo_archive.py" not in demo.again


@pytest.mark.slow
def test_the_demo_has_nothing_to_do_the_second_time(demo: SmallRun) -> None:
    for output in ("embeddings", "labels"):
        attempts = [path.name for path in (demo.folder / output / "_attempts").iterdir()]
        assert attempts == ["1.json"], "the second run began no attempt"
