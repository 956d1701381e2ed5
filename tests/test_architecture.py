"""Imports only go to the left; Ray and torch stay where they belong; decode workers start without either."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = [
    {"errors", "schema", "parquet", "prefetch", "budget", "stores", "vision", "usage", "machines"},
    {"config", "storage", "coverage", "header"},
    {
        "plan",
        "update",
        "lock",
        "ledger",
        "resize",
        "decode",
        "fetch",
        "weights",
        "labels",
        "head",
        "families",
        "models",
        "cpu",
        "gpu",
        "lane",
        "packed",
        "winograd",
        "network",
        "gpu_decode",
    },
    {"sources", "predictors", "sink", "report", "estimate", "layout"},
    {"loader"},
    {"datasource", "predict", "output", "verify", "metrics", "sample"},
    {"engine"},
    {"runner", "forecast"},
    {"cli"},
]
MAY_IMPORT_RAY = {"engine", "datasource", "metrics"}
MAY_IMPORT_TORCH = {
    *("head", "families", "models", "cpu", "gpu", "lane", "packed", "winograd", "network", "gpu_decode"),
    *("fetch", "weights", "vision", "predictors"),
}


def modules() -> list[Path]:
    return sorted(path for path in (ROOT / "pipeline").rglob("*.py") if path != ROOT / "pipeline" / "__init__.py")


def part(path: Path) -> str:
    """The module, or the package inside `pipeline`, that a file belongs to."""
    return path.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_to_the_left(path: Path) -> None:
    own = part(path)
    for name in imports(path):
        if name.startswith("pipeline.") and (other := name.split(".")[1]) != own:
            # Inside a layer the order is free, as long as Python can import it.
            assert layer(other) <= layer(own), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_ray_and_torch_stay_where_they_belong(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports(path)}
    assert "ray" not in packages or part(path) in MAY_IMPORT_RAY
    assert not packages & {"torch", "torchvision", "timm"} or part(path) in MAY_IMPORT_TORCH


def test_modules_of_a_layer_do_not_import_in_circles() -> None:
    edges = {part(path): set() for path in modules()}
    for path in modules():
        edges[part(path)] |= {n.split(".")[1] for n in imports(path) if n.startswith("pipeline.")} & set(edges)
    for name in edges:
        reached, frontier = set(), edges[name] - {name}
        while frontier:
            reached |= frontier
            frontier = {far for near in frontier for far in edges[near] - {near}} - reached
        assert name not in reached, f"{name} imports itself over {sorted(reached)}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pipeline.datasource", "torch"),
        ("pipeline.loader", "ray"),
        ("pipeline.sink", "torch"),
        ("pipeline.cli", "ray"),
        ("pipeline.predictors", "torch"),
        ("pipeline.models", "torch._dynamo"),
        ("pipeline.network", "torch._dynamo"),
        ("pipeline.network", "numba"),
        ("pipeline.winograd", "torch._dynamo"),
        ("pipeline.gpu_decode", "torch._dynamo"),
        ("pipeline.predict", "ray"),
        ("pipeline.predictors", "ray"),
        ("pipeline.sources.discover", "ray"),
    ],
)
def test_what_a_worker_need_not_import(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
