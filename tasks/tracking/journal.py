"""What a run has to tell, on disk before it is told to anyone: the metrics and the outbox.

Three files in the run folder. `metrics.jsonl`, the journal: one line a step, appended, never
changed. `tracking_outbox.json`: what else MLflow is to know (parameters, data set, files, models,
status).
`tracking_run.json`: which MLflow run it goes to and how much of it has arrived. A server that is
away, slow or gone therefore loses nothing, and nothing is told twice.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from gpt.artifacts import Artifact
from gpt.files import write_text

METRICS_FILE = "metrics.jsonl"
METADATA_FILE = "tracking_outbox.json"
SYNC_STATE_FILE = "tracking_run.json"
TAG_LENGTH = 5_000
"""Characters that MLflow has room for in a tag."""

T = TypeVar("T", bound=Artifact)


class DatasetInput(Artifact):
    """What the run was trained on, as MLflow shows it."""

    name: str
    digest: str
    sources: tuple[str, ...]
    text_column: str
    profile: dict[str, Any]


class PendingModel(Artifact):
    """A checkpoint that MLflow shows as a model."""

    name: str
    step: int
    tokens_seen: int
    folder: Path
    files: tuple[Path, ...] = ()
    """What MLflow stores of it; nothing: it is named, and stays where it is."""
    report_sha256: str = ""
    """Of the report among the files: another evaluation is another thing to send."""


class SyncedModel(Artifact):
    """A model that has arrived."""

    entry: PendingModel
    model_id: str


class RegisteredVersion(Artifact):
    """A model as a version of a registered one, and how it was judged."""

    name: str
    version: str
    step: int
    alias: str
    """The one that the version was given: champion or challenger."""
    reason: str
    comparable: bool = True
    """False where it could not be held against the champion: it is judged again when it can."""
    trial: str = ""

    def __str__(self) -> str:
        return f"{self.name} version {self.version}, {self.alias}: {self.reason}"


class PendingMetadata(Artifact):
    """What MLflow is to know beside the metrics."""

    uid: str
    """Tags the MLflow run, so that one that was made is found again, whatever was interrupted."""
    name: str
    experiment: str
    uri: str = ""
    """The server that the run began with."""
    artifacts: str
    """Where a new experiment keeps its files; empty: where its server keeps them."""
    parameters: dict[str, str]
    tags: dict[str, str]
    dataset: DatasetInput
    files: dict[str, Path] = Field(default_factory=dict)
    """Path inside the MLflow run's artifacts -> the local file or folder."""
    parent: Path | None = None
    """Folder of the run that this one is part of."""
    note: str = ""
    """Markdown that MLflow's page of the run begins with."""
    trial: str = ""
    """What the run tries as a retraining (tasks.find_changes), to be known of its version."""
    models: tuple[PendingModel, ...] = ()
    registered_model: str = ""
    """Registered model that the last of `models` is to be a version of; empty: of none."""
    status: str = "RUNNING"
    error: str = ""

    @property
    def model_to_register(self) -> PendingModel | None:
        """The last model that MLflow stores, where it is to be registered."""
        stored = [entry for entry in self.models if entry.files]
        if not (self.registered_model and stored):
            return None
        return max(stored, key=lambda entry: entry.step)


class SyncState(Artifact):
    """What has arrived, and where."""

    uri: str
    run_id: str
    experiment_id: str = ""
    described: bool = False
    sent_bytes: int = 0
    """Length of the journal's part that has been sent."""
    files: dict[str, Path] = Field(default_factory=dict)
    tags: dict[str, str] = Field(default_factory=dict)
    """Those that may change."""
    models: dict[str, SyncedModel] = Field(default_factory=dict)
    registered: RegisteredVersion | None = None
    status: str = "RUNNING"


@dataclass(frozen=True)
class MetricsLine:
    """One line of the journal."""

    step: int
    time_ms: int
    metrics: dict[str, float]


