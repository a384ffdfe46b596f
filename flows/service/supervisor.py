"""What `overnight up` keeps running on this machine: Prefect's server, MLflow's, and the worker
that has the GPU. Servers that the environment names are used instead of ours."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil
from filelock import FileLock, Timeout

from flows.runtime.environment import (
    SERVICE_LOCK,
    SERVICE_RECORD,
    prefect_home,
    remove_service_record,
)
from flows.runtime.process_exit import die_with_parent
from gpt.errors import Problem, ServiceError
from gpt.files import write_text
from tasks.tracking import mlflow_settings

POOL = "gpu"
PROJECT = Path("prefect.yaml")
"""What is deployed."""
START_SECONDS = 120.0
"""Longest wait for a server; the first start makes its database."""
STOP_SECONDS = 25.0
"""What a run has to write its checkpoint and say how it ended, and a server to close."""
RETRY_SECONDS = 2.0
"""Pause before what has ended by itself is started again; doubled each time up to a minute."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class ServiceSettings:
    root: Path
    host: str
    prefect_port: int
    mlflow_port: int
    external_prefect: str = ""
    """PREFECT_API_URL as it was found: that server is used, and none of ours started."""
    external_mlflow: str = ""
    """The same of MLFLOW_TRACKING_URI."""

    @property
    def api_url(self) -> str:
        return self.external_prefect or f"{self._address(self.prefect_port)}/api"

    @property
    def mlflow_uri(self) -> str:
        return self.external_mlflow or self._address(self.mlflow_port)

    def _address(self, port: int) -> str:
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{port}"

    @property
    def worker(self) -> str:
        return f"overnight-{socket.gethostname()}"

    @property
    def environment(self) -> dict[str, str]:
        """Of everything that is started, and of whoever is to find it."""
        return {
            "PREFECT_API_URL": self.api_url,
            "PREFECT_HOME": os.environ.get("PREFECT_HOME", str(prefect_home(self.root))),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
        }

    @property
    def local_environment(self) -> dict[str, str]:
        """The same without what was named to us, which may hold a password."""
        named = {
            "PREFECT_API_URL": self.external_prefect,
            "MLFLOW_TRACKING_URI": self.external_mlflow,
        }
        return {key: value for key, value in self.environment.items() if not named.get(key)}


def redact_password(uri: str) -> str:
    if "@" not in uri:
        return uri
    import sqlalchemy

    return sqlalchemy.make_url(uri).render_as_string(hide_password=True)


@dataclass
class ManagedProcess:
    """One process that is kept running, its output in a file."""

    name: str
    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    _pause: float = field(default=RETRY_SECONDS)
    _restart_at: float = 0.0

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            # A session of its own: Ctrl-C is ours to pass on, after the runs have ended.
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )

    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def due(self) -> bool:
        """Whether an ended one is to be started again; asked again and again, later each time."""
        if not self._restart_at:
            self._restart_at = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, 60.0)
        if time.monotonic() < self._restart_at:
            return False
        self._restart_at = 0.0
        return True


def build_processes(settings: ServiceSettings) -> tuple[list[ManagedProcess], ManagedProcess]:
    """The servers that are ours to start, and the worker."""
    logs, common = settings.root / "logs", settings.environment
    servers = []
    if not settings.external_prefect:
        listening = ("--host", settings.host, "--port", str(settings.prefect_port))
        command = ("prefect", "server", "start", *listening)
        servers.append(ManagedProcess("Prefect's server", command, logs / "prefect.log", common))
    if not settings.external_mlflow:
        # Its runners of background jobs serve prompts and traces, of which there are none here.
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | mlflow_settings.SETTINGS
        without = {key: value for key, value in common.items() if key != "MLFLOW_TRACKING_URI"}
        servers.append(
            ManagedProcess(
                "MLflow's server", _mlflow(settings), logs / "mlflow.log", without | quiet
            )
        )
    command = ("prefect", "worker", "start", "--pool", POOL, "--name", settings.worker)
    return servers, ManagedProcess("the worker", command, logs / "worker.log", common)


def _mlflow(settings: ServiceSettings) -> Sequence[str]:
    """Stores that the environment names (as PostgreSQL, an S3 bucket) are MLflow's to read."""
    store = settings.root.resolve() / "mlflow"
    words = ["mlflow", "server", "--workers", "1", "--host", settings.host]
    words += ["--port", str(settings.mlflow_port)]
    if "MLFLOW_BACKEND_STORE_URI" not in os.environ:
        words += ["--backend-store-uri", f"sqlite:///{store / 'mlflow.db'}"]
    if "MLFLOW_ARTIFACTS_DESTINATION" not in os.environ:
        words += ["--artifacts-destination", str(store / "artifacts")]
    return words


