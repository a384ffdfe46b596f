"""Run the `overnight` command in its own process, and read what it leaves in the stores."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
from waiting import scaled

from tasks.tracking.mlflow_api import MlflowClient

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """The environment of a user, without the settings of the test suite."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}


def command(*words: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


OWN_API = ("training", "evaluation")
"""Where the command starts Prefect's API itself; elsewhere the suite's server saves that time."""


def last_state(root: Path, place: str) -> str:
    """State of the newest flow run."""
    if place in OWN_API:
        return flow_states(root)[-1]
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    assert run.state
    return run.state.type.value


def flow_states(root: Path) -> list[str]:
    """States of all flow runs, oldest first, from the database of the embedded API."""
    with closing(sqlite3.connect(root / "prefect" / "prefect.db")) as database:
        rows = database.execute("SELECT state_type FROM flow_run ORDER BY created").fetchall()
    return [state for (state,) in rows]


def mlflow_run(root: Path):
    client = MlflowClient(f"sqlite:///{root}/mlflow/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    return client, run


OUTSIDE = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}


def overnight(
    *arguments: str | Path, cwd: Path = ROOT, **settings: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli.main", *map(str, arguments)],
        cwd=cwd,
        env=OUTSIDE | {"PYTHONPATH": str(ROOT)} | settings,
        capture_output=True,
        text=True,
        timeout=scaled(60),
    )
