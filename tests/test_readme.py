"""The README pages: their commands, Python and SQL work, and the output has the files that they list."""

import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
import torchvision
from pages import PAGES, ROOT, blocks, code_spans, pages_with, tables, text_of
from PIL import Image
from small_run import SmallRun, run_python, small_run

from jobs import compare, estimate, nightshift, submit, verify
from jobs.classify import VectorFlags
from pipeline import Classifier, Embedder, RunConfig, cli
from pipeline.comparison.job import CompareConfig
from pipeline.estimates.machines import LOCAL, Prices

RECIPES = "jobs/README.md"
"""Its Python needs packages that need not be installed; tests/jobs/test_other_tools.py runs it."""
PREDICTORS = {"embed": Embedder, "classify": Classifier}


# Commands


def commands(page: str) -> list[list[str]]:
    """The words of all commands in the page's bash blocks, without comments."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_are_accepted(page: str, tmp_path: Path) -> None:
    for words in commands(page):
        check(words, tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_commands_in_the_text_are_accepted(page: str, tmp_path: Path) -> None:
    for span in code_spans(page):
        if re.match(r"(python jobs/|nightshift [a-z]|make [a-z])", span) and "…" not in span:
            check(shlex.split(span), tmp_path)


def check(words: list[str], folder: Path) -> None:
    """Fail unless the program that a command names would accept its arguments."""
    match words:
        case ["make", *targets]:
            makefile = text_of("Makefile")
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
        case ["ray", command, *arguments]:
            from ray.scripts.scripts import cli as ray_cli

            given = ray_cli.commands[command].make_context(command, _without_redirection(arguments)).params
            assert "cluster_config_file" not in given or (ROOT / given["cluster_config_file"]).is_file()
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), module
        case ["python", script, *arguments]:
            assert (ROOT / script).is_file(), script
            if not arguments:
                return
            if Path(script).parts[:2] == ("jobs", "bench"):
                check_benchmark(script, arguments)
            else:
                check_job(Path(script).stem, arguments, folder)
        case ["nightshift", job, *arguments]:
            assert job in nightshift.COMMANDS, f"nightshift {job}"
            if arguments:
                check_job(job, arguments, folder)
        case ["export", assignment]:
            assert re.fullmatch(r"[A-Z_]+=\w+", assignment)
        case ["pip", "install", *_, extra] if extra.startswith(".["):
            project = tomllib.loads(text_of("pyproject.toml"))["project"]
            assert extra[2:-1] in project["optional-dependencies"]
        case ["cp", _, target]:
            assert (ROOT / target).is_file()
        case ["infra/bare/cluster.sh", command, hosts]:
            done = subprocess.run([ROOT / words[0], command, folder / hosts], capture_output=True, text=True)
            assert "cannot be read" in done.stderr, "the arguments are accepted, but the file does not exist"
        case ["prometheus", "--config.file", path]:
            assert (ROOT / path).is_file()
        case ["ssh", *arguments]:
            _output("ssh", ["-G", *arguments])
        case ["docker" | "kubectl" as program, *arguments]:
            check_help(program, arguments)
        case ["embedding-atlas", *arguments]:
            shown = _output("embedding-atlas", ["--help"])
            for flag in (word for word in arguments if word.startswith("--")):
                assert not shown or flag in shown, flag
        case _:
            pytest.fail(f"this test cannot check the command {shlex.join(words)}")


def _without_redirection(arguments: list[str]) -> list[str]:
    return arguments[: arguments.index(">")] if ">" in arguments else arguments


def _output(program: str, arguments: list[str]) -> str:
    """Output of the program, "" if it is not installed. Fail if it refuses the arguments."""
    if not shutil.which(program):
        return ""
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_help(program: str, arguments: list[str]) -> None:
    """Fail unless the help of a subcommand has every long flag."""
    shown = _output(program, [arguments[0], "--help"])
    if program == "kubectl":
        shown += _output(program, ["options"])
    for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        assert not shown or re.search(rf"{flag}\b", shown), f"{program} {arguments[0]} has no {flag}"


def check_job(job: str, arguments: list[str], folder: Path) -> None:
    match job:
        case "verify":
            places = [word if word.startswith("--") else str(folder / word) for word in arguments]
            assert verify.main(places) == 2, "the arguments are accepted, but the output does not exist"
        case "fit" | "finetune":
            assert importlib.import_module(f"jobs.{job}").parser().parse_args(arguments).to
        case "classify" if "--head" in arguments:
            run_values, predictor_values, vector_values = cli.parse(Classifier, "", arguments, VectorFlags)
            RunConfig(**{"input": vector_values.get("from_"), **run_values})
            Classifier(**predictor_values)
        case "explain":
            given = importlib.import_module("jobs.explain").parser().parse_args(arguments)
            assert given.id
            assert not Path(given.output).exists()
        case "compare":
            _, config_values, run_values, network_values, _ = cli.parsed(compare.parser(), compare.CLASSES, arguments)
            CompareConfig(**config_values)
            RunConfig(**{"output": "unused", **run_values})
            Embedder(**network_values)
        case "search" | "serve" | "index" | "duplicates" | "analyze":
            given = importlib.import_module(f"jobs.{job}").parser().parse_args(arguments)
            assert not Path(given.output).exists()
        case "map" | "export":
            given = importlib.import_module(f"jobs.{job}").parser().parse_args(arguments)
            assert given.to or given.png
            assert not Path(given.output).exists()
        case "submit":
            given, job_arguments = submit.parse(arguments)
            if given.job:
                submit.check(given.job, job_arguments, given.working_dir)
        case "estimate":
            run_values, network_values, _ = cli.parse(Embedder, "", arguments, estimate.EstimateFlags)
            config = RunConfig(**{"output": "unused", **run_values})
            Prices.load().cluster(config.cluster or LOCAL)
            Embedder(**network_values)
        case _:
            run_values, predictor_values = cli.parse(PREDICTORS[job], "", arguments)
            RunConfig(**run_values)
            PREDICTORS[job](**predictor_values)


def check_benchmark(script: str, arguments: list[str]) -> None:
    """Parse the arguments, or, without a `parser` function, look for the flags in the source."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if hasattr(module, "parser"):
        module.parser().parse_args(arguments)
        return
    for flag in (word for word in arguments if word.startswith("--")):
        assert f'"{flag}"' in text_of(script), f"{script} has no {flag}"


