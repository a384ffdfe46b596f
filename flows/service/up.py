"""`overnight up`: from a checkout to a running service on this machine.

The servers and the worker are started, restarted when they end, and stopped together.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil
from prefect.client.orchestration import get_client

from flows.runtime.process_exit import die_with_parent
from flows.service import deployments
from flows.service.settings import POOL, ServiceSettings, publish_service, redact_password
from gpt.data.sample_corpus import write_sample_corpus
from gpt.errors import Problem, ServiceError
from tasks.runtime.prefect_api import is_api_unreachable
from tasks.tracking import mlflow_settings

START_SECONDS = 120.0
"""Longest wait for a server; its first start creates the database."""
STOP_SECONDS = 25.0
"""Time for a run to write its checkpoint and report its end, and for a server to close."""
RESTART_SECONDS = 2.0
"""Delay before a process that has ended is restarted; doubles each time."""
MOST_RESTART_SECONDS = 60.0
POLL_SECONDS = 0.5
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAMPLE = Path("data/sample.parquet")
"""Source of configs/tiny.toml."""


@dataclass
class ManagedProcess:
    """A process that is restarted when it ends. It writes its output to a file."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    delay: float = RESTART_SECONDS
    restart_at: float = 0.0

    def start(self) -> None:
        print(f"starting {self.name}, log in {self.log}", flush=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C stops the runs first, then the servers
                preexec_fn=die_with_parent(signal.SIGTERM),
            )

    def has_exited(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def is_restart_due(self) -> bool:
        """Return whether to restart it now, because it has ended."""
        if not self.has_exited():
            return False
        now = time.monotonic()
        if not self.restart_at:
            self.restart_at = now + self.delay
            self.delay = min(2 * self.delay, MOST_RESTART_SECONDS)
        if is_due := now >= self.restart_at:
            self.restart_at = 0.0
        return is_due


def up(settings: ServiceSettings) -> None:
    """Start and supervise the service until Ctrl-C or SIGTERM, then stop everything.

    Raises `ServiceError` if a service runs already, a port is in use or a server does not come up.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    processes = build_processes(settings)
    with publish_service(settings):
        try:
            _start(settings, *processes)
            _print_addresses(settings)
            while True:
                for each in processes:
                    if each.is_restart_due():
                        _restart(each, settings)
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            pass
        finally:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            print("stopping: runs write a checkpoint first", flush=True)
            _stop(settings, processes)
    print("stopped; start an interrupted run again to resume it", flush=True)


def build_processes(settings: ServiceSettings) -> list[ManagedProcess]:
    """Return the servers to start, then the worker."""
    logs, environment = settings.root / "logs", settings.environment
    address = ["--host", settings.host, "--port"]
    processes = []
    if not settings.external_prefect:
        command = ["prefect", "server", "start", *address, str(settings.prefect_port)]
        processes.append(
            ManagedProcess("Prefect's server", command, logs / "prefect.log", environment)
        )
    if not settings.external_mlflow:
        own = {k: v for k, v in environment.items() if k != "MLFLOW_TRACKING_URI"}
        # Job workers only serve prompts and traces.
        own |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | mlflow_settings.SETTINGS
        command = ["mlflow", "server", "--workers", "1", *address, str(settings.mlflow_port)]
        # Stores set in the environment (PostgreSQL, S3) are left to MLflow.
        store = settings.root.resolve() / "mlflow"
        if "MLFLOW_BACKEND_STORE_URI" not in os.environ:
            command += ["--backend-store-uri", f"sqlite:///{store / 'mlflow.db'}"]
        if "MLFLOW_ARTIFACTS_DESTINATION" not in os.environ:
            command += ["--artifacts-destination", str(store / "artifacts")]
        processes.append(ManagedProcess("MLflow's server", command, logs / "mlflow.log", own))
    command = ["prefect", "worker", "start", "--pool", POOL, "--name", settings.worker]
    return [*processes, ManagedProcess("the worker", command, logs / "worker.log", environment)]


def _start(settings: ServiceSettings, *processes: ManagedProcess) -> None:
    *servers, worker = processes
    for server in servers:
        if server.name == "MLflow's server" and "MLFLOW_BACKEND_STORE_URI" not in os.environ:
            # While Prefect's server starts; atomically: MLflow cannot repair a partial database.
            from tasks.tracking.metadata import mlflow_folder
            from tasks.tracking.runs import create_sqlite_store

            create_sqlite_store(mlflow_folder(settings.root) / "mlflow.db")
        server.start()
    if not SAMPLE.exists():  # while the servers start
        SAMPLE.parent.mkdir(parents=True, exist_ok=True)
        print(f"{SAMPLE}: written, {write_sample_corpus(SAMPLE)[0]:,} documents", flush=True)
    for name, url in (("Prefect", settings.api_url), ("MLflow", settings.mlflow_uri)):
        if url.startswith("http"):  # else a database, used without a server
            own = next((server for server in servers if server.name.startswith(name)), None)
            _wait_until(partial(_is_healthy, url), own, f"{url} does not answer")
    with get_client(sync_client=True) as client:
        deployments.create_work_pool(client)
        print(f"deployed {', '.join(deployments.deploy(client))}", flush=True)
        deployments.reschedule_lost_runs(client, settings.worker)
        worker.start()
        _wait_until(
            lambda: settings.worker in deployments.read_online_workers(client),
            worker,
            "does not come online",
        )


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


def _wait_until(ready: Callable[[], bool], process: ManagedProcess | None, rule: str) -> None:
    """Raises `ServiceError` with the rule if the process ends, or after `START_SECONDS`."""
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if (process and process.has_exited()) or time.monotonic() > deadline:
            remedy = (
                f"read the end of {process.log}" if process else "start it, or unset its variable"
            )
            name = process.name if process else "the server"
            raise ServiceError(Problem(name, "", rule, remedy))
        time.sleep(POLL_SECONDS)


def _restart(ended: ManagedProcess, settings: ServiceSettings) -> None:
    """Restart a process: the worker only once the runs that were lost with it are rescheduled,
    which needs Prefect's server; until then it is tried again."""
    assert ended.process
    print(f"{ended.name} ended with exit code {ended.process.returncode}", flush=True)
    try:
        if ended.name == "the worker":
            with get_client(sync_client=True) as client:
                deployments.reschedule_lost_runs(client, settings.worker)
        ended.start()
    except Exception as error:
        if not is_api_unreachable(error):
            raise


def _stop(settings: ServiceSettings, processes: Sequence[ManagedProcess]) -> None:
    """Stop the runs, which write a checkpoint, then the processes in reverse order, each with all
    its children. What is left after `STOP_SECONDS` each is killed."""
    runs: list[int | None] = []
    with suppress(Exception), get_client(sync_client=True) as client:  # the server may have failed
        running = deployments.read_running(client, settings.worker)
        runs = [deployments.find_process(run) for run in running]
    alive = [each for each in reversed(processes) if not each.has_exited()]
    own = [each.process.pid for each in alive if each.process]
    for pid in filter(None, [*runs, *own]):
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(pid)
            family = [parent, *parent.children(recursive=True)]
            parent.send_signal(signal.SIGINT if pid in own else signal.SIGTERM)
            for left in psutil.wait_procs(family, timeout=STOP_SECONDS)[1]:
                left.kill()


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
