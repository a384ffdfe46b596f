"""The commands about the service on this machine: up, doctor."""

from __future__ import annotations

import json
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
    from flows.service.supervisor import ServiceSettings, check_project

    check_project()
    settings = ServiceSettings(root, host, prefect_port, mlflow_port, *_named_servers())
    os.environ |= settings.environment  # before Prefect reads it
    Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
    from flows.service.up import up as start

    start(settings)


@app.command()
def doctor(
    root: Root = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say what a night needs of this machine and does not find; exit code 1 where it does not."""
    from flows.runtime import environment

    environment.prepare(root)
    serves = "PREFECT_API_URL" in os.environ
    from flows.service.doctor import FAULT, check_machine
    from flows.service.supervisor import ServiceSettings

    settings = ServiceSettings(root, "127.0.0.1", 4200, 5000, *_named_servers())
    findings = []
    for finding in check_machine(settings, serves):
        findings.append(finding)
        if not as_json:
            print(f"{finding.level:5}  {finding.what}: {finding.found}", flush=True)
            if finding.remedy:
                print(f"       -> {finding.remedy}", flush=True)
    if as_json:
        print(json.dumps([vars(finding) for finding in findings], indent=2))
    if any(finding.level == FAULT for finding in findings):
        raise typer.Exit(1)


def _named_servers() -> tuple[str, str]:
    """Those of the environment."""
    return os.environ.get("PREFECT_API_URL", ""), os.environ.get("MLFLOW_TRACKING_URI", "")
