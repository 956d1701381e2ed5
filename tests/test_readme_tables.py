"""The README pages: their flags, tables, trees and links agree with the code."""

import contextlib
import importlib
import inspect
import io
import re
import shutil
import subprocess
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from pages import PAGES, ROOT, blocks, code_spans, prose, tables, text_of

import pipeline
from jobs import classify, estimate, nightshift
from pipeline import Allotment, Classifier, Embedder, NightshiftError, Predictor, RunConfig, cli, errors, schema
from pipeline.images.phash import PHash
from pipeline.report.messages import MessageFlags
from pipeline.training.finetune import FinetuneConfig
from pipeline.training.job import FitConfig

# Flags and variables


def help_flags(job: str) -> set[str]:
    """The flags that `--help` of a job shows, without `--no-…`."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        importlib.import_module(f"jobs.{job}").main(["--help"])
    flags = set(re.findall(r"^  .*?(--[a-z][a-z-]*)", shown.getvalue(), re.MULTILINE))
    return {flag for flag in flags if not flag.startswith("--no-")} - {"--help", "--config"}


def flag_rows() -> dict[str, dict[str, str]]:
    """Of the tables with defaults: job, "" for those of several jobs → flag → default."""
    rows: dict[str, dict[str, str]] = {}
    for cell, default, _ in tables("jobs/README.md", "| flag | default | meaning |"):
        job, flag = re.match(r"`(?:([a-z]+) )?(--[a-z-]+)", cell).groups()  # type: ignore[union-attr]
        rows.setdefault(job or "", {})[flag] = default
    return rows


@pytest.mark.parametrize("job", ["embed", "classify", "estimate", "verify"])
def test_the_tables_have_all_flags_of_a_job(job: str) -> None:
    rows = flag_rows()
    shared = set() if job == "verify" else set(rows[""])
    if job == "estimate":
        shared -= {f"--{name.replace('_', '-')}" for name in estimate.HIDDEN}
    assert shared | set(rows.get(job, {})) == help_flags(job)


def test_the_table_has_all_flags_of_submit() -> None:
    cells = [cell for cell, _ in tables("jobs/README.md", "| `submit` flag | meaning |")]
    assert {re.findall(r"--[a-z-]+", cell)[0] for cell in cells} == help_flags("submit")


@pytest.mark.parametrize("job", ["map", "export", "explain", "search", "serve", "duplicates", "analyze"])
def test_the_table_of_an_exploring_job_has_all_flags(job: str) -> None:
    cells = [cell for cell, _ in tables("jobs/README.md", f"| `{job}` flag | meaning |")]
    assert {re.findall(r"--[a-z-]+", cell)[0] for cell in cells} == help_flags(job)


def fit_rows(job: str = "fit") -> dict[str, str]:
    """Flag of `fit` or `finetune` → default."""
    rows = tables("jobs/README.md", f"| `{job}` flag | default | meaning |")
    return {re.findall(r"--[a-z-]+", cell)[0]: default for cell, default, _ in rows}


def test_the_table_has_all_flags_of_fit() -> None:
    of_messages = {cli.flag_name(field.name) for field in fields(MessageFlags)}
    assert {*fit_rows()} == help_flags("fit") - of_messages


def test_the_table_has_all_flags_of_compare() -> None:
    cells = [cell for cell, _ in tables("jobs/README.md", "| `compare` flag | meaning |")]
    shared = {cli.flag_name(field.name) for cls in (RunConfig, Embedder, MessageFlags) for field in fields(cls)}
    assert {re.findall(r"--[a-z-]+", cell)[0] for cell in cells} == help_flags("compare") - shared


def test_the_table_has_all_flags_of_finetune_alone() -> None:
    own = {cli.flag_name(field.name) for field in fields(FinetuneConfig)}
    assert {*fit_rows("finetune")} == own
    assert own <= help_flags("finetune")


def test_the_defaults_in_the_tables_are_those_of_the_code() -> None:
    of_jobs = (RunConfig, Embedder, Classifier, MessageFlags, estimate.EstimateFlags, classify.VectorFlags)
    defaults = {cli.flag_name(field.name): field.default for cls in of_jobs for field in fields(cls)}
    of_fit = {cli.flag_name(field.name): field.default for field in fields(FitConfig)}
    of_finetune = {cli.flag_name(field.name): field.default for field in fields(FinetuneConfig)}
    more = [(fit_rows(), of_fit), (fit_rows("finetune"), of_finetune)]
    for rows, known in [*((rows, defaults) for rows in flag_rows().values()), *more]:
        for flag, written in rows.items():
            default = known.get(flag, False)
            if isinstance(default, bool):
                assert written == ("on" if default else "off"), flag
            else:
                assert written.replace(",", "") == ("" if default in (None, "", ()) else str(default)), flag


@pytest.mark.parametrize("page", ["README.md", "jobs/README.md", "jobs/bench/README.md", "pipeline/README.md"])
def test_flags_named_in_the_text_exist(page: str) -> None:
    if not (ROOT / page).exists():
        pytest.skip(f"there is no {page}")
    known = {flag for job in nightshift.COMMANDS for flag in help_flags(job)}
    known |= {"--help", "--config"}
    for path in (ROOT / "jobs" / "bench").rglob("*.py"):
        known |= set(re.findall(r'"(--[a-z][a-z-]*)"', path.read_text()))
    named = {flag for span in code_spans(page) for flag in re.findall(r"(--[a-z][a-z-]*)", span)}
    assert {re.sub("^--no-", "--", flag) for flag in named} <= known


def test_the_environment_variables_are_those_of_the_code() -> None:
    rows = tables("jobs/README.md", "| environment variable | meaning |")
    listed = {cell.strip("`") for cell, _ in rows if cell.startswith("`NIGHTSHIFT_")}
    paths = [
        *(ROOT / "pipeline").rglob("*.py"),
        *(ROOT / "jobs").glob("*.py"),
        *(ROOT / "jobs/submission").glob("*.py"),
    ]
    assert listed == {name for path in paths for name in re.findall(r"NIGHTSHIFT_[A-Z_]+[A-Z]\b", path.read_text())}


def test_the_error_rate_named_is_the_default() -> None:
    rate = next(field.default for field in fields(RunConfig) if field.name == "max_error_rate")
    assert rate is not MISSING
    assert f"`--max-error-rate` allows ({rate:g})" in text_of("README.md")


# Tables of the output


def test_columns_are_those_of_the_schemas() -> None:
    classifier = Classifier(model="resnet18", weights="random", embeddings=True)
    classifier.prepare()
    types = {field.name: str(field.type) for field in [*schema.IDENTITY, *classifier.columns, *PHash.columns]}
    rows = {name.strip("`"): kind for name, kind, _ in tables("README.md", "| column | type | meaning |")}
    assert set(rows) == set(types)
    order = [name for name in rows if name != "embedding"]
    assert order == [name for name in types if name != "embedding"]
    for name, kind in rows.items():
        actual = re.sub(r"(element|item): | not null|\[\d+\]", "", types[name])
        written = kind.replace("&lt;", "<").replace("&gt;", ">").replace("float32 or float16", "float32")
        assert written.replace("float32", "float") == actual, name


def test_exit_codes_are_those_of_the_errors() -> None:
    raised = {
        cls.exit_code for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, NightshiftError)
    }
    listed = {int(code) for codes, _ in tables("README.md", "| code | meaning |") for code in codes.split(",")}
    assert listed == raised | {0, 130, 143}


# Names of the library


def test_all_public_names_are_documented() -> None:
    is_error = {name for name in pipeline.__all__ if name in vars(errors)}
    names = {name for name in pipeline.__all__ if name not in is_error and not name.startswith("__")}
    assert names | {"NightshiftError"} <= set(code_spans("pipeline/README.md"))


def test_the_members_of_a_predictor_exist() -> None:
    rows = tables("pipeline/README.md", "| member | purpose |")
    for cell, _ in rows:
        name, _, arguments = cell.strip("`").partition("(")
        member = inspect.getattr_static(Predictor, name)
        if arguments:
            assert [*inspect.signature(member).parameters][1:] == [arguments.rstrip(")")] * bool(arguments.rstrip(")"))
    (load,) = (purpose for cell, purpose in rows if cell.startswith("`load"))
    assert {field.name for field in fields(Allotment)} <= set(re.findall(r"`(\w+)`", load))


# Trees


def project_files() -> set[str]:
    git = shutil.which("git")
    if not git or not (ROOT / ".git").exists():
        pytest.skip("without a git checkout the files of the project are not known")
    listed = subprocess.run(
        [git, "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def tree(page: str, first: str) -> list[str]:
    """The paths in the page's tree that starts with folder `first`. A level is indented by two spaces."""
    folders: list[str] = []
    paths = []
    (block,) = (block for block in blocks(page, "text") if block.startswith(first))
    for line in block.splitlines():
        name, *description = line.split(maxsplit=1)
        assert description or line == first, line
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], name]
        paths.append("".join(folders))
    assert len(paths) == len(set(paths))
    return paths


