"""Tracked runs as the stages use them: open, record, attach files, register, finish.

Nothing here blocks or fails training. Everything is written to the run folder first; a background
thread sends it to MLflow and retries while the server is unreachable.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from gpt.artifacts import Artifact, DatasetManifest
from gpt.config.schema import RunConfig
from gpt.errors import Problem, TrackingError, first_line
from gpt.files import PARTIAL, sync
from gpt.training.thread_priority import lower_thread_priority
from tasks.display import log_warning
from tasks.runtime.signals import stop_signals
from tasks.tracking import journal
from tasks.tracking.journal import RegisteredVersion
from tasks.tracking.metadata import build_run_metadata, mlflow_folder, resolve_tracking_uri
from tasks.tracking.mlflow_api import MlflowClient
from tasks.tracking.recorder import Recorder
from tasks.tracking.registry import UPLOAD_SECONDS, send_models, send_registration
from tasks.tracking.sync import RunSync

OPEN_SECONDS = 60.0
"""Longest wait for MLflow at the start; creating a SQLite store takes about 10 s."""
FLUSH_SECONDS = 20.0
"""Longest wait for unsent data at the end of a stage."""
STOPPED_FLUSH_SECONDS = 3.0
"""Longest wait for unsent data after a stop signal: the process is killed if it takes long."""
SEND_SECONDS = 10.0
MAX_RETRY_SECONDS = 60.0
"""Longest pause between attempts while MLflow is unreachable; it doubles from SEND_SECONDS."""

_sync_lock = threading.Lock()
"""A thread that was not waited for may still be sending when the next one starts."""


class RunRef(Artifact):
    """A tracked run: its folder and its MLflow server."""

    folder: Path
    uri: str
    run_id: str | None = None
    """None until MLflow has answered."""


def open_run(
    config: RunConfig,
    dataset: DatasetManifest,
    folder: Path,
    parent: Path | None = None,
    trial: str = "",
    compared: Mapping[str, str] | None = None,
) -> RunRef:
    """Create the MLflow run of a run folder, or return the existing one.

    Waits up to `OPEN_SECONDS`; without an answer it logs a warning and the run continues without
    MLflow. `parent` is the folder of the parent run; `trial` the key of a retraining. For a
    comparison, the parent of the compared runs, `compared` are its parameters and `config` is one
    of the compared configs.
    """
    metadata = journal.read_metadata(folder)
    metadata = metadata or build_run_metadata(config, dataset, folder, compared)
    changes: dict[str, Any] = {"parent": parent.resolve()} if parent else {}
    if trial:
        changes["trial"] = trial
    uri = resolve_tracking_uri(config)
    if uri.startswith("sqlite:///"):
        store = mlflow_folder(config.run.root)
        (store / "artifacts").mkdir(parents=True, exist_ok=True)
        if uri == f"sqlite:///{store / 'mlflow.db'}":
            create_sqlite_store(store / "mlflow.db")
    journal.write_metadata(folder, metadata.model_copy(update=changes))
    sync_and_wait(folder, uri, OPEN_SECONDS, warn=True)
    state = journal.read_sync_state(folder)
    return RunRef(folder=folder, uri=uri, run_id=state.run_id if state else None)


def create_sqlite_store(database: Path) -> None:
    """Create MLflow's SQLite store atomically: MLflow cannot use a database whose creation was
    interrupted."""
    database.parent.mkdir(parents=True, exist_ok=True)
    if database.exists():
        return
    with FileLock(database.with_name(f".{database.name}.lock")):
        partial = database.with_name(f".{database.name}{PARTIAL}")
        for leftover in (partial, partial.with_name(f"{partial.name}-journal")):
            leftover.unlink(missing_ok=True)
        if not database.exists():
            MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
            sync(partial)
            partial.rename(database)


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
                        f"MLflow at {uri} cannot be reached ({first_line(error)}). The run "
                        "continues; its metrics are saved in "
                        f"{folder / journal.METRICS_FILE} and sent when MLflow is reachable "
                        "again. To use another server, set tracking.uri or MLFLOW_TRACKING_URI"
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


@contextmanager
def open_recorder(run: RunRef) -> Iterator[Recorder]:
    """Record metrics and sync them in the background; at the end wait up to `FLUSH_SECONDS`."""
    with sync_in_background(run.folder, run.uri, FLUSH_SECONDS, warn=run.run_id is not None):
        yield Recorder(run.folder)


def set_parent_run(folder: Path, parent: Path) -> None:
    """Make a finished run a child of the run in the folder `parent`."""
    state = journal.read_sync_state(folder)
    metadata = journal.update_metadata(folder, parent=parent.resolve())
    sync_and_wait(folder, state.uri if state else metadata.uri, FLUSH_SECONDS)


def attach_artifacts(run: RunRef, files: Mapping[str, Path], **changes: Any) -> None:
    """Add files and folders, by artifact path, and change other fields of `PendingMetadata`, e.g.
    `models` or `note`."""
    paths = {name: path.resolve() for name, path in files.items()}
    known = journal.update_metadata(run.folder, **changes).files
    journal.update_metadata(run.folder, files=known | paths)


def register_last_model(run: RunRef, name: str) -> RegisteredVersion | None:
    """Register the run's last model as a version of `name` and wait for it.

    Waits up to `UPLOAD_SECONDS` if MLflow has answered this run before, else `FLUSH_SECONDS`.
    Returns None if MLflow does not answer in time; the next sync registers the model.
    """
    metadata = journal.update_metadata(run.folder, registered_model=name)
    seconds = UPLOAD_SECONDS if journal.read_sync_state(run.folder, run.uri) else FLUSH_SECONDS
    sync_and_wait(run.folder, run.uri, seconds, warn=run.run_id is not None)
    return metadata.find_registered(journal.read_sync_state(run.folder, run.uri))


@contextmanager
def track_run_status(run: RunRef) -> Iterator[None]:
    """Set the run's status by how the block ends: FINISHED, FAILED with the message, or KILLED."""
    status, message = "FINISHED", ""
    try:
        yield
    except Exception as error:
        status, message = "FAILED", str(error) or type(error).__name__
        raise
    except BaseException:  # Ctrl-C, or the signal of a Prefect cancellation
        status = "KILLED"
        raise
    finally:
        _finish(run, status, message)


