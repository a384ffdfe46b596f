"""What Prefect is told of a source: that a file has come. An automation starts a flow on it."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.events import Event, RelatedResource, Resource
from prefect.settings import PREFECT_API_URL

from gpt.errors import Problem, WatchError

ARRIVED = "overnight.parquet.arrived"
SOURCE = "overnight.source"
"""`prefect.resource.id` of every such event: what an automation matches."""


def require_prefect_server() -> str:
    """The address of Prefect's API. Raises `WatchError` where none is set: an API that lives as
    long as this process has no automations."""
    url = PREFECT_API_URL.value()
    if url:
        return str(url)
    rule = "is not set: there is no Prefect server that could start anything on an event"
    remedy = "start one with `overnight up`, or name one, as http://127.0.0.1:4200/api"
    raise WatchError(Problem("PREFECT_API_URL", "", rule, remedy))


def send_file_event(path: Path, event_id: UUID) -> None:
    """Returns when the server has the event. Sent twice under one id, it is one event. Raises
    `httpx.HTTPError` where the server is away or refuses."""
    event = Event(
        id=event_id,
        event=ARRIVED,
        resource=Resource({"prefect.resource.id": SOURCE, "prefect.resource.name": path.name}),
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
    # Not `emit_event`, which hands it to a thread and does not say whether it arrived.
    with get_client(sync_client=True) as client:
        answer = client.request("POST", "/events", json=[event.model_dump(mode="json")])  # type: ignore[arg-type]
        answer.raise_for_status()


SERVER_UNREACHABLE = (httpx.HTTPError, RuntimeError, OSError)
"""What `send_file_event` raises where the server cannot be reached."""