# Python and SQL


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return small_run(tmp_path_factory)


@pytest.fixture
def user_folder(demo: SmallRun, tmp_path: Path) -> Path:
    """A folder as the examples expect it: outputs, a few photos, a file of weights."""
    for name in ("embeddings", "labels"):
        (tmp_path / name).symlink_to(demo.folder / name)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.jpg")
    torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), tmp_path / "weights.pt")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages_with("python") if page != RECIPES])
def test_python_runs(page: str, user_folder: Path) -> None:
    """Each block of a page by itself, as the main module of one process."""
    script = user_folder / "blocks.py"
    script.write_text(
        "import sys\n"
        f"for number, block in enumerate({blocks(page, 'python')!r}):\n"
        "    print('block', number, flush=True)\n"
        "    exec(compile(block, f'block {number}', 'exec'), {'__name__': '__main__'})\n"
    )
    printed = run_python(script, cwd=user_folder)
    if page == "README.md":
        assert "6 0 {}" in printed, "the counts of the report"
    if page == "pipeline/README.md":
        assert "whole: every planned image is exactly one row" in printed
        histograms = duckdb.sql(
            f"SELECT list_sum(histogram) FROM '{user_folder}/histograms/results/*.parquet'"
        ).fetchall()
        assert [round(total, 3) for (total,) in histograms] == [1.0] * 6


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("sql"))
def test_sql_runs(page: str, user_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_folder)
    for query in blocks(page, "sql"):
        assert duckdb.sql(query).fetchall(), query


@pytest.mark.slow
def test_the_output_has_the_files_of_the_table(demo: SmallRun) -> None:
    listed = {name.strip("`").rstrip("/") for name, _ in tables("README.md", "| file | contents |")}
    for output in ("embeddings", "labels"):
        folder = demo.folder / output
        names = {path.name for path in folder.iterdir() if path.name != "results"}
        parts = {
            re.sub(r"part-.*\.parquet", "part-….parquet", f"results/{path.name}") for path in folder.glob("results/*")
        }
        assert names | parts == listed - {"_lock.json"}
