"""README and docs: every command parses, every path, key, option and message exists, and the site
builds."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_pages import Page, read_page

from gpt.config.loading import parse_override
from gpt.config.schema import RunConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    read_page(path)
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        ROOT / "configs" / "README.md",
        ROOT / "tests" / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
]
FOLDERS = ("gpt", "tasks", "flows", "configs", "tests", "docs", "deploy", "examples", ".ci")
ROOT_FILE = re.compile(r"(Makefile|Dockerfile|LICENSE|\w[\w.-]*\.(toml|txt|yaml|yml|cff|md))$")
YOURS = {"mine.toml", "prefect.toml"}
"""Files that a reader creates."""
ID = "00000000-0000-0000-0000-000000000000"

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.path.relative_to(ROOT))
)


# --- commands ------------------------------------------------------------------------------------


def commands(page: Page, program: str) -> list[list[str]]:
    return [words[1:] for words in page.commands if words[0] == program]


@cache
def overnight_command() -> Any:
    import typer.main

    from flows.cli.main import app

    return typer.main.get_command(app)


def parse_overnight(words: list[str]) -> dict[str, Any]:
    """The command's parameters; raises what the command line raises for a wrong one."""
    import typer

    group = overnight_command()
    try:
        context = group.make_context("overnight", list(words))
        name, command, rest = group.resolve_command(context, list(words))
        if len(words) == 1:  # names a command without calling it
            return {}
        return dict(command.make_context(name, rest, parent=context).params)
    except typer.Exit:  # --help, --version
        return {}


@each_page
def test_overnight_commands_parse(page: Page) -> None:
    for words in commands(page, "overnight"):
        for override in parse_overnight(words).get("overrides") or ():
            check_keys(parse_override(override))


@each_page
def test_make_targets_exist(page: Page) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) *\?=", makefile, re.MULTILINE))
    for words in commands(page, "make"):
        for word in words:
            name, equals, _ = word.partition("=")
            assert name in (variables if equals else targets), f"make {word}"


@each_page
def test_prefect_commands_parse(page: Page) -> None:
    shown = commands(page, "prefect")
    if not shown:
        return
    from prefect.cli._app import _app

    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    names = {f"{Path(d['entrypoint'].partition(':')[0]).stem}/{d['name']}": d for d in deployments}
    for words in shown:
        arguments = [ID if word == "ID" else word for word in words if word != "--no-prompt"]
        _app.parse_args(arguments, exit_on_error=False, print_error=False)
        named = [word for word in words if re.fullmatch(r"(pretrain|compare|retrain)/.*", word)]
        assert set(named) <= set(names)
        for word in words:
            if word.startswith("overrides="):
                check_keys(yaml.safe_load(word.removeprefix("overrides=")))


def test_mlflow_commands_have_the_options_shown() -> None:
    from mlflow.models.cli import commands as models

    for page in PAGES:
        for group, name, *rest in commands(page, "mlflow"):
            assert group == "models"
            known = {
                option for parameter in models.commands[name].params for option in parameter.opts
            }
            assert {word for word in rest if word.startswith("-")} <= known


@each_page
def test_python_scripts_have_the_options_shown(page: Page) -> None:
    for words in commands(page, "python"):
        if words[0] == "-m":
            assert importlib.util.find_spec(words[1]), words[1]
            continue
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        for word in words[1:]:
            assert not word.startswith("--") or f'"{word}"' in source, f"{words[0]} {word}"


@each_page
def test_extras_that_pip_installs_exist(page: Page) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for words in commands(page, "pip"):
        for word in words:
            if extras := re.fullmatch(r"(?:\.|overnight)\[([\w,]+)\]", word):
                assert set(extras[1].split(",")) <= set(project["optional-dependencies"])


@each_page
def test_options_in_the_text_exist(page: Page) -> None:
    group = overnight_command()
    known = {"--help", "--version"}
    for command in group.commands.values():
        known.update(option for parameter in command.params for option in parameter.opts)
    scripts = "".join(path.read_text() for path in (ROOT / "tests" / "benchmarks").glob("*.py"))
    for code in page.inline_code:
        if code.startswith("--"):
            for option in re.findall(r"--[a-z][\w-]*", code):
                assert option in known or f'"{option}"' in scripts, option


# --- paths, keys and names -----------------------------------------------------------------------


