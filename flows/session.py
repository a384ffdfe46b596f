"""The flow as the command line runs it: Prefect's API beside it, and not in its way."""

from __future__ import annotations

import ctypes
import logging
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
from prefect import State
from prefect.client.orchestration import get_client
from prefect.exceptions import CancelledRun

from flows.outcome import Outcome
from flows.pretrain import pretrain, pretrain_without_prefect
from gpt.config import load_config
from gpt.errors import ConfigError
from tasks.console import warn
from tasks.prefect_api import is_away
from tasks.stopping import stopping

SIGNALLED = 128
"""Added to a signal's number this is the exit code of what it ended."""


def run_flow(config: str, overrides: dict[str, Any], fresh: bool) -> Outcome:
    """Run `pretrain` under Prefect; without, where its API is away or goes away.

    Every stage finds what it has done before, so beginning again costs next to nothing. Exits with
    128 plus the signal's number, after a line, where a signal stopped the run.
    """
    # Python's switch for production: a log line that cannot be delivered is nobody's business.
    logging.raiseExceptions = False
    try:
        return _run(config, overrides, fresh)
    except CancelledRun as cancelled:
        print(f"\n{cancelled}", file=sys.stderr)
        sys.exit(SIGNALLED + (stopping.signal or signal.SIGTERM))


def _run(config: str, overrides: dict[str, Any], fresh: bool) -> Outcome:
    if fault := _start_api():
        _warn_of(fault)
        return _result(pretrain_without_prefect(config, overrides, fresh))
    before = _run_folders(config, overrides)
    try:
        return _result(pretrain(config, overrides, fresh))
    except Exception as error:
        if not is_away(error):
            raise
        _warn_of(error)
    # What has begun fresh is gone on with.
    begun = _run_folders(config, overrides) - before
    return _result(pretrain_without_prefect(config, overrides, fresh and not begun))


def _run_folders(config: str, overrides: dict[str, Any]) -> set[Path]:
    try:
        return set((load_config(config, overrides).run.root / "train").glob("*"))
    except ConfigError:  # which the flow tells
        return set()


def _warn_of(fault: Exception) -> None:
    reason = (str(fault).splitlines() or [type(fault).__name__])[0]
    warn(f"Prefect's API is away ({reason}); the run goes on without it")


def _start_api() -> Exception | None:
    """Start Prefect's embedded API, if no server is set; why there is none that answers.

    A terminal, `timeout` and their like send a signal to every process of a command. The API must
    outlive it by the moment in which the run says how it ended, so it is born into a session of its
    own; it ends with this process all the same.
    """
    apart = partial(subprocess.Popen, start_new_session=True, preexec_fn=_end_with_parent)
    try:
        with patch.object(subprocess, "Popen", apart):  # Prefect has no setting for this
            client = get_client(sync_client=True)
        with client:
            return client.api_healthcheck()
    except (RuntimeError, httpx.TransportError) as error:  # it did not come up in time
        return error


def _end_with_parent() -> None:
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def _result(returned: Any) -> Outcome:
    """Outside of Prefect a stopped run is a state like any other value."""
    if isinstance(returned, State):
        raise CancelledRun(returned.message)
    assert isinstance(returned, Outcome)
    return returned
