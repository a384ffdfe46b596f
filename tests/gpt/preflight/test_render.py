"""The command as people and programs meet it, and the pages that are computed from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpt.config.schema import RunConfig
from gpt.preflight.generated_docs import (
    BEGIN,
    END,
    render_settings_page,
    render_sizes_table,
    replace_sizes_table,
)
from gpt.preflight.render import render_markdown
from gpt.preflight.report import run_preflight

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted(str(path) for path in (ROOT / "configs").glob("*.toml"))
GOOD = str(ROOT / "configs" / "gpt-576.toml")
HEAVY = {"torch", "numpy", "polars", "pyarrow", "prefect", "mlflow"}


def validate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli.main", "validate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['overnight', 'validate', *sys.argv[1:]]\n"
        "from flows.cli.main import app\n"
        "try: app()\n"
        "except SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    for arguments in ([*CONFIGS, "--gpu", "rtx-4070"], [GOOD, "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert "gpt.preflight.report" in done.stderr
        assert set(done.stderr.split()) & HEAVY == set()


def test_json_of_one_and_of_several() -> None:
    one = json.loads(validate(GOOD, "--gpu", "rtx-4070", "--json").stdout)
    assert one["memory"]["fits"] is True
    done = validate(GOOD, GOOD, "--set", "model.n_embd=512", "--gpu", "rtx-4070", "--json")
    assert done.returncode == 2
    several = json.loads(done.stdout)
    assert [report["blocked"] for report in several] == [True, True]
    assert several[0]["suggestions"][0]["head_size"] == 64
    assert several[0]["parameters"] is None


def test_several_configs_stand_side_by_side() -> None:
    done = validate(*CONFIGS, "--gpu", "rtx-4090")
    for path in CONFIGS:
        assert path in done.stdout
    assert "124.4M" in done.stdout
    assert "106,000 tokens/s" in done.stdout


def test_an_unreadable_config_beside_a_good_one() -> None:
    done = validate(GOOD, "none.toml")
    assert done.returncode == 2
    assert "no such file" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("overrides", [[], ["model.n_embd=512"], ["model.n_embd=720"]])
def test_the_markdown_page_says_the_same(overrides: list[str]) -> None:
    report = run_preflight(GOOD, overrides, "rtx-4070")
    page = render_markdown(report)
    for problem in (*report.problems, *report.warnings):
        assert problem.rule in page
        assert problem.remedy in page
    if report.figures:
        assert f"{report.figures.parameters.total:,}" in page


# --- computed pages ------------------------------------------------------------------------------


def test_readmes_table_of_sizes_is_the_computed_one() -> None:
    table = render_sizes_table(ROOT / "configs")
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), (
        "run python -m gpt.preflight.generated_docs"
    )
    for size in ("12/12/480", "12/8/512", "12/16/512", "12/12/576", "12/12/720", "12/12/768"):
        assert f"| {size} |" in table
    assert "does not fit" not in table


def test_the_table_replaces_what_stood_between_its_marks() -> None:
    old = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert replace_sizes_table(old, f"{BEGIN}\nnew\n{END}") == f"before\n{BEGIN}\nnew\n{END}\nafter"
    assert replace_sizes_table("no marks", "x") == "no marks"


def test_the_page_of_settings_is_the_computed_one() -> None:
    page = render_settings_page()
    assert (ROOT / "configs" / "README.md").read_text(encoding="utf-8") == page, (
        "run python -m gpt.preflight.generated_docs"
    )
    for section, field in RunConfig.model_fields.items():
        assert f"## [{section}]" in page
        assert field.annotation is not None
        for key in field.annotation.model_fields:
            assert f"| `{key}` |" in page