def _finish(run: RunRef, status: str, error: str) -> None:
    metadata = journal.update_metadata(run.folder, status=status, error=error)
    sync_and_wait(run.folder, run.uri, FLUSH_SECONDS)
    state = journal.read_sync_state(run.folder, run.uri)
    unsent = journal.count_unsent_lines(run.folder, state)
    unregistered = metadata.model_to_register and not metadata.find_registered(state)
    if unsent or state is None or state.status != status or unregistered:
        model = ", and its model is not registered" if unregistered else ""
        log_warning(
            f"MLflow at {run.uri} does not have all of this run: {unsent} steps are unsent{model}. "
            f"Nothing is lost: they are in {run.folder / journal.METRICS_FILE}. When MLflow is "
            f"reachable again, run `overnight sync {run.folder}` or start the same run again"
        )


def sync_run(folder: Path, uri: str) -> str:
    """Send what MLflow at `uri` (empty: the server of the run) is missing; return a summary.

    Raises `TrackingError` if there is nothing to send or the server cannot be reached.
    """
    metadata, before = journal.read_metadata(folder), journal.read_sync_state(folder)
    uri = uri or (before.uri if before else "") or (metadata.uri if metadata else "")
    if metadata is None or not uri:
        rule = "the run has not been tracked yet" if metadata is None else "names no server"
        raise TrackingError(Problem(str(folder), "", rule, "start the run, or give --uri"))
    known = journal.read_sync_state(folder, uri)
    lines = journal.count_unsent_lines(folder, known)
    try:
        sync_folder(folder, uri)
    except Exception as error:  # whatever MLflow raises
        rule = f"cannot be reached: {first_line(error)}"
        remedy = "start the server, or name another one with --uri; nothing is lost"
        raise TrackingError(Problem("--uri", uri, rule, remedy)) from error
    after = journal.read_sync_state(folder)
    assert after, "sync_folder writes it"
    if after == known:
        return f"MLflow at {uri} is already up to date"
    files = len(after.files) - len(known.files if known else {})
    summary = f"sent {lines} steps and {files} files to MLflow at {uri}"
    if after.registered and after.registered != (known and known.registered):
        summary += f"; registered as {after.registered}"
    return summary
