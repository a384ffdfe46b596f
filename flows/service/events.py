"""The Prefect event for a new Parquet file; an automation starts a flow on it."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.events import Event, RelatedResource, Resource
from prefect.settings import PREFECT_API_URL

from gpt.errors import Problem, WatchError

FILE_ARRIVED = "overnight.parquet.arrived"
SOURCE_ID = "overnight.source"
"""`prefect.resource.id` of every such event, which the automation in prefect.yaml matches."""
SERVER_UNREACHABLE = (httpx.HTTPError, RuntimeError, OSError)
"""What `send_file_event` raises if the server cannot be reached or refuses."""


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
                {
                    "prefect.resource.id": f"overnight.file.{path}",
                    "prefect.resource.role": "file",
                }
            )
        ],
        payload={"path": str(path)},
    )
    # `emit_event` hands the event to a thread and does not report whether it was delivered.
    with get_client(sync_client=True) as client:
        answer = client.request("POST", "/events", json=[event.model_dump(mode="json")])  # type: ignore[arg-type]
        answer.raise_for_status()