# --- one service a root --------------------------------------------------------------------------


@contextmanager
def hold_service_lock(settings: ServiceSettings) -> Iterator[None]:
    """Hold the root's service, and let the commands of this project find it for that long.

    Raises `ServiceError` with the addresses where it is held already, and for a port in use.
    """
    settings.root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(settings.root.resolve() / SERVICE_LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ServiceError(_running(settings.root)) from None
    try:
        check_ports_free(settings)
        yield
    finally:
        lock.release()


@contextmanager
def publish_service(settings: ServiceSettings) -> Iterator[None]:
    """Let the commands of this project find the service: ours by a record below the root
    (`flows.runtime.environment`), Prefect's own by the `prefect.toml` that it looks for in the
    folder where it is called, unless there is one."""
    toml = Path("prefect.toml").absolute()
    record: dict[str, Any] = {"pid": os.getpid(), "environment": settings.local_environment}
    if not toml.exists() and not settings.external_prefect:
        record["prefect_toml"] = str(toml)
        write_text(settings.root / SERVICE_RECORD, json.dumps(record, indent=2))
        note = f"# Written by `overnight up`, process {os.getpid()}, which removes it as it ends.\n"
        write_text(toml, f'{note}[api]\nurl = "{settings.api_url}"\n')
    write_text(settings.root / SERVICE_RECORD, json.dumps(record, indent=2))
    try:
        yield
    finally:
        remove_service_record(settings.root)


def _running(root: Path) -> Problem:
    try:
        record = json.loads((root / SERVICE_RECORD).read_text(encoding="utf-8"))
        environment = record["environment"]
        named = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")
        told = [f"{name}={environment[name]}" for name in named if name in environment]
        where = ", ".join([f"process {record['pid']}", *told])
    except (OSError, ValueError, KeyError):  # it is about to say so
        where = "another process"
    rule = f"is running already: {where}"
    return Problem("overnight up", str(root), rule, "use that one, or stop it with Ctrl-C there")


def check_project() -> None:
    """Raises `ServiceError` in a folder that has nothing to deploy."""
    if not PROJECT.exists():
        rule = "is not in this folder, so there is nothing to deploy"
        remedy = "change into the checkout of overnight, where it is"
        raise ServiceError(Problem(str(PROJECT), str(Path.cwd()), rule, remedy))


def check_ports_free(settings: ServiceSettings) -> None:
    ours = []
    if not settings.external_prefect:
        ours.append(("--prefect-port", "PREFECT_API_URL", settings.prefect_port))
    if not settings.external_mlflow:
        ours.append(("--mlflow-port", "MLFLOW_TRACKING_URI", settings.mlflow_port))
    problems = []
    for option, variable, port in ours:
        try:
            with socket.socket() as found:
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                found.bind((settings.host, port))
        except OSError as error:
            rule = f"cannot be listened on at {settings.host}: {error.strerror}"
            remedy = f"give another {option}, or stop what listens there; a server that is to be "
            remedy += f"used is named by {variable}"
            problems.append(Problem(option, str(port), rule, remedy))
    if problems:
        raise ServiceError(*problems)


# --- started, kept running, stopped --------------------------------------------------------------


def wait_until_healthy(url: str, part: ManagedProcess | None) -> None:
    """Until `url`/health answers. Raises `ServiceError` where its process ends, or after
    `START_SECONDS`."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and not (part and part.ended()):
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_SECONDS)
    where = f"read the end of {part.log}" if part else "start it, or unset what names it"
    name = part.name if part else "the server"
    raise ServiceError(Problem(name, url, "does not answer", where))


def supervise(
    kept: Sequence[ManagedProcess], may_start: Callable[[ManagedProcess], bool]
) -> NoReturn:
    """What ends is started again as soon as it `may_start`, which is asked again, later each
    time."""
    while True:
        for part in kept:
            if part.ended() and part.due() and may_start(part):
                part.start()
        time.sleep(POLL_SECONDS)


def stop_processes(runs: Sequence[int], kept: Sequence[ManagedProcess]) -> None:
    """End the runs, by a signal that lets them write a checkpoint, then the processes, the last
    first, and whatever they have started. Nothing is left after `STOP_SECONDS` for each."""
    _end([psutil.Process(pid) for pid in runs if psutil.pid_exists(pid)])
    for part in reversed(kept):
        if part.process is None or part.ended():
            continue
        whole = psutil.Process(part.process.pid)
        family = [whole, *whole.children(recursive=True)]
        part.process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(family, timeout=STOP_SECONDS)
        for process in left:
            process.kill()
        part.process.wait()


def _end(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        process.terminate()
    _, left = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    for process in left:
        process.kill()
