"""The commands for data that keeps arriving: retrain, watch."""

from __future__ import annotations

import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.options import ConfigPath, Overrides, Root, print_links, resumable
from gpt.config.loading import load_config, merge_overrides
from gpt.errors import ConfigError

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
        typer.Option("--path", metavar="FILE", help="Parquet file to add to data.source."),
    ] = None,
    start: Annotated[
        Start,
        typer.Option(help="Random weights on all data, or the champion's weights on new data."),
    ] = Start.scratch,
) -> None:
    """Train on new data; promote the model if it is better.

    Does nothing if the champion was trained on all of the source. Re-run the same command to
    resume.
    """
    from flows.runtime import environment
    from gpt.preflight.report import run_preflight

    values = merge_overrides({}, overrides or [])
    if problems := run_preflight(config, values, starting=True).problems:
        raise ConfigError(*problems)
    environment.prepare(load_config(config, values).run.root)
    from flows.retrain import check_up_to_date
    from flows.retrain import retrain as flow
    from flows.runtime.local_run import run_flow

    parameters: Any = {"config": config, "overrides": values, "path": path, "start": start.value}
    with resumable():
        # Starting Prefect's API takes longer than finding out that there is nothing to do.
        result = check_up_to_date(**parameters) or run_flow(flow, parameters)
    print(f"\n{result.name}: " + ("nothing to do" if result.outcome is None else "retrained"))
    width = max(len(name) for name, _ in result.lines)
    for name, text in result.lines:
        print(f"  {name:<{width}}  {text}")
    print_links(result.prefect_ui, result.mlflow_ui)


@app.command()
def watch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to watch.")],
    interval: Annotated[
        float,
        typer.Option(
            min=0.1, help="Seconds between scans; a file must not change between two scans."
        ),
    ] = 10.0,
    pattern: Annotated[
        str, typer.Option(help="Pattern of file names, at any depth.")
    ] = "*.parquet",
    existing: Annotated[
        bool, typer.Option("--existing", help="Include files that exist at the first start.")
    ] = False,
    root: Root = Path("runs"),
) -> None:
    """Start a retraining for each new Parquet file in a folder.

    Sends an event to the Prefect server per complete new file; a deployment reacts to it.
    """
    from flows.runtime import environment

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        environment.prepare(root)
        from flows.service.watch import watch as watch_folder

        watch_folder(directory, pattern, interval, existing, root)
    except KeyboardInterrupt:
        print("\nstopped watching; re-run the same command to resume", file=sys.stderr)
