"""Watch a folder and send Prefect one event per new Parquet file, across restarts and outages."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from uuid import UUID, uuid4

import httpx
from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.events import Event, RelatedResource, Resource
from prefect.settings import PREFECT_API_URL
from pydantic import BaseModel, ConfigDict, Field

from gpt.data.new_files import NewFileScanner
from gpt.errors import Problem, WatchError, first_line
from gpt.files import write_text
from tasks.display import log_info, log_warning

FILE_ARRIVED = "overnight.parquet.arrived"
SOURCE_ID = "overnight.source"
"""`prefect.resource.id` of every such event, which the automation in prefect.yaml matches."""
SERVER_UNREACHABLE = (httpx.HTTPError, RuntimeError, OSError)
"""What `send_file_event` raises if the server cannot be reached or refuses."""


class PendingEvent(BaseModel):
    """An event that the server does not have yet; every attempt to send it uses the same id."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    path: Path


class WatchState(BaseModel):
    """What a watcher remembers across restarts."""

    known: dict[str, str] = Field(default_factory=dict)
    unsent: list[PendingEvent] = Field(default_factory=list)


class Watcher:
    """A folder, its known files, and the events still to be sent.

    An event is saved before it is sent and removed afterwards. After a kill in between it is sent
    again under the same id, which the server counts once.
    """

    def __init__(self, folder: Path, pattern: str, state_file: Path, existing: bool) -> None:
        self._state_file = state_file
        is_first_start = not state_file.exists()
        state = WatchState()
        if not is_first_start:
            state = WatchState.model_validate_json(state_file.read_bytes())
        self._scanner = NewFileScanner(folder, pattern, state.known)
        self._unsent = state.unsent
        self._server_is_down = self._folder_is_gone = False
        if is_first_start and not existing:
            self._scanner.mark_existing_as_seen()
        self._save_state()

    @property
    def known(self) -> int:
        return len(self._scanner.known)

    def step(self) -> None:
        """Scan once, and try once to send what has not been sent."""
        self._scan()
        self._send()

    def _scan(self) -> None:
        try:
            complete, broken = self._scanner.scan()
        except OSError as error:
            if not self._folder_is_gone:
                folder = self._scanner.folder
                log_warning(f"{folder} cannot be read ({error.strerror}): waiting for it")
            self._folder_is_gone = True
            return
        self._folder_is_gone = False
        for path, reason in broken.items():
            log_warning(
                f"{path} is not a complete Parquet file ({reason}) and no longer changes; it is "
                "read again when it changes"
            )
        if complete:
            self._unsent += [PendingEvent(id=uuid4(), path=path) for path in complete]
            self._save_state()

    def _send(self) -> None:
        while self._unsent:
            event = self._unsent[0]
            try:
                send_file_event(event.path, event.id)
            except SERVER_UNREACHABLE as error:
                if not self._server_is_down:
                    reason = first_line(error)
                    log_warning(
                        f"the event for {event.path} cannot be sent to Prefect's server "
                        f"({reason}); it is sent when the server is back. `overnight up` starts one"
                    )
                self._server_is_down = True
                return
            self._server_is_down = False
            self._unsent.pop(0)
            self._save_state()
            log_info(f"{event.path} is new: event sent to Prefect")

    def _save_state(self) -> None:
        state = WatchState(known=self._scanner.known, unsent=self._unsent)
        write_text(self._state_file, state.model_dump_json(indent=1))


def require_prefect_server() -> str:
    """Return the URL of Prefect's API. Raises `WatchError` if none is set: the embedded API runs no
    automations."""
    url = PREFECT_API_URL.value()
    if url:
        return str(url)
    rule = "is not set: there is no Prefect server to start a flow on an event"
    remedy = "start one with `overnight up`, or set it, e.g. to http://127.0.0.1:4200/api"
    raise WatchError(Problem("PREFECT_API_URL", "", rule, remedy))


def send_file_event(path: Path, event_id: UUID) -> None:
    """Send the event and wait until the server has it. Raises one of `SERVER_UNREACHABLE`.

    Events with the same id count once.
    """
    event = Event(
        id=event_id,
        event=FILE_ARRIVED,
        resource=Resource({"prefect.resource.id": SOURCE_ID, "prefect.resource.name": path.name}),
        related=[
            RelatedResource(
                {"prefect.resource.id": f"overnight.file.{path}", "prefect.resource.role": "file"}
            )
        ],
        payload={"path": str(path)},
    )
    # `emit_event` hands the event to a thread and does not report whether it was delivered.
    with get_client(sync_client=True) as client:
        answer = client.request("POST", "/events", json=[event.model_dump(mode="json")])  # type: ignore[arg-type]
        answer.raise_for_status()


def state_path(folder: Path, pattern: str, root: Path) -> Path:
    """Return the watcher's state file: below `root`/watch, since the folder may be read-only."""
    digest = hashlib.sha256(json.dumps([str(folder), pattern]).encode()).hexdigest()[:8]
    return root / "watch" / f"{folder.name}-{digest}.json"


def watch(folder: Path, pattern: str, interval_seconds: float, existing: bool, root: Path) -> None:
    """Scan the folder every `interval_seconds` until interrupted.

    Files that exist at the very first start count as known, unless `existing`. Raises `WatchError`
    if the folder does not exist or is watched already, or if no Prefect server is set.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        rule = "is not a directory" if folder.exists() else "no such directory"
        raise WatchError(Problem("DIR", str(folder), rule, "name the directory to watch"))
    url = require_prefect_server()
    state_file = state_path(folder, pattern, root)
    state_file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(state_file.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        rule = "is watched by another process already"
        remedy = f"stop that process first; it holds {lock.lock_file}"
        raise WatchError(Problem("DIR", str(folder), rule, remedy)) from None
    with lock:
        watcher = Watcher(folder, pattern, state_file, existing)
        log_info(
            f"watching {folder} for {pattern} every {interval_seconds:g} s, {watcher.known} files "
            f"known; events go to {url}"
        )
        while True:
            watcher.step()
            time.sleep(interval_seconds)
