"""Who may import whom: flows -> tasks -> gpt, and the order inside gpt."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "tasks", "gpt")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
GROUND = ("gpt.config", "gpt.rules", "gpt.artifacts", "gpt.errors", "gpt.files", "gpt.collector")
MAY_IMPORT = {
    "gpt.training": (
        *("gpt.training", "gpt.evaluation", "gpt.model", "gpt.data", "gpt.preflight"),
        *GROUND,
    ),
    "gpt.training.schedule": GROUND,
    "gpt.preflight": (
        *("gpt.preflight", "gpt.training.schedule", "gpt.model.folder"),
        *GROUND,
    ),
    "gpt.exchange": ("gpt.exchange", "gpt.model", "gpt.data", *GROUND),
    "gpt.exchange.nanogpt": GROUND,
    "gpt.evaluation": ("gpt.evaluation", "gpt.model", "gpt.data", *GROUND),
    "gpt.model": ("gpt.model", "gpt.data", *GROUND),
    "gpt.model.folder": ("gpt.config", "gpt.errors"),
    "gpt.data": ("gpt.data", *GROUND),
    "gpt.config": GROUND,
    "gpt.rules": GROUND,
    "gpt.artifacts": GROUND,
    "gpt.errors": GROUND,
    "gpt.files": GROUND,
    "gpt.collector": GROUND,
    "gpt": ("gpt",),
    "tasks": ("tasks", "gpt"),
    "flows": ("flows", "tasks", "gpt"),
}
"""The longest prefix counts."""


def _below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in whole}
    return found


def _ours(path: Path) -> set[str]:
    return {name for name in _imports(path) if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    home = max((p for p in MAY_IMPORT if _below(module, p)), key=len)
    allowed = MAY_IMPORT[home]
    wrong = {n for n in _ours(MODULES[module]) if not any(_below(n, p) for p in allowed)}
    assert not wrong, f"{module} may import from {allowed} alone"


def test_no_circle() -> None:
    TopologicalSorter({name: _ours(path) for name, path in MODULES.items()}).prepare()


def test_the_library_knows_neither_prefect_nor_mlflow() -> None:
    naming = [
        name
        for name, path in MODULES.items()
        if _below(name, "gpt") and {i.split(".")[0] for i in _imports(path)} & {"prefect", "mlflow"}
    ]
    assert naming == []


def test_mlflow_is_imported_where_it_is_told_and_where_it_serves() -> None:
    importing = [
        name
        for name, path in MODULES.items()
        if "mlflow" in {imported.split(".")[0] for imported in _imports(path)}
    ]
    assert importing == [
        "tasks.champion",
        "tasks.delivery",
        "tasks.judgement",
        "tasks.registered",
        "tasks.registry",
        "tasks.served_model",
        "tasks.system_metrics",
        "tasks.tracking",
    ]


@pytest.mark.parametrize("path", sorted(p for p in MODULES.values() if p.name == "__init__.py"))
def test_packages_hold_a_docstring_and_nothing_else(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("gpt.config", {"torch", "numpy", "polars", "pyarrow"}),
        ("flows.__main__", {"torch", "numpy", "polars", "pyarrow", "prefect", "mlflow"}),
        ("gpt.preflight.report", {"torch", "numpy", "polars", "pyarrow", "prefect", "mlflow"}),
        ("gpt.preflight.sharding", {"torch", "numpy", "polars", "pyarrow", "prefect", "mlflow"}),
        ("gpt.exchange.nanogpt", {"torch", "numpy", "polars", "pyarrow", "prefect", "mlflow"}),
        ("gpt.training.loop", {"polars", "pyarrow", "prefect", "mlflow"}),
        ("gpt.evaluation.benchmarks", {"polars", "pyarrow", "prefect", "mlflow"}),
    ],
)
def test_light_modules_load_nothing_heavy(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert heavy & set(done.stdout.split()) == set()