class MetricsJournal:
    """The journal, open for appending. A (key, step) that it holds is never written again: what
    a resumed run repeats is what the journal has already."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS_FILE
        _cut_torn_line(self.path)
        lines, self._end = read_metrics(self.path)
        self._known = {(key, line.step) for line in lines for key in line.metrics}
        self._waiting: list[bytes] = []

    def append(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Write what is new of `metrics`; whether there was any. Raises OSError where the disk
        takes no more: the line waits in memory for the next call."""
        new = {key: value for key, value in metrics.items() if (key, step) not in self._known}
        if new:
            line = {"step": step, "time_ms": time.time_ns() // 1_000_000, "metrics": new}
            self._waiting.append(json.dumps(line).encode() + b"\n")
            self._known.update((key, step) for key in new)
        self.flush()
        return bool(new)

    def flush(self) -> None:
        """Write what waits. Raises OSError where the disk does not take it."""
        if not self._waiting:
            return
        waiting = b"".join(self._waiting)
        with self.path.open("r+b" if self.path.exists() else "xb", buffering=0) as file:
            # A full disk may have taken half a line before.
            file.truncate(self._end)
            file.seek(self._end)
            if file.write(waiting) < len(waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._end += len(waiting)
        self._waiting.clear()


def read_metrics(
    path: Path, start: int = 0, most: int | None = None
) -> tuple[list[MetricsLine], int]:
    """Up to `most` complete lines from byte `start`, and the byte after the last of them."""
    lines: list[MetricsLine] = []
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return lines, start
    with file:
        file.seek(start)
        for raw in file:
            if len(lines) == most or not raw.endswith(b"\n"):
                break
            lines.append(MetricsLine(**json.loads(raw)))
            start += len(raw)
    return lines, start


def find_registered_version(
    receipt: SyncState | None, name: str, step: int
) -> RegisteredVersion | None:
    """What has become of the model of `step` as a version of `name`; None: nothing yet."""
    done = receipt.registered if receipt else None
    return done if done and (done.name, done.step) == (name, step) else None


def count_unsent_lines(folder: Path, receipt: SyncState | None) -> int:
    """Lines of the journal that MLflow does not have yet."""
    return len(read_metrics(folder / METRICS_FILE, receipt.sent_bytes if receipt else 0)[0])


def read_metadata(folder: Path) -> PendingMetadata | None:
    return _read(PendingMetadata, folder / METADATA_FILE)


def write_metadata(folder: Path, outbox: PendingMetadata) -> None:
    write_text(folder / METADATA_FILE, outbox.model_dump_json(indent=2))


def require_metadata(folder: Path) -> PendingMetadata:
    outbox = read_metadata(folder)
    assert outbox, f"{folder} was not opened by open_run"
    return outbox


def set_status(folder: Path, status: str, error: str = "") -> None:
    outbox = require_metadata(folder)
    if (outbox.status, outbox.error) != (status, error):
        changed = outbox.model_copy(update={"status": status, "error": error[:TAG_LENGTH]})
        write_metadata(folder, changed)


def read_sync_state(folder: Path) -> SyncState | None:
    return _read(SyncState, folder / SYNC_STATE_FILE)


def write_sync_state(folder: Path, receipt: SyncState) -> None:
    write_text(folder / SYNC_STATE_FILE, receipt.model_dump_json(indent=2))


def save_state(folder: Path, receipt: SyncState, **changes: Any) -> SyncState:
    """The receipt with the changes, written down."""
    receipt = receipt.model_copy(update=changes)
    write_sync_state(folder, receipt)
    return receipt


def _read(kind: type[T], path: Path) -> T | None:
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _cut_torn_line(path: Path) -> None:
    """Drop the half line that a process left which was killed while writing it."""
    if not path.exists():
        return
    _, end = read_metrics(path)
    if end < path.stat().st_size:
        os.truncate(path, end)
