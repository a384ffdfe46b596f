"""Tracking, as the stages call it, which never stops or slows a step.

What there is to tell is written to the run folder first (`tasks.tracking.journal`); a `SyncThread`
has it sent from there to MLflow (`tasks.tracking.sync`) on a thread of its own, in batches, tries
again for as long as MLflow is away, and remembers what has arrived.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import Field

from gpt.artifacts import Artifact, DatasetManifest
from gpt.config.schema import RunConfig
from gpt.errors import Problem, TrackingError
from gpt.files import PARTIAL, sync
from gpt.training.thread_priority import lower_thread_priority
from tasks.display import log_warning
from tasks.runtime.signals import stopping
from tasks.tracking import journal, mlflow_settings
from tasks.tracking.journal import (
    PendingMetadata,
    PendingModel,
    RegisteredVersion,
    SyncState,
    require_metadata,
    set_status,
)
from tasks.tracking.metadata import describe, describe_comparison, mlflow_folder, tracking_uri
from tasks.tracking.recorder import Recorder

mlflow_settings.apply()

from mlflow.tracking import MlflowClient  # noqa: E402

from tasks.tracking.model_lookup import first_line  # noqa: E402
from tasks.tracking.registry import UPLOAD_SECONDS  # noqa: E402
from tasks.tracking.sync import sync_folder  # noqa: E402

OPEN_SECONDS = 60.0
"""Longest wait for MLflow at the start; making a new SQLite store takes about 10 s."""
FLUSH_SECONDS = 20.0
"""Longest wait at the end of a stage for what has not been sent."""
STOPPED_FLUSH_SECONDS = 3.0
"""The same when the run was asked to stop, and will be killed if it takes long."""
SEND_SECONDS = 10.0
RETRY_SECONDS = 60.0
"""Longest pause between attempts while MLflow is away; they begin at SEND_SECONDS and double."""


class RunRef(Artifact):
    """A tracked run: the folder that holds all of it, and where it goes."""

    folder: Path
    uri: str
    run_id: str | None = Field(default=None)
    """None while MLflow has not answered; the run is made when it does."""


# --- what the stages call ------------------------------------------------------------------------


def open_run(
    config: RunConfig,
    dataset: DatasetManifest,
    folder: Path,
    parent: Path | None = None,
    trial: str = "",
) -> RunRef:
    """The MLflow run of this run folder: made, or the one that the folder names; below the one of
    the folder `parent`; `trial` names what it tries as a retraining.

    Waits up to `OPEN_SECONDS`; without an answer it warns, and the run goes on without MLflow.
    """
    outbox = journal.read_metadata(folder) or describe(config, dataset, folder)
    if parent:
        outbox = outbox.model_copy(update={"parent": parent.resolve()})
    if trial:
        outbox = outbox.model_copy(update={"trial": trial})
    return _opened(config, folder, outbox)


def open_comparison(
    config: RunConfig, dataset: DatasetManifest, folder: Path, compared: Mapping[str, str]
) -> RunRef:
    """The MLflow run that the compared ones are below; `config` is one of theirs."""
    outbox = journal.read_metadata(folder) or describe_comparison(config, dataset, folder, compared)
    return _opened(config, folder, outbox)


def set_parent_run(folder: Path, parent: Path) -> None:
    """Make a run, finished before, part of the one of the folder `parent`."""
    outbox, receipt = require_metadata(folder), journal.read_sync_state(folder)
    journal.write_metadata(folder, outbox.model_copy(update={"parent": parent.resolve()}))
    with _courier(RunRef(folder=folder, uri=receipt.uri if receipt else outbox.uri), FLUSH_SECONDS):
        pass


def set_run_note(run: RunRef, note: str) -> None:
    """Markdown for the top of the run's page in MLflow."""
    journal.write_metadata(
        run.folder, require_metadata(run.folder).model_copy(update={"note": note})
    )


def _opened(config: RunConfig, folder: Path, outbox: PendingMetadata) -> RunRef:
    uri = tracking_uri(config)
    if uri.startswith("sqlite:///"):
        store = mlflow_folder(config.run.root)
        (store / "artifacts").mkdir(parents=True, exist_ok=True)
        if uri == f"sqlite:///{store / 'mlflow.db'}":
            create_sqlite_store(store / "mlflow.db")
    journal.write_metadata(folder, outbox)
    run = RunRef(folder=folder, uri=uri)
    with _courier(run, OPEN_SECONDS, warns=True):
        pass
    receipt = journal.read_sync_state(folder)
    return run.model_copy(update={"run_id": receipt.run_id if receipt else None})


def create_sqlite_store(database: Path) -> None:
    """MLflow's SQLite store, whole under its name or not there: a process that is killed while
    MLflow makes the tables leaves a file with which MLflow never works again."""
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


@contextmanager
def open_recorder(run: RunRef) -> Iterator[Recorder]:
    """Record metrics; at the end what is unsent is sent, for at most `FLUSH_SECONDS`."""
    with _courier(run, FLUSH_SECONDS, warns=run.run_id is not None):
        yield Recorder(run.folder)


def attach_artifacts(
    run: RunRef, files: Mapping[str, Path], models: tuple[PendingModel, ...] | None = None
) -> None:
    """For MLflow: files and folders, by their path among its run's artifacts, and checkpoints."""
    outbox = require_metadata(run.folder)
    changes: dict[str, Any] = {
        "files": outbox.files | {name: path.resolve() for name, path in files.items()},
        "models": outbox.models if models is None else models,
    }
    journal.write_metadata(run.folder, outbox.model_copy(update=changes))


