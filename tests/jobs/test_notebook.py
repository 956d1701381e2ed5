"""The notebook runs on a real output, and is stored the way that leaves reviewable diffs."""

import ast
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from small_run import small_run

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "query_results.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_stored_without_outputs(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert not cell.outputs
        assert cell.execution_count is None


def test_it_defines_no_logic(notebook: nbformat.NotebookNode) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in code_cells(notebook):
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(cell.source))), cell.source


@pytest.mark.parametrize("kinds", [[], ["truncated", "not_an_image", "truncated"]])
def test_errors_are_counted_where_there_are_some(
    notebook: nbformat.NotebookNode, tmp_path: Path, kinds: list[str]
) -> None:
    (tmp_path / "labels" / "_errors").mkdir(parents=True)
    rows = pd.DataFrame({"stage": ["decode"] * len(kinds), "error_type": kinds}, dtype=str)
    rows.to_parquet(tmp_path / "labels/_errors/part.parquet")
    (source,) = (cell.source for cell in code_cells(notebook) if "_errors" in cell.source)
    *statements, shown = source.splitlines()
    names = {"pd": pd, "DEMO": tmp_path}
    exec("\n".join(statements), names)
    counts = eval(shown, names)["images"]
    assert counts.to_dict() == {("decode", kind): kinds.count(kind) for kind in kinds}


@pytest.mark.slow
def test_it_runs_on_a_demo(
    notebook: nbformat.NotebookNode, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_DEMO", str(small_run(tmp_path_factory).folder))
    NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    tables = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2, "the histogram and the thumbnails"
    shown = "\n".join(tables)
    for column in ("image_id", "error_type", "mean_score", "usual_label", "cosine"):
        assert f"<th>{column}</th>" in shown
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
