"""Watch a folder and tell Prefect of each Parquet file that has come, once, whatever is away."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID, uuid4

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from flows.service.events import SERVER_UNREACHABLE, require_prefect_server, send_file_event
from gpt.data.new_files import NewFileScanner
from gpt.errors import Problem, WatchError
from gpt.files import write_text
from tasks.display import log_info, log_warning


class PendingEvent(BaseModel):
    """An event that the server does not have yet, under the id that it keeps."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    path: Path


class State(BaseModel):
    """What a watcher remembers over its restarts."""

    known: dict[str, str] = Field(default_factory=dict)
    unsent: list[PendingEvent] = Field(default_factory=list)


class Watcher:
    """A folder, what is known of it, and what is still to be told.

    An event is written down before it is sent and crossed out after, so that a kill between the two
    sends it again under the same id, which the server takes for one.
    """

    def __init__(self, folder: Path, pattern: str, memory: Path, existing: bool) -> None:
        self._memory = memory
        first = not memory.exists()
        state = State() if first else _read(memory)
        self._arrivals = NewFileScanner(folder, pattern, state.known)
        self._unsent = state.unsent
        self._away = self._gone = False
        if first and not existing:
            self._arrivals.mark_existing_as_seen()
        self._remember()

    @property
    def known(self) -> int:
        return len(self._arrivals.known)

    def step(self) -> None:
        """One look, and one attempt to send what has not been."""
        self._look()
        self._send()

    def _look(self) -> None:
        try:
            whole, broken = self._arrivals.scan()
        except OSError as error:
            if not self._gone:
                folder = self._arrivals.folder
                log_warning(f"{folder} cannot be read ({error.strerror}): waiting for it")
            self._gone = True
            return
        self._gone = False
        for path, reason in broken.items():
            log_warning(
                f"{path} stands still and is no whole Parquet file ({reason}); it is looked at "
                "again when it changes"
            )
        if whole:
            self._unsent += [PendingEvent(id=uuid4(), path=path) for path in whole]
            self._remember()

    def _send(self) -> None:
        while self._unsent:
            event = self._unsent[0]
            try:
                send_file_event(event.path, event.id)
            except SERVER_UNREACHABLE as error:
                self._warn_of(error)
                return
            self._unsent.pop(0)
            self._remember()
            self._away = False
            log_info(f"{event.path} has come: told Prefect")

    def _warn_of(self, error: Exception) -> None:
        if not self._away:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log_warning(
                f"Prefect's server cannot be told of {self._unsent[0].path} ({reason}): it is told "
                "when the server is back. `overnight up` starts one"
            )
        self._away = True

    def _remember(self) -> None:
        state = State(known=self._arrivals.known, unsent=self._unsent)
        write_text(self._memory, state.model_dump_json(indent=1))


def _read(memory: Path) -> State:
    try:
        return State.model_validate_json(memory.read_bytes())
    except ValueError as error:
        rule = "is not what a watcher has written: which files are known cannot be told from it"
        remedy = "delete it; then the files that are there now count as known"
        raise WatchError(Problem(str(memory), "", rule, remedy)) from error


def state_path(folder: Path, pattern: str, root: Path) -> Path:
    """Below `root`/watch, because the folder may be one that nobody can write to."""
    place = hashlib.sha256(json.dumps([str(folder), pattern]).encode()).hexdigest()[:8]
    return root / "watch" / f"{folder.name}-{place}.json"


def watch(
    folder: Path,
    pattern: str,
    interval_seconds: float,
    existing: bool,
    root: Path,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Look every `interval_seconds`, until interrupted. Files that were there at the very first
    start count as known, unless `existing`.

    Raises `WatchError` for a folder that is not there, where no Prefect server is set, or where the
    folder is watched already.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        rule = "is no directory" if folder.exists() else "there is no such directory"
        raise WatchError(Problem("DIR", str(folder), rule, "name the one that files come into"))
    url = require_prefect_server()
    memory = state_path(folder, pattern, root)
    memory.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(memory.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        rule = "another process watches it already"
        remedy = f"stop that one first; it holds {lock.lock_file}"
        raise WatchError(Problem("DIR", str(folder), rule, remedy)) from None
    with lock:
        watcher = Watcher(folder, pattern, memory, existing)
        log_info(
            f"watching {folder} for {pattern} every {interval_seconds:g} s, {watcher.known} files "
            f"known; events go to {url}"
        )
        while True:
            watcher.step()
            sleep(interval_seconds)
