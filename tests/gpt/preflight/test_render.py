"""`overnight validate` in the terminal and as JSON, and the files that are generated from code."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from docs.generate import (
    BEGIN,
    END,
    render_json_schema,
    render_settings_page,
    render_sizes_table,
    replace_sizes_table,
)
from gpt.config.loading import build_config, read_toml
from gpt.config.schema import RunConfig
from gpt.errors import ConfigError
from gpt.preflight.render import render_markdown
from gpt.preflight.report import run_preflight

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted(str(path) for path in (ROOT / "configs").glob("*.toml"))
GOOD = str(ROOT / "configs" / "gpt-576.toml")
SCHEMA = json.loads(render_json_schema())
HEAVY = {"torch", "numpy", "polars", "pyarrow", "prefect", "mlflow"}


def validate(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli.main", "validate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_validate_imports_nothing_heavy() -> None:
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


def test_json_is_an_object_for_one_config_and_a_list_for_several() -> None:
    one = json.loads(validate(GOOD, "--gpu", "rtx-4070", "--json").stdout)
    assert one["memory"]["fits"] is True
    done = validate(GOOD, GOOD, "--set", "model.n_embd=512", "--gpu", "rtx-4070", "--json")
    assert done.returncode == 2
    several = json.loads(done.stdout)
    assert [report["blocked"] for report in several] == [True, True]
    assert several[0]["suggestions"][0]["head_size"] == 64
    assert several[0]["parameters"] is None


def test_several_configs_are_compared_in_a_table() -> None:
    done = validate(*CONFIGS, "--gpu", "rtx-4090")
    for path in CONFIGS:
        assert path in done.stdout
    assert "124.4M" in done.stdout
    assert "fitted to published runs" in done.stdout


def test_unreadable_config_is_reported_beside_a_good_one() -> None:
    done = validate(GOOD, "none.toml")
    assert done.returncode == 2
    assert "no such file" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("overrides", [[], ["model.n_embd=512"], ["model.n_embd=720"]])
def test_markdown_contains_problems_and_figures(overrides: list[str]) -> None:
    report = run_preflight(GOOD, overrides, "rtx-4070")
    page = render_markdown(report)
    for problem in (*report.problems, *report.warnings):
        assert problem.rule in page
        assert problem.remedy in page
    if report.figures:
        assert f"{report.figures.parameters.total:,}" in page


# --- generated files ------------------------------------------------------------------------------


def test_sizes_table_in_readme_is_up_to_date() -> None:
    table = render_sizes_table(ROOT / "configs")
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), "run python -m docs.generate"
    for size in ("12/12/480", "12/8/512", "12/16/512", "12/12/576", "12/12/720", "12/12/768"):
        assert f"| {size} |" in table
    assert "does not fit" not in table


def test_sizes_table_replaces_the_text_between_its_marks() -> None:
    old = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert replace_sizes_table(old, f"{BEGIN}\nnew\n{END}") == f"before\n{BEGIN}\nnew\n{END}\nafter"
    assert replace_sizes_table("no marks", "x") == "no marks"


def test_settings_page_is_up_to_date() -> None:
    page = render_settings_page()
    assert (ROOT / "configs" / "README.md").read_text(encoding="utf-8") == page, (
        "run python -m docs.generate"
    )
    for section, field in RunConfig.model_fields.items():
        assert f"## [{section}]" in page
        assert field.annotation is not None
        for key in field.annotation.model_fields:
            assert f"| `{key}` |" in page


def test_json_schema_is_up_to_date() -> None:
    assert (ROOT / "configs" / "schema.json").read_text(encoding="utf-8") == render_json_schema(), (
        "run python -m docs.generate"
    )


@pytest.mark.parametrize("path", CONFIGS)
def test_shipped_config_names_the_json_schema_and_satisfies_it(path: str) -> None:
    text = Path(path).read_text(encoding="utf-8")
    assert text.splitlines()[0] == "#:schema ./schema.json"
    jsonschema.validate(tomllib.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"n_layr": 2}),
        ("model", {"n_layer": 0}),
        ("optimizer", {"name": "sgd"}),
        ("training", {"max_steps": "9"}),
        ("data", {"source": []}),
        ("run", {"name": "../x"}),
        ("nothing", {}),
    ],
)
def test_json_schema_refuses_what_the_config_refuses(section: str, values: dict[str, Any]) -> None:
    raw = read_toml(Path(GOOD))
    raw[section] = raw.get(section, {}) | values
    with pytest.raises(ConfigError):
        build_config(raw)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(raw, SCHEMA)
