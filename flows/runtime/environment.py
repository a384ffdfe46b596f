"""Environment variables that Prefect and torch read when they are imported.

Variables that are set already win, so `PREFECT_API_URL` points the same code at another server.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

EMBEDDED_API = "OVERNIGHT_EMBEDDED_API"
"""Set if PREFECT_API_URL names the embedded API of this process or of its parent."""
EMBEDDED = {
    # Block types are only needed by the UI; registering them imports every Prefect package.
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # Give up on a server that is down after 6 s, on one that hangs after 66 s; by default it takes
    # one minute and seven minutes per call.
    "PREFECT_CLIENT_MAX_RETRIES": "2",
    "PREFECT_API_REQUEST_TIMEOUT": "20",
    # The terminal shows the run's own lines; the flow run's page still gets every log line.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    # `local_run` reports an unreachable API on one line instead.
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
}
COMPUTE = {
    # Waiting threads sleep instead of spinning: on two shared cores, spinning made the loss take
    # 1.7 times as long.
    "OMP_WAIT_POLICY": "PASSIVE",
    # On a CPU, huge pages for blocks of 2 MB and more: steps are over 10 % faster, and freed memory
    # returns to the system instead of leaving holes in the heap (tests/benchmarks).
    "THP_MEM_ALLOC_ENABLE": "1",
}

SERVICE_LOCK = ".service.lock"
"""File below a root that the `overnight up` running there holds locked."""
SERVICE_RECORD = "service.json"
"""File below a root with the addresses of its service."""


def prepare(root: Path) -> None:
    """Set up Prefect, MLflow and torch for this root. Call it before importing Prefect or torch.

    Prefect and MLflow use the servers of the `overnight up` that runs on the root, if any, and
    otherwise keep their data below the root.
    """
    assert not {"prefect", "torch"} & sys.modules.keys(), "settings have been read already"
    use_running_service(root)
    home = Path(os.environ.setdefault("PREFECT_HOME", str(prefect_home(root))))
    home.mkdir(parents=True, exist_ok=True)  # Prefect creates only the last folder
    for name, value in (EMBEDDED | COMPUTE).items():
        os.environ.setdefault(name, value)


def prefect_home(root: Path) -> Path:
    """Return PREFECT_HOME for a root: absolute, because the server is another process."""
    return root.resolve() / "prefect"


def use_running_service(root: Path) -> None:
    """Use the servers of the `overnight up` that runs on this root, unless others are set."""
    os.environ |= service_environment(root) | os.environ


def service_environment(root: Path) -> dict[str, str]:
    """Return the variables that point at the service running on this root; empty if none runs.

    Removes the record of a service that was killed.
    """
    if not (root / SERVICE_RECORD).exists():
        return {}
    from filelock import FileLock, Timeout

    try:
        with FileLock(root.resolve() / SERVICE_LOCK, blocking=False):
            remove_service_record(root)
    except Timeout:
        return dict(read_service_record(root).get("environment", {}))
    return {}


def read_service_record(root: Path) -> dict[str, Any]:
    """Return the record of the root's service; empty if it starts or ends right now."""
    with suppress(OSError, ValueError):
        return dict(json.loads((root / SERVICE_RECORD).read_text(encoding="utf-8")))
    return {}


def remove_service_record(root: Path) -> None:
    """Remove the record of a service, and the prefect.toml that it wrote."""
    if path := read_service_record(root).get("prefect_toml"):
        Path(path).unlink(missing_ok=True)
    (root / SERVICE_RECORD).unlink(missing_ok=True)
