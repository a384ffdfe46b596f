"""Syncing a run folder with MLflow in the background, with retries."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt.training.thread_priority import lower_thread_priority
from tasks.display import log_warning
from tasks.runtime.signals import stop_signals
from tasks.tracking.journal import METRICS_FILE
from tasks.tracking.mlflow_api import error_summary
from tasks.tracking.registry import send_models, send_registration
from tasks.tracking.sync import RunSync

STOPPED_FLUSH_SECONDS = 3.0
"""Longest wait for unsent data after a stop signal: the process is killed if it takes long."""
SEND_SECONDS = 10.0
MAX_RETRY_SECONDS = 60.0
"""Longest pause between attempts while MLflow is unreachable; it doubles from SEND_SECONDS."""

_sync_lock = threading.Lock()
"""A thread that was not waited for may still be sending when the next one starts."""


def sync_folder(folder: Path, uri: str) -> None:
    """Send what MLflow at `uri` does not have yet. Raises what MLflow raises; safe to repeat."""
    with _sync_lock:
        sync = RunSync(folder, uri)
        sync.send_parameters()
        sync.send_tags()
        sync.send_metrics()
        sync.send_files()
        # The status precedes the models: a registry that fails must delay nothing else.
        sync.send_status()
        send_models(sync)
        send_registration(sync)


@contextmanager
def sync_in_background(
    folder: Path, uri: str, flush_seconds: float, warn: bool = False
) -> Iterator[None]:
    """Sync a run folder during the block, and at its end wait up to `flush_seconds` for what is
    unsent. A failed attempt is repeated; the first one is logged if `warn` is set."""
    closing = threading.Event()

    def send_until_closed() -> None:
        lower_thread_priority()
        pause, is_first_error = SEND_SECONDS, True
        while True:
            last = closing.is_set()
            try:
                sync_folder(folder, uri)
                pause = SEND_SECONDS
            except Exception as error:  # whatever MLflow raises, training continues
                if warn and is_first_error:
                    log_warning(
                        f"MLflow at {uri} cannot be reached ({error_summary(error)}). The run "
                        f"continues; its metrics are saved in {folder / METRICS_FILE} and sent "
                        "when MLflow is reachable again. To use another server, set tracking.uri "
                        "or MLFLOW_TRACKING_URI"
                    )
                is_first_error = False
                pause = min(2 * pause, MAX_RETRY_SECONDS)
            if last:
                return
            closing.wait(pause)

    thread = threading.Thread(target=send_until_closed, name="mlflow-sync", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closing.set()
        thread.join(STOPPED_FLUSH_SECONDS if stop_signals.requested() else flush_seconds)


def sync_and_wait(folder: Path, uri: str, seconds: float, warn: bool = False) -> None:
    """Sync a run folder for at most `seconds`."""
    with sync_in_background(folder, uri, seconds, warn):
        pass
