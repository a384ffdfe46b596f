"""`overnight up`: from a checkout to a service on this machine, in the order that it comes up."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient

from flows.service import deployments
from flows.service.supervisor import (
    POLL_SECONDS,
    START_SECONDS,
    ManagedProcess,
    ServiceSettings,
    build_processes,
    hold_service_lock,
    publish_service,
    redact_password,
    stop_processes,
    supervise,
    wait_until_healthy,
)
from gpt.data.sample_corpus import write_sample_corpus
from gpt.errors import Problem, ServiceError
from tasks.runtime.prefect_api import is_api_unreachable

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAMPLE = Path("data/sample.parquet")
"""What configs/tiny.toml trains on."""


def up(settings: ServiceSettings) -> None:
    """Start everything, say where it is, keep it running until Ctrl-C or SIGTERM, end everything.

    Raises `ServiceError` for a service that runs already, ports in use, and servers that do not
    come up.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    servers, worker = build_processes(settings)
    with hold_service_lock(settings), publish_service(settings):
        try:
            _start(settings, servers, worker)
            _tell(settings)
            supervise([*servers, worker], lambda part: _may_start(part, worker, settings))
        except KeyboardInterrupt:
            pass
        finally:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            print("stopping: runs write a checkpoint first", flush=True)
            stop_processes(_runs(settings), [*servers, worker])
    print("stopped; a run that was going on goes on when it is started again", flush=True)


def _start(
    settings: ServiceSettings, servers: list[ManagedProcess], worker: ManagedProcess
) -> None:
    for server in servers:
        print(f"starting {server.name}, log in {server.log}", flush=True)
        if server.name.startswith("MLflow"):
            _make_mlflow_store(settings)  # while Prefect's server takes its time
        server.start()
    if not SAMPLE.exists():  # while the servers take their time
        SAMPLE.parent.mkdir(parents=True, exist_ok=True)
        print(f"{SAMPLE}: written, {write_sample_corpus(SAMPLE).documents:,} documents", flush=True)
    addresses = {"Prefect": settings.api_url, "MLflow": settings.mlflow_uri}
    for name, url in addresses.items():
        if not url.startswith("http"):  # a store without a server
            continue
        own = [server for server in servers if server.name.startswith(name)]
        wait_until_healthy(url, own[0] if own else None)
    with deployments.api() as client:
        deployments.make_pool(client)
        print(f"deployed {', '.join(deployments.deploy(client))}", flush=True)
        _start_worker(client, worker, settings)


def _make_mlflow_store(settings: ServiceSettings) -> None:
    """Whole, whenever this is killed: half a store is one that MLflow never works with again."""
    if "MLFLOW_BACKEND_STORE_URI" not in os.environ:
        from tasks.tracking.metadata import mlflow_folder
        from tasks.tracking.runs import create_sqlite_store

        folder = mlflow_folder(settings.root)
        folder.mkdir(parents=True, exist_ok=True)
        create_sqlite_store(folder / "mlflow.db")


def _start_worker(
    client: SyncPrefectClient, worker: ManagedProcess, settings: ServiceSettings
) -> None:
    _start_lost_runs_again(client, settings)
    print(f"starting {worker.name}, log in {worker.log}", flush=True)
    worker.start()
    end = time.monotonic() + START_SECONDS
    while settings.worker not in deployments.read_online_workers(client):
        if worker.ended() or time.monotonic() > end:
            rule = "does not come up"
            raise ServiceError(Problem(worker.name, "", rule, f"read the end of {worker.log}"))
        time.sleep(POLL_SECONDS)


def _may_start(part: ManagedProcess, worker: ManagedProcess, settings: ServiceSettings) -> bool:
    """Whether a part that has ended by itself can be started again: the worker not while nobody
    knows which runs were lost with it."""
    assert part.process
    if part is worker:
        try:
            with deployments.api() as client:
                _start_lost_runs_again(client, settings)
        except Exception as error:
            if not is_api_unreachable(error):
                raise
            return False
    code = part.process.returncode
    print(f"{part.name} has ended (exit {code}, see {part.log}); started again", flush=True)
    return True


def _start_lost_runs_again(client: SyncPrefectClient, settings: ServiceSettings) -> None:
    for run in deployments.reschedule_lost_runs(client, settings.worker):
        print(f"the process of run {run.name} was lost; it goes on from its checkpoint", flush=True)


def _runs(settings: ServiceSettings) -> list[int]:
    """The processes of the runs."""
    try:
        with deployments.api() as client:
            runs = deployments.running(client, settings.worker)
    except Exception:  # the server is what has failed; the worker's own children are ended anyway
        return []
    return [pid for run in runs if (pid := deployments.find_process(run))]


def _tell(settings: ServiceSettings) -> None:
    addresses = {"PREFECT_API_URL": settings.api_url, "MLFLOW_TRACKING_URI": settings.mlflow_uri}
    exports = " ".join(f"{name}={redact_password(uri)}" for name, uri in addresses.items())
    print(
        f"""
ready. In a browser:
  Prefect  {settings.api_url.removesuffix("/api")}
  MLflow   {redact_password(settings.mlflow_uri)}
In another terminal, in this folder:
  prefect deployment run pretrain/tiny --watch
elsewhere after
  export {exports}
Ctrl-C stops everything.""",
        flush=True,
    )