def register(run: RunRef, name: str) -> RegisteredVersion | None:
    """Make the run's last model a version of the registered model `name`; waits for it, up to
    `UPLOAD_SECONDS` where MLflow has ever answered this run. None where it has not answered now:
    it is done when that does."""
    outbox = require_metadata(run.folder).model_copy(update={"registered_model": name})
    journal.write_metadata(run.folder, outbox)
    answered = journal.read_sync_state(run.folder) is not None
    with _courier(run, UPLOAD_SECONDS if answered else FLUSH_SECONDS, warns=run.run_id is not None):
        pass
    return _registered(outbox, journal.read_sync_state(run.folder), run.uri)


@contextmanager
def track_run_status(run: RunRef) -> Iterator[None]:
    """The run's status from how the block ends: FINISHED; FAILED with the message; KILLED."""
    try:
        yield
    except Exception as error:
        _end(run, "FAILED", str(error) or type(error).__name__)
        raise
    except BaseException:  # Ctrl-C, or the signal that Prefect turns a cancellation into
        _end(run, "KILLED")
        raise
    _end(run, "FINISHED")


def sync_run(folder: Path, uri: str) -> str:
    """Send what MLflow at `uri` (empty: the server that the run began with) has missed of a run;
    says what was sent. Raises `TrackingError` where there is nothing to send or no way to."""
    outbox, before = journal.read_metadata(folder), journal.read_sync_state(folder)
    uri = uri or (before.uri if before else "") or (outbox.uri if outbox else "")
    if outbox is None or not uri:
        rule = "nothing of this run was to be tracked yet" if outbox is None else "names no server"
        raise TrackingError(Problem(str(folder), "", rule, "start the run, or give --uri"))
    known = before if before and before.uri == uri else None
    lines = journal.count_unsent_lines(folder, known)
    try:
        sync_folder(folder, uri)
    except Exception as error:  # whatever MLflow raises
        rule = f"cannot be reached: {first_line(error)}"
        remedy = "start that server, or name another one with --uri; nothing is lost"
        raise TrackingError(Problem("--uri", uri, rule, remedy)) from error
    after = journal.read_sync_state(folder)
    if after == before:
        return f"MLflow at {uri} has all of it already"
    files = len(after.files if after else {}) - len(known.files if known else {})
    sent = f"sent {lines} steps and {files} files to MLflow at {uri}"
    new = after and after.registered != (known and known.registered)
    return f"{sent}; registered as {after.registered}" if after and new else sent


def _end(run: RunRef, status: str, error: str = "") -> None:
    set_status(run.folder, status, error)
    with _courier(run, FLUSH_SECONDS):
        pass
    receipt = journal.read_sync_state(run.folder)
    unsent = journal.count_unsent_lines(run.folder, receipt)
    outbox = require_metadata(run.folder)
    unregistered = outbox.model_to_register and not _registered(outbox, receipt, run.uri)
    if unsent or receipt is None or receipt.status != status or unregistered:
        model = " and its model is not registered" if unregistered else ""
        log_warning(
            f"MLflow at {run.uri} does not have all of this run: {unsent} steps are unsent{model}. "
            f"Nothing is lost, {run.folder / journal.METRICS_FILE} has them; "
            f"when MLflow is back, `overnight sync {run.folder}` sends them, and so does starting "
            "the same run again"
        )


def _registered(
    outbox: PendingMetadata, receipt: SyncState | None, uri: str
) -> RegisteredVersion | None:
    entry = outbox.model_to_register
    if entry is None or receipt is None or receipt.uri != uri:
        return None
    return journal.find_registered_version(receipt, outbox.registered_model, entry.step)


# --- carrying it to MLflow -----------------------------------------------------------------------


@contextmanager
def _courier(run: RunRef, flush_seconds: float, warns: bool = False) -> Iterator[None]:
    courier = SyncThread(run, warns)
    courier.start()
    try:
        yield
    finally:
        courier.close(STOPPED_FLUSH_SECONDS if stopping.requested() else flush_seconds)


class SyncThread(threading.Thread):
    """Delivers a run folder's journal and outbox until closed; a failure is tried again, and said
    once where it `warns`."""

    def __init__(self, run: RunRef, warns: bool) -> None:
        super().__init__(name="mlflow-courier", daemon=True)
        self._run = run
        self._closing = threading.Event()
        self._warned = not warns

    def run(self) -> None:
        lower_thread_priority()
        pause = SEND_SECONDS
        while True:
            last = self._closing.is_set()
            try:
                sync_folder(self._run.folder, self._run.uri)
                pause = SEND_SECONDS
            except Exception as error:  # whatever MLflow raises, the run goes on
                self._warn(error)
                pause = min(2 * pause, RETRY_SECONDS)
            if last:
                return
            self._closing.wait(pause)

    def close(self, timeout: float) -> None:
        """Try once more at once, and wait for that, but not for longer than `timeout` seconds."""
        self._closing.set()
        self.join(timeout)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            log_warning(
                f"MLflow at {self._run.uri} cannot be reached ({first_line(error)}). The run goes "
                f"on; its metrics are kept in {self._run.folder / journal.METRICS_FILE} and sent "
                "when MLflow is back. To change servers, set tracking.uri or MLFLOW_TRACKING_URI"
            )
        self._warned = True
