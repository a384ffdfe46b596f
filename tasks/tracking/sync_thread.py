"""Syncing a run folder with MLflow in the background, with retries."""

from __future__ import annotations

import threading
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


class SyncThread(threading.Thread):
    """Context manager that syncs a run folder in the background, and at the end waits up to
    `flush_seconds` for what is unsent. A failed attempt is repeated; the first one is logged if
    `warn` is set."""

    def __init__(self, folder: Path, uri: str, flush_seconds: float, warn: bool = False) -> None:
        super().__init__(name="mlflow-sync", daemon=True)
        self._folder, self._uri = folder, uri
        self._flush_seconds, self._warn = flush_seconds, warn
        self._closing = threading.Event()

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self.join(STOPPED_FLUSH_SECONDS if stop_signals.requested() else self._flush_seconds)

    def run(self) -> None:
        lower_thread_priority()
        pause = SEND_SECONDS
        while True:
            last = self._closing.is_set()
            try:
                sync_folder(self._folder, self._uri)
                pause = SEND_SECONDS
            except Exception as error:  # whatever MLflow raises, training continues
                self._warn_once(error)
                pause = min(2 * pause, MAX_RETRY_SECONDS)
            if last:
                return
            self._closing.wait(pause)

    def _warn_once(self, error: Exception) -> None:
        if self._warn:
            log_warning(
                f"MLflow at {self._uri} cannot be reached ({error_summary(error)}). The run "
                f"continues; its metrics are saved in {self._folder / METRICS_FILE} and sent when "
                "MLflow is reachable again. To use another server, set tracking.uri or "
                "MLFLOW_TRACKING_URI"
            )
        self._warn = False
