"""Where the service of `overnight up` runs, and how other processes find it."""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flows.runtime.environment import (
    SERVICE_LOCK,
    SERVICE_RECORD,
    prefect_home,
    read_service_record,
    remove_service_record,
)
from gpt.errors import Problem, ServiceError
from gpt.files import write_text

POOL = "gpu"
"""Prefect work pool of the GPU."""
ADDRESSES = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")
PROJECT = Path("prefect.yaml")
"""File with the deployments."""


@dataclass(frozen=True)
class ServiceSettings:
    root: Path
    host: str = "127.0.0.1"
    prefect_port: int = 4200
    mlflow_port: int = 5000
    external_prefect: str = field(default_factory=lambda: os.environ.get("PREFECT_API_URL", ""))
    """URL of a server to use instead of starting one."""
    external_mlflow: str = field(default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI", ""))
    """URI of a server or database to use instead of starting a server."""

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
        """Variables of the started processes and of the commands that use the service."""
        return {
            "PREFECT_API_URL": self.api_url,
            "PREFECT_HOME": os.environ.get("PREFECT_HOME", str(prefect_home(self.root))),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
        }


def redact_password(uri: str) -> str:
    """Return the URI with its password replaced by stars."""
    return re.sub(r"(\w://[^/:@]*:)[^/]+@", r"\1***@", uri)


@contextmanager
def publish_service(settings: ServiceSettings) -> Iterator[None]:
    """Hold the root's lock and publish the service's addresses: to `overnight` in a record below
    the root, to `prefect` in a prefect.toml in the current folder, unless it has one. External
    addresses, which may hold a password, are left out.

    Raises `ServiceError` with the addresses of a service that runs already, or if a port is in use.
    """
    root, toml = settings.root, Path("prefect.toml").absolute()
    root.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(root.resolve() / SERVICE_LOCK).acquire(blocking=False)
    except Timeout:
        found = read_service_record(root)  # empty if it is just starting
        addresses = [f"{k}={v}" for k, v in found.get("environment", {}).items() if k in ADDRESSES]
        who = f"process {found['pid']}" if found else "another process"
        rule = f"is already running: {', '.join([who, *addresses])}"
        remedy = "use that service, or stop it with Ctrl-C where it runs"
        raise ServiceError(Problem("overnight up", str(root), rule, remedy)) from None
    with lock:
        _check_ports(settings)
        external = {settings.external_prefect, settings.external_mlflow}
        environment = {k: v for k, v in settings.environment.items() if v not in external}
        record: dict[str, Any] = {"pid": os.getpid(), "environment": environment}
        if writes_toml := not (toml.exists() or settings.external_prefect):
            record["prefect_toml"] = str(toml)
        write_text(root / SERVICE_RECORD, json.dumps(record, indent=2))
        if writes_toml:
            note = f"Written by `overnight up`, process {os.getpid()}, which removes it at its end."
            write_text(toml, f'# {note}\n[api]\nurl = "{settings.api_url}"\n')
        try:
            yield
        finally:
            remove_service_record(root)


def _check_ports(settings: ServiceSettings) -> None:
    problems = []
    for option, variable, port, external in (
        ("--prefect-port", "PREFECT_API_URL", settings.prefect_port, settings.external_prefect),
        ("--mlflow-port", "MLFLOW_TRACKING_URI", settings.mlflow_port, settings.external_mlflow),
    ):
        if external:
            continue
        try:
            socket.create_server((settings.host, port)).close()
        except OSError as error:
            rule = f"cannot be opened on {settings.host}: {error.strerror}"
            remedy = f"pass another {option}, or stop the program that uses the port; to use a "
            remedy += f"server that runs there, set {variable}"
            problems.append(Problem(option, str(port), rule, remedy))
    if problems:
        raise ServiceError(*problems)