def has_tree(folder: str) -> bool:
    page = ROOT / folder / "README.md"
    return page.exists() and f"```text\n{folder}/\n" in page.read_text()


@pytest.mark.parametrize("folder", ["pipeline", "jobs", *filter(has_tree, ["jobs/bench"])])
def test_the_tree_of_a_folder_is_complete(folder: str) -> None:
    shown = tree(f"{folder}/README.md", f"{folder}/")
    whole_folders = tuple(
        name
        for name in shown
        if name.endswith("/") and not any(other.startswith(name) for other in shown if other != name)
    )
    files = {name for name in project_files() if name.startswith(f"{folder}/") and not name.startswith(whole_folders)}
    is_left_out = {name for name in files if name.endswith("/__init__.py") and not (ROOT / name).read_text()}
    assert {name for name in shown if not name.endswith("/")} == files - is_left_out - {f"{folder}/README.md"}
    assert all((ROOT / name).is_dir() for name in whole_folders)


def test_the_tree_of_the_readme_has_all_folders() -> None:
    shown = set(tree("README.md", "pipeline/"))
    folders = {f"{parent}/" for name in project_files() for parent in Path(name).parents if parent != Path()}
    assert shown <= folders
    expected = {name for name in folders if name.count("/") <= 2 and not name.startswith((".", "tests/"))}
    assert shown == expected | {"tests/"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" not in target:
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 230