def shown_paths(page: Page) -> set[str]:
    """Every word of code that names a file or folder of this repository."""
    words = {word for code in page.inline_code for word in code.split()}
    words |= {word for command in page.commands for word in command}
    folders = re.compile(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./*{{}}-]*")
    named = {word for word in words if folders.fullmatch(word) or ROOT_FILE.fullmatch(word)}
    return named - YOURS


@each_page
def test_paths_exist(page: Page) -> None:
    missing = [
        path
        for path in shown_paths(page)
        if not (list(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())
    ]
    assert missing == []


@each_page
def test_links_lead_to_files(page: Page) -> None:
    assert [link for link in page.links if not (page.path.parent / link).exists()] == []


def check_keys(values: Any) -> None:
    """Raises for a section or key that the config does not have; `section.key` is a placeholder."""
    for section, keys in dict(values).items():
        if section == "section":
            continue
        annotation: Any = RunConfig.model_fields[section].annotation
        assert set(keys) <= set(annotation.model_fields), f"{section}: {keys}"


@each_page
def test_config_keys_exist(page: Page) -> None:
    sections = "|".join(RunConfig.model_fields)
    for code in page.inline_code:
        if found := re.fullmatch(rf"({sections})\.(\w+)( = .*)?", code):
            if found[2] not in ("json", "jsonl", "py"):
                check_keys({found[1]: [found[2]]})
        elif found := re.fullmatch(r"\[([a-z]+)\]", code):
            assert found[1] in RunConfig.model_fields, code
    for language, content in page.blocks:
        if language == "toml":
            check_keys(tomllib.loads(content))


@each_page
def test_modules_and_their_names_exist(page: Page) -> None:
    for code in page.inline_code:
        if re.fullmatch(r"(gpt|tasks|flows)(\.\w+)+", code):
            parts = code.split(".")
            module = max((n for n in range(1, len(parts) + 1) if is_module(parts[:n])), default=0)
            assert module >= len(parts) - 1, code
            if module < len(parts):
                assert parts[-1] in source_of(".".join(parts[:module])), code


@each_page
def test_python_blocks_import_what_exists(page: Page) -> None:
    for language, content in page.blocks:
        if language != "python":
            continue
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("gpt"):
                names = vars(importlib.import_module(str(node.module)))
                assert {alias.name for alias in node.names} <= set(names), node.module


def is_module(parts: Iterable[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def source_of(module: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    file = path.with_suffix(".py")
    return (file if file.exists() else path / "__init__.py").read_text(encoding="utf-8")


@cache
def product_source() -> str:
    return "\n".join(
        path.read_text(encoding="utf-8")
        for folder in FOLDERS[:3]
        for path in sorted((ROOT / folder).rglob("*.py"))
    )


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_functions_and_classes_named_in_the_map_exist(name: str) -> None:
    names = {
        code.removesuffix("()")
        for code in read_page(ROOT / name).inline_code
        if re.fullmatch(r"_?[a-z]+(_\w+)+(\(\))?|([A-Z][a-z]+){2,}|[A-Z]{3,}\w*", code)
    }
    words = set(re.findall(r"\w+", product_source()))
    unknown = {each for each in names - words if not (ROOT / each).exists()}
    assert {each for each in unknown if not each.startswith("test_")} == set()


@each_page
def test_environment_variables_exist(page: Page) -> None:
    names = set(re.findall(r"\bOVERNIGHT_\w+", page.text))
    assert {name for name in names if name not in product_source()} == set()


# --- messages ------------------------------------------------------------------------------------


@cache
def messages() -> str:
    """Every string of the product, one per line; "..." stands for an inserted value."""
    found = []
    for folder in FOLDERS[:3]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "..." for p in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[sdr]|%\.\d+[fe]", "...", node.value))
    return "\n".join(found)


def test_troubleshooting_is_indexed_by_messages_that_exist() -> None:
    page = read_page(ROOT / "docs" / "troubleshooting.md")
    quoted = [code for heading in page.headings for code in re.findall(r"`([^`]+)`", heading)]
    quoted += re.findall(r"^\| `([^`]+)` \|", page.text, re.MULTILINE)
    quoted.remove("overnight doctor")
    assert len(quoted) >= 30
    missing = [
        message
        for message in quoted
        for part in message.split("...")
        if part.strip() and part.strip() not in messages()
    ]
    assert missing == []


@each_page
def test_transcripts_show_what_the_command_prints(page: Page) -> None:
    for _, content in page.blocks:
        if not content.startswith("$ overnight "):
            continue
        command, _, shown = content.partition("\n")
        words = command.removeprefix("$ overnight ").split()
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli.main", *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        printed = [line.rstrip() for line in (done.stdout + done.stderr).splitlines()]
        assert [line.rstrip() for line in shown.splitlines()] == printed


# --- the front door and the site -----------------------------------------------------------------


def test_readme_is_a_front_door() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.glob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").glob("*.md")))  # and 404.html
    loads = re.compile(r'<(?:script|img|iframe)[^>]+src="https?:|<link[^>]+rel="stylesheet"[^>]*//')
    assert [page.name for page in pages if loads.search(page.read_text(encoding="utf-8"))] == []


# --- what people expect of a repository ----------------------------------------------------------


def test_project_metadata_is_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (project["license"], project["readme"]) == ("MIT", "README.md")
    assert project["authors"] == [{"name": "overnight contributors"}]
    assert "urls" not in project
    assert "Typing :: Typed" in project["classifiers"]
    for package in FOLDERS[:3]:
        assert (ROOT / package / "py.typed").exists()
    latest = next(h for h in read_page(ROOT / "CHANGELOG.md").headings if re.match(r"\[\d", h))
    assert latest.startswith(f"[{project['version']}] - ")


def test_citation_and_license_name_the_same_authors() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == "MIT"
    assert citation["authors"] == [{"name": "overnight contributors"}]
    assert "overnight contributors" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_pre_commit_hooks_are_local() -> None:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in settings["repos"]] == ["local"]
    for hook in settings["repos"][0]["hooks"]:
        assert hook["entry"].startswith(".venv/bin/")
        assert hook["language"] == "system"
