"""Settings that Prefect and torch read as they are imported, put into the environment before.

Nothing has to be installed or started beside the Python packages: Prefect's own API runs for the
length of a run, on SQLite under the run's root. Whatever is in the environment already wins, so
that `PREFECT_API_URL` points the same code at a server.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout

EMBEDDED_API = "OVERNIGHT_EMBEDDED_API"
"""Set where PREFECT_API_URL names the embedded server of a process above, which ends with it."""
EMBEDDED = {
    # Types of blocks are for its pages: it imported every Prefect package for them, each time.
    "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
    "PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # A server that is away is given up after 6 s, one that is silent after 66 s, at each call; by
    # Prefect's own settings after one minute and after seven.
    "PREFECT_CLIENT_MAX_RETRIES": "2",
    "PREFECT_API_REQUEST_TIMEOUT": "20",
    # The terminal belongs to the run's own lines; the run's page still gets every log line.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    # What it says of an API that is away, we say in one line.
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
}
COMPUTE = {
    # Threads that wait for work sleep instead of spinning, which takes the cores from whoever has
    # some: with both cores shared the loss took 1.7 times as long without it.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Segments that grow hardly fragment, so that more of a small card can be used.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    # On a CPU, blocks of 2 MB and more in huge pages of their own: a step is faster by a tenth and
    # more, and what is freed goes back instead of leaving holes in the heap (tests/benchmarks).
    "THP_MEM_ALLOC_ENABLE": "1",
}

SERVICE_LOCK = ".service.lock"
"""Below a root: held by the `overnight up` that runs there."""
SERVICE_RECORD = "service.json"
"""Below a root: where that one's servers are."""


def prepare(root: Path) -> None:
    """Point Prefect and MLflow at the servers of an `overnight up` that runs on this root, else
    Prefect at `root`/prefect, and tell torch how to wait and to allocate. Too late once Prefect or
    torch has been imported: asserts that."""
    assert not {"prefect", "torch"} & sys.modules.keys(), "settings have been read already"
    use_running_service(root)
    home = Path(os.environ.setdefault("PREFECT_HOME", str(prefect_home(root))))
    home.mkdir(parents=True, exist_ok=True)  # Prefect makes the last folder alone
    for name, value in (EMBEDDED | COMPUTE).items():
        os.environ.setdefault(name, value)


def prefect_home(root: Path) -> Path:
    """Absolute, because Prefect's server is a process of its own."""
    return root.resolve() / "prefect"


def use_running_service(root: Path) -> None:
    """Take the servers of an `overnight up` that runs on this root, unless others are named."""
    for name, value in service_environment(root).items():
        os.environ.setdefault(name, value)


def service_environment(root: Path) -> dict[str, str]:
    """Where the servers are of the `overnight up` that runs on this root; empty where none does.
    What one that was killed has left is removed."""
    record = root / SERVICE_RECORD
    if not record.exists():
        return {}
    lock = FileLock(root.resolve() / SERVICE_LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with contextlib.suppress(OSError, ValueError, KeyError):  # as it ends this moment
            return dict(json.loads(record.read_text(encoding="utf-8"))["environment"])
        return {}
    with lock:
        remove_service_record(root)
    return {}


def remove_service_record(root: Path) -> None:
    """Remove what leads to the servers of this root."""
    record = root / SERVICE_RECORD
    with contextlib.suppress(OSError, ValueError, KeyError):
        written = json.loads(record.read_text(encoding="utf-8"))
        if path := written.get("prefect_toml"):
            Path(path).unlink(missing_ok=True)
    record.unlink(missing_ok=True)
