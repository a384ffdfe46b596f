"""Watch a folder and send Prefect one event per new Parquet file, across restarts and outages."""

import hashlib
import json
import time
from pathlib import Path
from uuid import NAMESPACE_URL, UUID, uuid5

import httpx
from filelock import FileLock, Timeout
from prefect.client.orchestration import get_client
from prefect.events import Event, RelatedResource, Resource
from prefect.settings import PREFECT_API_URL

from gpt.data.new_files import NewFileScanner
from gpt.errors import Problem, WatchError, first_line
from gpt.files import write_text
from tasks.display import log_info, log_warning

FILE_ARRIVED = "overnight.parquet.arrived"
SOURCE_ID = "overnight.source"
"""`prefect.resource.id` of every such event, which the automation in prefect.yaml matches."""
SERVER_UNREACHABLE = (httpx.HTTPError, RuntimeError, OSError)
"""What `send_file_event` raises if the server cannot be reached or refuses."""


class Watcher:
    """A folder, and which of its files the server has had an event for.

    A file counts as known once its event is sent. After a kill in between it is sent again under
    the same id, which the server counts once: the id depends on path, size and time of the file.
    """

    def __init__(self, folder: Path, pattern: str, state_file: Path, existing: bool) -> None:
        self._state_file = state_file
        self._warned: set[str] = set()
        self._scanner = NewFileScanner(folder, pattern)
        self.known = self._scanner.known
        if state_file.exists():
            state = json.loads(state_file.read_bytes())
            self.known |= state["known"]
            # Earlier versions listed events to be sent; their files are found again as new ones.
            for event in state.get("unsent", ()):
                self.known.pop(event["path"], None)
        elif not existing:
            self._scanner.mark_existing_as_seen()
        self._save_state()

    def step(self) -> None:
        """Scan once, and try once to send what has not been sent."""
        folder = self._scanner.folder
        try:
            complete, broken = self._scanner.scan()
        except OSError as error:
            self._warn_once("folder", f"{folder} cannot be read ({error.strerror}): waiting for it")
            return
        self._warned.discard("folder")
        for path, reason in broken.items():
            log_warning(
                f"{path} is not a complete Parquet file ({reason}) and no longer changes; it is "
                "read again when it changes"
            )
        stamps = {path: self.known.pop(str(path)) for path in complete}  # until they are sent
        for path, stamp in stamps.items():
            try:
                send_file_event(path, uuid5(NAMESPACE_URL, f"{path}:{stamp}"))
            except SERVER_UNREACHABLE as error:
                self._warn_once(
                    "server",
                    f"the event for {path} cannot be sent to Prefect's server "
                    f"({first_line(error)}); it is sent when the server is back. `overnight up` "
                    "starts one",
                )
                return
            self._warned.discard("server")
            self.known[str(path)] = stamp
            self._save_state()
            log_info(f"{path} is new: event sent to Prefect")

    def _warn_once(self, fault: str, text: str) -> None:
        """Warn of a fault unless it lasts since the last warning."""
        if fault not in self._warned:
            log_warning(text)
        self._warned.add(fault)

    def _save_state(self) -> None:
        write_text(self._state_file, json.dumps({"known": self.known}, indent=1))


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
    if the folder does not exist or is watched already, or if no Prefect server is set: the embedded
    API runs no automations.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        rule = "is not a directory" if folder.exists() else "no such directory"
        raise WatchError(Problem("DIR", str(folder), rule, "name the directory to watch"))
    url = PREFECT_API_URL.value()
    if not url:
        rule = "is not set: there is no Prefect server to start a flow on an event"
        remedy = "start one with `overnight up`, or set it, e.g. to http://127.0.0.1:4200/api"
        raise WatchError(Problem("PREFECT_API_URL", "", rule, remedy))
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
            f"watching {folder} for {pattern} every {interval_seconds:g} s, {len(watcher.known)} "
            f"files known; events go to {url}"
        )
        while True:
            watcher.step()
            time.sleep(interval_seconds)
