"""The processes of `overnight up`: started, restarted when they end, stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from flows.runtime.process_exit import die_with_parent
from flows.service.settings import POOL, ServiceSettings
from gpt.errors import Problem, ServiceError
from tasks.tracking import mlflow_settings

START_SECONDS = 120.0
"""Longest wait for a server; its first start creates the database."""
STOP_SECONDS = 25.0
"""Time for a run to write its checkpoint and report its end, and for a server to close."""
RESTART_SECONDS = 2.0
"""Delay before a process that has ended is restarted; doubles each time."""
MOST_RESTART_SECONDS = 60.0
POLL_SECONDS = 0.5


@dataclass
class ManagedProcess:
    """A process that is restarted when it ends. It writes its output to a file."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    _delay: float = field(default=RESTART_SECONDS)
    _restart_at: float = 0.0

    def start(self) -> None:
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
        """Return whether to try to restart an ended process now."""
        if not self._restart_at:
            self._restart_at = time.monotonic() + self._delay
            self._delay = min(2 * self._delay, MOST_RESTART_SECONDS)
        if time.monotonic() < self._restart_at:
            return False
        self._restart_at = 0.0
        return True


def wait_until_healthy(url: str, process: ManagedProcess | None) -> None:
    """Wait until `url`/health answers. Raises `ServiceError` if its process ends, or after
    `START_SECONDS`."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and not (process and process.has_exited()):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_SECONDS)
    remedy = f"read the end of {process.log}" if process else "start it, or unset its variable"
    name = process.name if process else "the server"
    raise ServiceError(Problem(name, url, "does not answer", remedy))


def build_processes(settings: ServiceSettings) -> tuple[list[ManagedProcess], ManagedProcess]:
    """Return the servers to start and the worker."""
    logs, environment = settings.root / "logs", settings.environment
    servers = []
    if not settings.external_prefect:
        port = str(settings.prefect_port)
        command = ["prefect", "server", "start", "--host", settings.host, "--port", port]
        servers.append(
            ManagedProcess("Prefect's server", command, logs / "prefect.log", environment)
        )
    if not settings.external_mlflow:
        own = {k: v for k, v in environment.items() if k != "MLFLOW_TRACKING_URI"}
        # Job workers only serve prompts and traces.
        own |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | mlflow_settings.SETTINGS
        command = _mlflow_command(settings)
        servers.append(ManagedProcess("MLflow's server", command, logs / "mlflow.log", own))
    command = ["prefect", "worker", "start", "--pool", POOL, "--name", settings.worker]
    return servers, ManagedProcess("the worker", command, logs / "worker.log", environment)


def _mlflow_command(settings: ServiceSettings) -> list[str]:
    """Return the server's command. Stores set in the environment (PostgreSQL, S3) are left to
    MLflow."""
    store = settings.root.resolve() / "mlflow"
    words = ["mlflow", "server", "--workers", "1", "--host", settings.host]
    words += ["--port", str(settings.mlflow_port)]
    if "MLFLOW_BACKEND_STORE_URI" not in os.environ:
        words += ["--backend-store-uri", f"sqlite:///{store / 'mlflow.db'}"]
    if "MLFLOW_ARTIFACTS_DESTINATION" not in os.environ:
        words += ["--artifacts-destination", str(store / "artifacts")]
    return words


def supervise(
    processes: Sequence[ManagedProcess], may_restart: Callable[[ManagedProcess], bool]
) -> NoReturn:
    """Restart each process that ends, as soon as `may_restart` allows it."""
    while True:
        for each in processes:
            if each.has_exited() and each.is_restart_due() and may_restart(each):
                each.start()
        time.sleep(POLL_SECONDS)


def stop_processes(runs: Sequence[int], processes: Sequence[ManagedProcess]) -> None:
    """Stop the runs, which write a checkpoint, then the processes in reverse order with all their
    children. What is left after `STOP_SECONDS` each is killed."""
    found = [psutil.Process(pid) for pid in runs if psutil.pid_exists(pid)]
    for run in found:
        run.terminate()
    _kill_after_timeout(found)
    for each in reversed(processes):
        if each.process is None or each.has_exited():
            continue
        parent = psutil.Process(each.process.pid)
        family = [parent, *parent.children(recursive=True)]
        each.process.send_signal(signal.SIGINT)
        _kill_after_timeout(family)
        each.process.wait()


def _kill_after_timeout(processes: Sequence[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    for process in left:
        process.kill()
