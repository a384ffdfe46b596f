"""Settings that Prefect and torch read as they are imported, put into the environment before.

Nothing has to be installed or started beside the Python packages: Prefect's own API runs for the
length of a run, on SQLite under the run's root. Whatever is in the environment already wins, so
that `PREFECT_API_URL` points the same code at a server.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

EMBEDDED_API = "OVERNIGHT_EMBEDDED_API"
"""Set where PREFECT_API_URL names the embedded server of a process above, which ends with it."""
EMBEDDED = {
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    # The first start makes the database: 20 s, the default, are not enough on a slow machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # A server that is away is given up after 6 s and not after a minute, at each call.
    "PREFECT_CLIENT_MAX_RETRIES": "2",
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
}


def prepare(root: Path) -> None:
    """Point Prefect at `root`/prefect, and tell torch how to wait and to allocate. Too late once
    either has been imported: asserts that."""
    assert not {"prefect", "torch"} & sys.modules.keys(), "settings have been read already"
    home = Path(os.environ.setdefault("PREFECT_HOME", str(prefect_home(root))))
    home.mkdir(parents=True, exist_ok=True)  # Prefect makes the last folder alone
    for name, value in (EMBEDDED | COMPUTE).items():
        os.environ.setdefault(name, value)


def prefect_home(root: Path) -> Path:
    """Absolute, because Prefect's server is a process of its own."""
    return root.resolve() / "prefect"
