"""Cancelled or killed under a real Prefect server and a real worker: the next flow run goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun, WorkerStatus

from gpt.training.checkpoint import latest_checkpoint
from gpt.training.run_lock import HOLDER_FILE
from tasks.journal import METRICS, read_lines
from tasks.tracking import MlflowClient

ROOT = Path(__file__).resolve().parent.parent
POOL = "one-gpu"
PATIENCE_SECONDS = 180.0
"""For a server, a worker, a flow run: on a machine that does other things as well."""
EXIT_SECONDS = 25.0


def wait_for(what: str, found: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited in vain for {what}")


@contextmanager
def prefect(log: Path, environment: dict[str, str], *words: str) -> Iterator[None]:
    """A Prefect process of its own, with whatever it starts, for the length of the block."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *words],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()
        process.wait()


@pytest.fixture
def environment(new_root: Path) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    return outside | {
        "PREFECT_HOME": str(new_root / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def client(tmp_path: Path, environment: dict[str, str]) -> Iterator[SyncPrefectClient]:
    """Of a server that has a worker."""
    url = environment["PREFECT_API_URL"]
    address = httpx.URL(url)
    listening = ("--host", address.host, "--port", str(address.port))
    with prefect(tmp_path / "server.log", environment, "server", "start", *listening):

        def healthy() -> bool:
            try:
                return httpx.get(f"{url}/health").is_success
            except httpx.TransportError:
                return False

        wait_for("the server", healthy)
        with SyncPrefectClient(url) as client:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
            worker = ("worker", "start", "--pool", POOL)
            with prefect(tmp_path / "worker.log", environment, *worker):
                wait_for("the worker", lambda: online(client))
                yield client


def online(client: SyncPrefectClient) -> bool:
    workers = client.request(
        "POST", "/work_pools/{name}/workers/filter", path_params={"name": POOL}
    )
    return any(worker["status"] == WorkerStatus.ONLINE.value for worker in workers.json())


def start(client: SyncPrefectClient, config: Path, root: Path, max_steps: int) -> FlowRun:
    """As a deployment of the flow runs it."""
    deployment = client.create_deployment(
        flow_id=client.create_flow_from_name("pretrain"),
        name="night",
        entrypoint="flows/pretrain.py:pretrain",
        work_pool_name=POOL,
        pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
    )
    training = {"max_steps": max_steps, "grad_acc": 8}
    overrides = {"run": {"root": str(root)}, "training": training}
    parameters = {"config": str(config), "overrides": overrides}
    return client.create_flow_run_from_deployment(deployment, parameters=parameters)


def run_folder(root: Path) -> Path:
    (folder,) = (root / "train").iterdir()
    return folder


def last_step(root: Path) -> int:
    """The last one in the journal; 0 where there is none yet."""
    if not (root / "train").exists():
        return 0
    lines, _ = read_lines(run_folder(root) / METRICS)
    return max((line.step for line in lines), default=0)


def wait_for_step(root: Path, step: int) -> None:
    wait_for(f"step {step}", lambda: last_step(root) >= step)


def wait_for_end(client: SyncPrefectClient, run: FlowRun) -> str:
    def ended() -> str | None:
        state = client.read_flow_run(run.id).state
        return state.type.value if state and state.is_final() else None

    return wait_for("the end of the flow run", ended)


def training_process(root: Path) -> int:
    """As the run's lock names it."""
    return int(json.loads((run_folder(root) / HOLDER_FILE).read_text())["pid"])


def mlflow_run(root: Path) -> tuple[MlflowClient, Any]:
    client = MlflowClient(f"sqlite:///{root}/mlflow/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return client, run


def test_cancelled_then_killed_then_finished(
    client: SyncPrefectClient, environment: dict[str, str], tiny_config: Path, new_root: Path
) -> None:
    """Three flow runs of one deployment, one run folder, one curve."""
    root = new_root

    cancelled = start(client, tiny_config, root, 100_000)
    wait_for_step(root, 8)
    pid = training_process(root)
    cancel = [sys.executable, "-m", "prefect", "flow-run", "cancel", str(cancelled.id)]
    subprocess.run(cancel, env=environment, check=True, capture_output=True, timeout=60)
    begin = time.monotonic()
    wait_for("the process to exit", lambda: not Path(f"/proc/{pid}").exists())
    assert time.monotonic() - begin < EXIT_SECONDS
    assert wait_for_end(client, cancelled) == "CANCELLED"
    checkpoint = latest_checkpoint(run_folder(root))
    assert checkpoint
    assert checkpoint.step == last_step(root)
    assert mlflow_run(root)[1].info.status == "KILLED"

    killed = start(client, tiny_config, root, 100_000)
    wait_for_step(root, checkpoint.step + 8)
    os.kill(training_process(root), signal.SIGKILL)
    assert wait_for_end(client, killed) == "CRASHED"

    steps = last_step(root) + 5
    assert wait_for_end(client, start(client, tiny_config, root, steps)) == "COMPLETED"
    tracking, run = mlflow_run(root)
    assert run.info.status == "FINISHED"
    points = tracking.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in points] == list(range(1, steps + 1))
