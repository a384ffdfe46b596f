"""A real `overnight up` in its own project folder, and what a user does with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, cast
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, TaskRun
from waiting import scaled, wait_for

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32},
    "data": {"source": "data/sample.parquet", "validation_fraction": 0.2},
    "schedule": {"warmup_steps": 1},
    "training": {
        **{"batch_size": 2, "grad_acc": 2, "max_steps": 6, "dtype": "float32", "compile": False},
        **{"checkpoint_interval": 5, "log_interval": 2},
    },
    "evaluation": {"interval": 6, "tokens": 256, "prompts": ["The"], "sample_tokens": 4},
}
"""Overrides with which any config finishes within seconds."""


def cmdline_of(process: psutil.Process) -> list[str]:
    """Return the command line; empty once the process has ended."""
    with suppress(psutil.NoSuchProcess):
        return cast("list[str]", process.cmdline())
    return []


class Service:
    """A service in a copy of the checkout, with its own data and an empty home."""

    def __init__(self, folder: Path, parquet: Path, ports: tuple[int, int]) -> None:
        self.project = folder / "project"
        self.project.mkdir()
        for name in ("flows", "tasks", "gpt", "configs", "prefect.yaml"):
            (self.project / name).symlink_to(ROOT / name)
        (self.project / "data").mkdir()
        shutil.copy(parquet, self.project / "data" / "sample.parquet")
        (folder / "home").mkdir()
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
        self.environment = outside | {
            "HOME": str(folder / "home"),
            "PYTHONPATH": str(ROOT),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        self.ports = ports
        self.log = folder / "up.log"
        self.root = self.project / "runs"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}/api"

    @property
    def mlflow_uri(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    def client(self) -> SyncPrefectClient:
        return SyncPrefectClient(self.api_url)

    def command(self, *words: str) -> list[str]:
        prefect, mlflow = map(str, self.ports)
        ports = ("--prefect-port", prefect, "--mlflow-port", mlflow) if words == ("up",) else ()
        return [sys.executable, "-m", "flows.cli.main", *words, *ports]

    def start(self) -> None:
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                self.command("up"),
                **{"cwd": self.project, "env": self.environment},
                **{"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True},
            )
        process = self.process

        def ready() -> bool:
            assert process.poll() is None, self.log.read_text()
            return "\nready." in self.log.read_text()

        wait_for("overnight up", ready)

    def interrupt(self) -> None:
        assert self.process
        self.process.send_signal(signal.SIGINT)
        self.process.wait(scaled(60))

    def kill(self) -> None:
        """Kill the service and everything that it has started."""
        if self.process and self.process.poll() is None:
            for each in self.family():
                each.kill()
            self.process.wait()

    def family(self) -> list[psutil.Process]:
        assert self.process
        whole = psutil.Process(self.process.pid)
        everything = [whole, *whole.children(recursive=True)]
        return [each for each in everything if cmdline_of(each)]

    def worker(self) -> psutil.Process:
        """Wait for the worker process."""
        return wait_for("the worker", self._worker)

    def _worker(self) -> psutil.Process | None:
        return next((p for p in self.family() if "worker" in cmdline_of(p)), None)

    def run(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run an `overnight` command, as in another terminal."""
        return self._call(self.command(*words), settings)

    def prefect(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a `prefect` command, as in another terminal."""
        return self._call([sys.executable, "-m", "prefect", *words], {})

    def start_command(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a `prefect` command with the environment of a Kubernetes job."""
        behavior = {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule"}
        return subprocess.Popen(
            [sys.executable, "-m", "prefect", *words],
            cwd=self.project,
            env=self.environment | behavior | {"PREFECT_API_URL": self.api_url},
        )

    def python(self, code: str) -> None:
        environment = self.environment | {"PREFECT_API_URL": self.api_url}
        words = [sys.executable, "-c", code]
        subprocess.run(words, cwd=self.project, env=environment, check=True, timeout=scaled(60))

    def _call(self, words: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
        environment = self.environment | settings
        place = {"cwd": self.project, "env": environment}
        return subprocess.run(words, **place, capture_output=True, text=True, timeout=scaled(60))

    def start_run(self, name: str, **overrides: Any) -> FlowRun:
        """Start a run of a deployment with `SMALL` and the overrides by section."""
        return self._create_run(name, {"overrides": small(**overrides)})

    def start_run_with(self, name: str, config: str, overrides: dict[str, Any]) -> FlowRun:
        """Start a run of a deployment with another config and only these overrides."""
        return self._create_run(name, {"config": config, "overrides": overrides})

    def _create_run(self, name: str, parameters: dict[str, Any]) -> FlowRun:
        with self.client() as client:
            deployment = client.read_deployment_by_name(name)
            return client.create_flow_run_from_deployment(deployment.id, parameters=parameters)

    def read(self, run: FlowRun) -> FlowRun:
        with self.client() as client:
            return client.read_flow_run(run.id)

    def wait_for_end(self, run: FlowRun) -> FlowRun:
        def end() -> FlowRun | None:
            found = self.read(run)
            return found if found.state and found.state.is_final() else None

        return wait_for(f"the end of {run.name}", end)

    def task_runs(self, *runs: UUID) -> list[TaskRun]:
        wanted = TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=list(runs)))
        with self.client() as client:
            return client.read_task_runs(task_run_filter=wanted)


def small(**overrides: Any) -> dict[str, Any]:
    return {s: SMALL.get(s, {}) | overrides.get(s, {}) for s in {*SMALL, *overrides}}


class Webhook:
    """A webhook on this machine that records the messages it receives."""

    def __init__(self) -> None:
        messages: list[dict[str, str]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.messages = messages
        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def about(self, name: str) -> dict[str, str]:
        return wait_for(
            f"a message about {name}",
            lambda: next((m for m in self.messages if name in m["subject"]), None),
        )
