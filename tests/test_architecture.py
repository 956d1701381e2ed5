"""The wings of `pipeline/`, who imports whom, and what stays outside of a wing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pipeline"

GROUND = {"errors", "coverage", "schema", "threads", "halving", "version", "embedding_space"}

WINGS = {
    # wing          may import, beside the ground and itself
    "storage": "",
    "geo": "",
    "config": "storage geo",
    "sources": "storage geo config",
    "planning": "storage geo config sources",
    "output": "storage config sources planning",
    "images": "geo",
    "models": "storage geo config images",
    "inference": "images models",
    "predictors": "storage config images models inference",
    "stages": "storage geo config sources planning output images models predictors",
    "explore": "storage geo config sources planning output images stages",
    "engine": "storage config sources planning output images predictors stages",
    "training": "storage config sources planning output explore images models inference predictors stages engine",
    "estimates": "storage config sources planning output images models inference predictors stages engine",
    "explain": "storage config planning explore images models inference predictors stages training",
    "comparison": "storage config planning output predictors stages training estimates",
    "report": "storage config planning output estimates",
    "runner": "config planning output explore predictors stages engine estimates report",
    "cli": "storage config planning output predictors stages report runner",
    "__main__": "",
}
"""Two columns meet in `stages`: storage → sources → planning → output, and images → models → inference → predictors."""

TORCH = {"models", "inference", "training", "explain", "comparison"}
TORCH_IF_LOADED = {"predictors"}
"""May name torch inside of functions and type annotations only."""
RAY = {"engine"}
MAX_TOP_LEVEL_MODULES = 11


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def wing(path: Path) -> str:
    """The folder, or the module at the top level, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, at_start: bool = False) -> set[str]:
    """Dotted names. at_start: only what importing the module imports."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if at_start:
        nodes = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_wings(path: Path) -> set[str]:
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("pipeline.")}
    return {name for name in inside if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()}


def test_every_module_is_in_the_table() -> None:
    assert {wing(path) for path in modules()} == {*GROUND, *WINGS}
    assert len(list(PACKAGE.glob("*.py"))) - 1 <= MAX_TOP_LEVEL_MODULES, "without __init__.py"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_in_one_direction(path: Path) -> None:
    own = wing(path)
    allowed = {"errors"} if own in GROUND else {*GROUND, *WINGS[own].split(), own}
    assert imported_wings(path) <= allowed


def test_the_table_has_no_cycle() -> None:
    order = list(WINGS)
    for name, others in WINGS.items():
        assert all(order.index(other) < order.index(name) for other in others.split()), name


def test_modules_do_not_import_each_other_in_circles() -> None:
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in modules()}
    edges = {
        name: {other for found in imports(path, at_start=True) for other in (found, found.rpartition(".")[0])}
        & set(names)
        for name, path in names.items()
    }
    for name in edges:
        reached: set[str] = set()
        frontier = set(edges[name])
        while frontier:
            reached |= frontier
            frontier = {far for near in frontier for far in edges[near]} - reached
        assert name not in reached, f"{name} imports itself over {sorted(reached)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ray_and_torch_stay_where_they_belong(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports(path)}
    at_start = {name.split(".")[0] for name in imports(path, at_start=True)}
    torch = {"torch", "torchvision", "timm"}
    assert "ray" not in packages or wing(path) in RAY
    assert not packages & torch or wing(path) in TORCH | TORCH_IF_LOADED
    assert not at_start & torch or wing(path) in TORCH


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pipeline", "torch"),
        ("pipeline.cli", "ray"),
        ("pipeline.engine.datasource", "torch"),
        ("pipeline.engine.allocation", "ray"),
        ("pipeline.explore.export", "pyogrio"),
        ("pipeline.explore.map", "rasterio"),
        ("pipeline.explore.table", "ray"),
        ("pipeline.inference.jpeg", "torch._dynamo"),
        ("pipeline.inference.session", "torch._dynamo"),
        ("pipeline.models.spec", "torch._dynamo"),
        ("pipeline.planning.archive", "ray"),
        ("pipeline.predictors.base", "torch"),
        ("pipeline.predictors.classify", "torch"),
        ("pipeline.predictors.embed", "ray"),
        ("pipeline.stages.load", "ray"),
        ("pipeline.stages.load", "torch"),
        ("pipeline.stages.predict", "ray"),
        ("pipeline.stages.write", "torch"),
        ("pipeline.training.job", "torch"),
        ("jobs.finetune", "torch"),
        ("jobs.finetune", "ray"),
        ("jobs.fit", "sklearn"),
        ("jobs.serve", "torch"),
        ("jobs.serve", "ray"),
        ("jobs.compare", "torch"),
        ("jobs.explain", "torch"),
    ],
)
def test_what_a_worker_need_not_import(module: str, absent: str) -> None:
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
