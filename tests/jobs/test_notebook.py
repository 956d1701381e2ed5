"""The notebooks run on real outputs, and are stored the way that leaves reviewable diffs."""

import ast
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from small_run import small_run

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
QUERY, LAND_COVER = "query_results.ipynb", "land_cover_overnight.ipynb"


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / name, as_version=4)


@pytest.fixture(params=[QUERY, LAND_COVER])
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return read(request.param)


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
        source = TransformerManager().transform_cell(cell.source)  # %%sh is not Python
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(source))), cell.source


def test_all_are_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.ipynb")} == {QUERY, LAND_COVER}


@pytest.mark.parametrize("kinds", [[], ["truncated", "not_an_image", "truncated"]])
def test_errors_are_counted_where_there_are_some(tmp_path: Path, kinds: list[str]) -> None:
    (tmp_path / "labels" / "_errors").mkdir(parents=True)
    rows = pd.DataFrame({"stage": ["decode"] * len(kinds), "error_type": kinds}, dtype=str)
    rows.to_parquet(tmp_path / "labels/_errors/part.parquet")
    (source,) = (cell.source for cell in code_cells(read(QUERY)) if "_errors" in cell.source)
    *statements, shown = source.splitlines()
    names = {"pd": pd, "DEMO": tmp_path}
    exec("\n".join(statements), names)
    counts = eval(shown, names)["images"]
    assert counts.to_dict() == {("decode", kind): kinds.count(kind) for kind in kinds}


def executed(name: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> list[nbformat.NotebookNode]:
    """The outputs of a notebook on the folder of a demo."""
    monkeypatch.setenv("NIGHTSHIFT_DEMO", str(demo))
    monkeypatch.setenv("RAY_ADDRESS", "local")  # not a cluster that runs on this machine
    notebook = read(name)
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources=where).execute()
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def tables(outputs: list[nbformat.NotebookNode]) -> str:
    return "\n".join(output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))


def pictures(outputs: list[nbformat.NotebookNode]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


def printed(outputs: list[nbformat.NotebookNode]) -> str:
    streams = [output for output in outputs if output.output_type == "stream"]
    return "".join(output.text for name in ("stdout", "stderr") for output in streams if output.name == name)


@pytest.mark.slow
def test_the_query_runs_on_a_demo(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = executed(QUERY, small_run(tmp_path_factory).folder, monkeypatch)
    assert pictures(outputs) == 2, "the histogram and the thumbnails"
    shown = tables(outputs)
    for column in ("image_id", "error_type", "mean_score", "usual_label", "cosine"):
        assert f"<th>{column}</th>" in shown
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]


def check_land_cover(outputs: list[nbformat.NotebookNode]) -> None:
    """Fail unless the notebook has shown the scene, figures, the agreement, and at its end the map."""
    assert pictures(outputs) == 2, "the scene and the map"
    assert "image/png" in outputs[-1].data
    assert float(outputs[-2].data["text/plain"]) > 0.85
    assert "<th>min</th>" in tables(outputs)
    text = printed(outputs)
    assert "EPSG:32632 2208 1536" in text
    assert "whole: every planned image is exactly one row" in text
    assert "46 × 32 pixels, 100.0% with data" in text
    assert "land-cover.fgb: 1,395 rows" in text


@pytest.mark.long
def test_the_land_cover_is_mapped_again_after_a_demo(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = executed(LAND_COVER, small_run(tmp_path_factory).folder, monkeypatch)
    check_land_cover(outputs)
    assert printed(outputs).count("already done, nothing new") == 2, "the embeddings and the classes"


@pytest.mark.long
def test_the_land_cover_is_mapped_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = executed(LAND_COVER, tmp_path, monkeypatch)
    check_land_cover(outputs)
    assert "already done" not in printed(outputs)
