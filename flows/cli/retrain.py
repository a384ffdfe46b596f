"""The commands for data that keeps coming: retrain, watch."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.options import ConfigPath, Overrides
from gpt.config.loading import load_config, merge_overrides
from gpt.errors import ConfigError

if TYPE_CHECKING:
    from flows.runtime.retrain_report import RetrainResult

INTERRUPTED = 130

app = typer.Typer(rich_markup_mode=None)


class Start(StrEnum):
    scratch = "scratch"
    champion = "champion"


@app.command()
def retrain(
    config: ConfigPath,
    overrides: Overrides = None,
    path: Annotated[
        str | None,
        typer.Option("--path", metavar="FILE", help="A Parquet file to add to data.source."),
    ] = None,
    start: Annotated[
        Start, typer.Option(help="With random weights on all data, or with the champion's on new.")
    ] = Start.scratch,
) -> None:
    """Train a challenger where the source holds what the champion does not know; else say so."""
    from flows.runtime import environment
    from gpt.preflight.report import run_preflight

    laid_over = merge_overrides({}, overrides or [])
    if problems := run_preflight(config, laid_over, starting=True).problems:
        raise ConfigError(*problems)
    environment.prepare(load_config(config, laid_over).run.root)
    from flows.runtime.local_run import run_retrain

    try:
        _print(run_retrain(config, dict(laid_over), path, start.value))
    except KeyboardInterrupt:  # before the flow could take it
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def watch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where Parquet files come.")],
    interval: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two looks; a file must rest for one.")
    ] = 10.0,
    pattern: Annotated[str, typer.Option(help="Of the files' names, at any depth.")] = "*.parquet",
    existing: Annotated[
        bool, typer.Option("--existing", help="Tell of files that are there at the first start.")
    ] = False,
    root: Annotated[
        Path, typer.Option("--root", help="Where runs lie (run.root); the state lies there too.")
    ] = Path("runs"),
) -> None:
    """Tell Prefect's server of each whole new Parquet file, which starts a retraining there."""
    import signal

    from flows.runtime import environment

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        environment.prepare(root)
        from flows.service.watch import watch as watching

        watching(directory, pattern, interval, existing, root)
    except KeyboardInterrupt:
        print("\nno longer watching; started again, it goes on from here", file=sys.stderr)


def _print(done: RetrainResult) -> None:
    width = max(len(name) for name, _ in done.lines)
    print(f"\n{done.name}: " + ("nothing to do" if done.outcome is None else "retrained"))
    for name, text in done.lines:
        print(f"  {name:<{width}}  {text}")
    print(f"look at it in Prefect, then in MLflow:\n  {done.prefect_ui}\n  {done.mlflow_ui}")
