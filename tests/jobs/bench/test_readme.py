"""jobs/bench/README.md names every benchmark, and the Makefile runs benchmarks that exist."""

import re

from whole import ROOT

FOLDER = ROOT / "jobs" / "bench"
README = (FOLDER / "README.md").read_text()
SCRIPT = r"python (jobs/bench/\w+\.py)"


def test_every_benchmark_has_a_command() -> None:
    shown = set(re.findall(SCRIPT, README))
    assert shown == {str(path.relative_to(ROOT)) for path in FOLDER.glob("*.py")}


def test_make_runs_benchmarks_that_exist() -> None:
    scripts = re.findall(SCRIPT, (ROOT / "Makefile").read_text())
    assert len(scripts) >= 4
    assert all((ROOT / script).is_file() for script in scripts)


def test_the_tree_has_all_files() -> None:
    tree = README.partition("```text\njobs/bench/\n")[2].partition("```")[0]
    harness = set(re.findall(r"^    (\w+\.py) ", tree, re.MULTILINE))
    scripts = set(re.findall(r"^  (\w+\.py) ", tree, re.MULTILINE))
    assert harness == {path.name for path in (FOLDER / "harness").glob("*.py")}
    assert scripts == {path.name for path in FOLDER.glob("*.py")}
