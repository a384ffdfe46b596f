"""The commands about the service on this machine: up, doctor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None)

Root = Annotated[
    Path, typer.Option("--root", envvar="OVERNIGHT_ROOT", help="Where runs lie (run.root).")
]


@app.command()
def up(
    root: Root = Path("runs"),
    host: Annotated[
        str, typer.Option(envvar="OVERNIGHT_HOST", help="Which address to listen on.")
    ] = "127.0.0.1",
    prefect_port: Annotated[int, typer.Option(envvar="OVERNIGHT_PREFECT_PORT")] = 4200,
    mlflow_port: Annotated[int, typer.Option(envvar="OVERNIGHT_MLFLOW_PORT")] = 5000,
) -> None:
    """Start Prefect, MLflow and a worker on this machine, and deploy; Ctrl-C stops them all.

    A server that PREFECT_API_URL or MLFLOW_TRACKING_URI names is used, and none started for it.
    """
    from flows.service import Settings

    named = (os.environ.get(name, "") for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"))
    settings = Settings(root, host, prefect_port, mlflow_port, *named)
    os.environ |= settings.environment  # before Prefect reads it
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    from flows.up import up as start

    start(settings)
