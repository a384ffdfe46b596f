"""`overnight up`: from a checkout to a running service on this machine."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client

from flows.service import deployments
from flows.service.settings import (
    ServiceSettings,
    hold_service_lock,
    publish_service,
    redact_password,
)
from flows.service.supervisor import (
    POLL_SECONDS,
    START_SECONDS,
    ManagedProcess,
    build_processes,
    stop_processes,
    supervise,
    wait_until_healthy,
)
from gpt.data.sample_corpus import write_sample_corpus
from gpt.errors import Problem, ServiceError
from tasks.runtime.prefect_api import is_api_unreachable

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAMPLE = Path("data/sample.parquet")
"""Source of configs/tiny.toml."""


def up(settings: ServiceSettings) -> None:
    """Start and supervise the service until Ctrl-C or SIGTERM, then stop everything.

    Raises `ServiceError` if a service runs already, a port is in use or a server does not come up.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    servers, worker = build_processes(settings)
    with hold_service_lock(settings), publish_service(settings):
        try:
            _start(settings, servers, worker)
            _print_addresses(settings)
            supervise([*servers, worker], lambda ended: _may_restart(ended, worker, settings))
        except KeyboardInterrupt:
            pass
        finally:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            print("stopping: runs write a checkpoint first", flush=True)
            stop_processes(_running_pids(settings), [*servers, worker])
    print("stopped; start an interrupted run again to resume it", flush=True)


def _start(
    settings: ServiceSettings, servers: list[ManagedProcess], worker: ManagedProcess
) -> None:
    for server in servers:
        print(f"starting {server.name}, log in {server.log}", flush=True)
        if server.name.startswith("MLflow"):
            _create_mlflow_store(settings)  # while Prefect's server starts
        server.start()
    if not SAMPLE.exists():  # while the servers start
        SAMPLE.parent.mkdir(parents=True, exist_ok=True)
        print(f"{SAMPLE}: written, {write_sample_corpus(SAMPLE).documents:,} documents", flush=True)
    for name, url in (("Prefect", settings.api_url), ("MLflow", settings.mlflow_uri)):
        if url.startswith("http"):  # else a database, used without a server
            own = [server for server in servers if server.name.startswith(name)]
            wait_until_healthy(url, own[0] if own else None)
    with get_client(sync_client=True) as client:
        deployments.create_work_pool(client)
        print(f"deployed {', '.join(deployments.deploy(client))}", flush=True)
        _start_worker(client, worker, settings)


def _create_mlflow_store(settings: ServiceSettings) -> None:
    """Create the database atomically: MLflow cannot repair one whose creation was interrupted."""
    if "MLFLOW_BACKEND_STORE_URI" not in os.environ:
        from tasks.tracking.metadata import mlflow_folder
        from tasks.tracking.runs import create_sqlite_store

        folder = mlflow_folder(settings.root)
        folder.mkdir(parents=True, exist_ok=True)
        create_sqlite_store(folder / "mlflow.db")


def _start_worker(
    client: SyncPrefectClient, worker: ManagedProcess, settings: ServiceSettings
) -> None:
    _reschedule_lost_runs(client, settings)
    print(f"starting {worker.name}, log in {worker.log}", flush=True)
    worker.start()
    deadline = time.monotonic() + START_SECONDS
    while settings.worker not in deployments.read_online_workers(client):
        if worker.has_exited() or time.monotonic() > deadline:
            remedy = f"read the end of {worker.log}"
            raise ServiceError(Problem(worker.name, "", "does not come online", remedy))
        time.sleep(POLL_SECONDS)


def _may_restart(ended: ManagedProcess, worker: ManagedProcess, settings: ServiceSettings) -> bool:
    """Return whether to restart a process now: the worker only once the runs that were lost with
    it are rescheduled, which needs Prefect's server."""
    assert ended.process
    if ended is worker:
        try:
            with get_client(sync_client=True) as client:
                _reschedule_lost_runs(client, settings)
        except Exception as error:
            if not is_api_unreachable(error):
                raise
            return False
    code = ended.process.returncode
    print(f"{ended.name} ended with exit code {code} (see {ended.log}); restarting it", flush=True)
    return True


def _reschedule_lost_runs(client: SyncPrefectClient, settings: ServiceSettings) -> None:
    for run in deployments.reschedule_lost_runs(client, settings.worker):
        print(f"the process of run {run.name} is gone; it resumes from its checkpoint", flush=True)


def _running_pids(settings: ServiceSettings) -> list[int]:
    try:
        with get_client(sync_client=True) as client:
            runs = deployments.read_running(client, settings.worker)
    except Exception:  # the server has failed; the worker's children are stopped anyway
        return []
    return [pid for run in runs if (pid := deployments.find_process(run))]


def _print_addresses(settings: ServiceSettings) -> None:
    mlflow_uri = redact_password(settings.mlflow_uri)
    print(
        f"""
ready. In a browser:
  Prefect  {settings.api_url.removesuffix("/api")}
  MLflow   {mlflow_uri}
In another terminal, in this folder:
  prefect deployment run pretrain/tiny --watch
In other folders, first:
  export PREFECT_API_URL={redact_password(settings.api_url)} MLFLOW_TRACKING_URI={mlflow_uri}
Ctrl-C stops everything.""",
        flush=True,
    )
