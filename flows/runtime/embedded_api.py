"""Prefect's own API as a child process of the run, where no server is configured.

Prefect starts an ephemeral API by itself, but in the process group of the run, where Ctrl-C ends it
before the run can report its end, and on a port that two runs started together may share.
"""

import atexit
import os
import signal
import socket
import subprocess
import sys
import time

from prefect.settings import PREFECT_API_URL

from flows.runtime.environment import EMBEDDED_API
from flows.runtime.process_exit import die_with_parent, stop_process

SERVER = ["uvicorn", "--factory", "prefect.server.api.server:create_app", "--log-level", "error"]
SERVER_SETTINGS = {
    # As Prefect's own ephemeral API: no user interface and no schedules.
    "PREFECT__SERVER_EPHEMERAL": "1",
    "PREFECT__SERVER_FINAL": "1",
}
ANSWER_SECONDS = 5.0
"""Longest wait for one answer to a health check."""
START_SECONDS = 90.0
"""Longest wait for the embedded API; its first start creates the database."""
STOP_SECONDS = 5.0

servers: list[subprocess.Popen[bytes]] = []
"""The embedded API that this process has started, if any."""


def launch_api() -> None:
    """Start the embedded API unless a server is configured or it is running, without waiting.

    It comes up while this process imports torch and MLflow, which takes as long.
    """
    if servers or PREFECT_API_URL.value():
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "gpt.gc_tuning", *SERVER, "--port", str(port)],
        env=os.environ | SERVER_SETTINGS,
        # Ctrl-C and `timeout` signal a whole process group; the API outlives it by a moment.
        start_new_session=True,
        preexec_fn=die_with_parent(signal.SIGKILL),
    )
    servers.append(server)
    atexit.register(stop_process, server, STOP_SECONDS)
    os.environ |= {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", EMBEDDED_API: "1"}


def start_api() -> Exception | None:
    """Launch the API and wait for its answer. Return why no API answers, or None."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.context import refresh_global_settings_context

    launch_api()
    refresh_global_settings_context()
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with get_client(sync_client=True, httpx_settings={"timeout": ANSWER_SECONDS}) as client:
                fault = client.api_healthcheck()
        except (RuntimeError, httpx.TransportError) as error:
            fault = error
        if not (fault and servers) or servers[-1].poll() is not None or time.monotonic() > deadline:
            return fault
        time.sleep(0.1)
