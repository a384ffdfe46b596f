"""Arguments, options and exit codes that several commands share."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

USER_ERROR = 2
"""Exit code for what the user can fix, e.g. an invalid config."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 plus the number of SIGINT."""

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="TOML config.")]
ConfigPaths = Annotated[list[str], typer.Argument(metavar="CONFIG...", help="TOML configs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a config value, e.g. model.n_embd=576."
    ),
]
Gpu = Annotated[
    str,
    typer.Option(
        "--gpu", metavar="NAME", help="GPU to plan for, e.g. rtx-4070; auto: this machine's."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
Root = Annotated[Path, typer.Option("--root", help="Folder of all runs (run.root).")]


@contextmanager
def resumable() -> Iterator[None]:
    """Report Ctrl-C that arrives outside the flow, which handles it itself."""
    try:
        yield
    except KeyboardInterrupt:
        print("\ninterrupted; re-run the same command to resume", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def print_links(links: tuple[str, str], hint: str = "") -> None:
    """Print where to see a result in Prefect and MLflow."""
    print(f"open in Prefect and MLflow{hint}:", *links, sep="\n  ")


def display_path(path: Path) -> str:
    """Return the path relative to the current folder if it lies below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
