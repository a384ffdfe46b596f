"""Which module may import which: flows -> tasks -> gpt, the order inside gpt, and no circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
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
MOST_FILES_PER_FOLDER = 14
BASE = ("gpt.artifacts", "gpt.errors", "gpt.files", "gpt.gc_tuning", "gpt.markdown")
CONFIG = ("gpt.config", "gpt.schedule", *BASE)
HARDWARE = ("gpt.hardware", *CONFIG)
LIBRARY = ("gpt.model", "gpt.data", *HARDWARE)
MAY_IMPORT = {
    **dict.fromkeys(BASE, BASE),
    "gpt.config": ("gpt.config", *BASE),
    "gpt.schedule": CONFIG,
    "gpt.hardware": HARDWARE,
    "gpt.data": ("gpt.data", *HARDWARE),
    "gpt.model": LIBRARY,
    "gpt.model.section": CONFIG,
    "gpt.evaluation": ("gpt.evaluation", *LIBRARY),
    "gpt.training": ("gpt.training", "gpt.evaluation", *LIBRARY),
    "gpt.preflight": ("gpt.preflight", "gpt.model.section", *HARDWARE),
    "gpt.exchange": ("gpt.exchange", *LIBRARY),
    "gpt.exchange.nanogpt": CONFIG,
    "gpt": (),
    "tasks": ("tasks", "gpt"),
    "flows": ("flows", "tasks", "gpt"),
}
"""For each package what it may import; the longest prefix that fits a module holds for it."""


def _is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in full}
    return found


def _own_imports(path: Path) -> set[str]:
    return {name for name in _imports(path) if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    room = max((p for p in MAY_IMPORT if _is_in(module, p)), key=len)
    allowed = MAY_IMPORT[room]
    wrong = {
        name
        for name in _own_imports(MODULES[module])
        if not any(_is_in(name, package) for package in allowed)
    }
    assert not wrong, f"{module} may import only {allowed}"


def test_no_circular_imports() -> None:
    TopologicalSorter({name: _own_imports(path) for name, path in MODULES.items()}).prepare()


def test_every_folder_has_few_files() -> None:
    paths = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    files = Counter(path.parent for path in paths)
    assert {folder: n for folder, n in files.items() if n > MOST_FILES_PER_FOLDER} == {}


def test_flows_and_tasks_have_nothing_else_at_their_top_level() -> None:
    top = {path.name for path in (ROOT / "flows").glob("*.py")}
    assert top == {"__init__.py", "pretrain.py", "compare.py", "retrain.py"}


def test_gpt_imports_neither_prefect_nor_mlflow() -> None:
    importing = [
        name
        for name, path in MODULES.items()
        if _is_in(name, "gpt") and {i.split(".")[0] for i in _imports(path)} & {"prefect", "mlflow"}
    ]
    assert importing == []


def test_mlflow_is_imported_in_tracking_only() -> None:
    importing = [
        name
        for name, path in MODULES.items()
        if "mlflow" in {imported.split(".")[0] for imported in _imports(path)}
    ]
    assert importing
    assert [name for name in importing if not _is_in(name, "tasks.tracking")] == []


@pytest.mark.parametrize("path", sorted(p for p in MODULES.values() if p.name == "__init__.py"))
def test_packages_hold_a_docstring_and_nothing_else(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("gpt.config.loading", {"torch", "numpy", "polars", "pyarrow"}),
        ("flows.cli.main", {"torch", "numpy", "polars", "pyarrow", "prefect", "mlflow"}),
        ("gpt.preflight.report", {"torch", "numpy", "polars", "pyarrow", "prefect", "mlflow"}),
        ("gpt.preflight.memory", {"torch", "numpy", "polars", "pyarrow", "prefect", "mlflow"}),
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
