"""The tracking data of a run in its folder, written before anything is sent to MLflow.

`metrics.jsonl` holds the metrics, one JSON line per step, append-only. `tracking_outbox.json` holds
what else MLflow should know (parameters, dataset, files, models, status). `tracking_run.json` holds
the MLflow run and how much it has received. A slow or unreachable server therefore loses nothing,
and nothing is sent twice.
"""

import errno
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from gpt.artifacts import Artifact
from gpt.files import write_text

METRICS_FILE = "metrics.jsonl"
METADATA_FILE = "tracking_outbox.json"
SYNC_STATE_FILE = "tracking_run.json"


@dataclass(frozen=True)
class MetricsLine:
    """One line of the file."""

    step: int
    time_ms: int
    metrics: dict[str, float]


class MetricsJournal:
    """The file, open for appending. Each (key, step) is written once: the steps that a resumed run
    repeats are already there."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE
        lines, self._size = read_metrics(self.path)
        self._known = {(key, line.step) for line in lines for key in line.metrics}
        self._pending = b""

    def append(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Write the metrics that are new, and return whether there were any. Raises `OSError` if
        the disk is full; the line is then kept in memory until the next call."""
        new = {key: value for key, value in metrics.items() if (key, step) not in self._known}
        if new:
            line = {"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": new}
            self._pending += json.dumps(line).encode() + b"\n"
            self._known.update((key, step) for key in new)
        if self._pending:
            with self.path.open("r+b" if self.path.exists() else "xb", buffering=0) as file:
                # A killed process or a full disk may have left half a line.
                file.truncate(self._size)
                file.seek(self._size)
                if file.write(self._pending) < len(self._pending):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            self._size += len(self._pending)
            self._pending = b""
        return bool(new)


def read_metrics(
    path: Path, start: int = 0, limit: int | None = None
) -> tuple[list[MetricsLine], int]:
    """Read up to `limit` complete lines from byte `start`; also return the byte after the last."""
    lines: list[MetricsLine] = []
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(start)
        for raw in file:
            if len(lines) == limit or not raw.endswith(b"\n"):
                break
            lines.append(MetricsLine(**json.loads(raw)))
            start += len(raw)
    return lines, start


class DatasetInfo(Artifact):
    """The training dataset as MLflow shows it."""

    name: str
    digest: str
    sources: tuple[str, ...]
    text_column: str
    profile: dict[str, Any]


class PendingModel(Artifact):
    """A checkpoint that MLflow shows as a logged model."""

    name: str
    step: int
    tokens_seen: int
    folder: Path
    files: tuple[Path, ...] = ()
    """Files to upload; if empty, MLflow only records the folder."""
    report_sha256: str = ""
    """Hash of the report among the files: a new evaluation is sent again."""


class SyncedModel(Artifact):
    """A model that MLflow has received."""

    entry: PendingModel
    model_id: str


class RegisteredVersion(Artifact):
    """A version of a registered model, and the promotion decision for it."""

    name: str
    version: str
    step: int
    alias: str
    """champion or challenger, as decided at registration."""
    reason: str
    comparable: bool = True
    """False if it could not be compared with the champion; it is compared as soon as it can be."""
    trial: str = ""

    def __str__(self) -> str:
        return f"{self.name} version {self.version}, {self.alias}: {self.reason}"


class SyncState(Artifact):
    """The MLflow run of a run folder, and what it has received."""

    uri: str
    run_id: str
    experiment_id: str = ""
    described: bool = False
    """Whether parameters and dataset have been sent."""
    sent_bytes: int = 0
    """Length of the part of `metrics.jsonl` that has been sent."""
    files: dict[str, Path] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)
    models: dict[str, SyncedModel] = Field(default_factory=dict)
    registered: RegisteredVersion | None = None
    status: str = "RUNNING"


class PendingMetadata(Artifact):
    """What MLflow should know about a run besides its metrics."""

    uid: str
    """Tag of the MLflow run, by which an interrupted sync finds it again."""
    name: str
    experiment: str
    uri: str = ""
    """The server at the start of the run."""
    artifacts: str
    """Artifact location of a new experiment; empty: the server's default."""
    parameters: dict[str, str]
    tags: dict[str, str]
    dataset: DatasetInfo
    files: dict[str, Path] = Field(default_factory=dict)
    """Artifact path in the MLflow run -> local file or folder."""
    parent: Path | None = None
    """Folder of the parent run."""
    note: str = ""
    """Markdown description at the top of the run's page."""
    trial: str = ""
    """Key of the retraining (tasks.retrain_data), stored with the model version."""
    models: tuple[PendingModel, ...] = ()
    registered_model: str = ""
    """Registered model that gets the last of `models` as a version; empty: none."""
    status: str = "RUNNING"
    error: str = ""

    @property
    def model_to_register(self) -> PendingModel | None:
        """The last model with files, if a registered model is named."""
        stored = [model for model in self.models if model.files and self.registered_model]
        return max(stored, key=lambda model: model.step, default=None)

    def find_registered(self, state: SyncState | None) -> RegisteredVersion | None:
        """Return the version that `model_to_register` has become, or None."""
        model = self.model_to_register
        return find_registered_version(state, self.registered_model, model.step) if model else None


def read_metadata(folder: Path) -> PendingMetadata | None:
    path = folder / METADATA_FILE
    return PendingMetadata.model_validate_json(path.read_bytes()) if path.exists() else None


def update_metadata(folder: Path, **changes: Any) -> PendingMetadata:
    """Change fields of the metadata of a run that `open_run` has opened, and return it."""
    metadata = read_metadata(folder)
    assert metadata, f"{folder} was not opened by open_run"
    changed = metadata.model_copy(update=changes)
    if changed != metadata:
        write_metadata(folder, changed)
    return changed


def write_metadata(folder: Path, metadata: PendingMetadata) -> None:
    write_text(folder / METADATA_FILE, metadata.model_dump_json(indent=2))


def read_sync_state(folder: Path, uri: str = "") -> SyncState | None:
    """Read the state; None if there is none, or if it is that of another server than `uri`."""
    path = folder / SYNC_STATE_FILE
    state = SyncState.model_validate_json(path.read_bytes()) if path.exists() else None
    return state if state and uri in ("", state.uri) else None


def save_state(folder: Path, state: SyncState, **changes: Any) -> SyncState:
    """Write the state with the changes and return it."""
    state = state.model_copy(update=changes)
    write_text(folder / SYNC_STATE_FILE, state.model_dump_json(indent=2))
    return state


def find_registered_version(
    state: SyncState | None, name: str, step: int
) -> RegisteredVersion | None:
    """Return the version of `name` that the model of `step` has become, or None."""
    version = state.registered if state else None
    return version if version and (version.name, version.step) == (name, step) else None


def count_unsent_lines(folder: Path, state: SyncState | None) -> int:
    """Count the lines of `metrics.jsonl` that MLflow does not have yet."""
    return len(read_metrics(folder / METRICS_FILE, state.sent_bytes if state else 0)[0])
