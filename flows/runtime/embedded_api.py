"""Prefect's own API, beside the process that needs it, where no server is set."""

from __future__ import annotations

import signal
import subprocess
from functools import partial
from unittest.mock import patch

import httpx
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from flows.runtime.environment import EMBEDDED_API
from flows.runtime.process_exit import die_with_parent

ANSWER_SECONDS = 5.0
"""Waited for the first answer of a server that is set, each time that it is tried."""


def api_environment() -> dict[str, str]:
    """With which a process uses the API that this one uses; empty where none answers."""
    if served := PREFECT_API_URL.value():
        return {"PREFECT_API_URL": str(served)}
    try:
        with get_client(sync_client=True) as client:
            if client.api_healthcheck():
                return {}
            return {"PREFECT_API_URL": str(client.api_url), EMBEDDED_API: "1"}
    except (RuntimeError, httpx.TransportError):
        return {}


def start_api() -> Exception | None:
    """Start Prefect's embedded API, if no server is set; why there is none that answers.

    A terminal, `timeout` and their like send a signal to every process of a command. The API must
    outlive it by the moment in which the run says how it ended, so it is born into a session of its
    own; it ends with this process all the same, be it asked to or, where it hangs, not.
    """
    patience = {"timeout": ANSWER_SECONDS} if PREFECT_API_URL.value() else None
    apart = partial(
        subprocess.Popen, start_new_session=True, preexec_fn=die_with_parent(signal.SIGKILL)
    )
    try:
        with patch.object(subprocess, "Popen", apart):  # Prefect has no setting for this
            client = get_client(sync_client=True, httpx_settings=patience)
        with client:
            return client.api_healthcheck()
    except (RuntimeError, httpx.TransportError) as error:  # it did not come up in time
        return error
