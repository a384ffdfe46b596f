"""Prefect's API is a page to look at, not a thing to depend on: what it misses stops nothing."""

from __future__ import annotations

import re

import httpx
from prefect.artifacts import create_markdown_artifact
from prefect.context import get_run_context
from prefect.exceptions import MissingContextError, PrefectHTTPStatusError

from gpt.errors import GPTError
from tasks.display import log_warning

UNREACHABLE = ("Failed to reach API", "Timed out while attempting to connect")
"""How Prefect's own errors begin that say so and nothing else."""


def is_api_unreachable(error: BaseException | None) -> bool:
    """Whether the error, or one behind it, is that the API cannot be reached or does not work. An
    error of ours is not, whatever network is behind it."""
    while error is not None and not isinstance(error, GPTError):
        if isinstance(error, httpx.TransportError) or str(error).startswith(UNREACHABLE):
            return True
        if isinstance(error, PrefectHTTPStatusError):
            return error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
        error = error.__cause__ or error.__context__
    return False


def artifact_key(text: str) -> str:
    """As Prefect takes one: all but letters and digits as dashes."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def publish_markdown(key: str, markdown: str, description: str) -> None:
    """A markdown artifact of this run; nothing outside of a Prefect run."""
    try:
        get_run_context()
    except MissingContextError:
        return
    name = artifact_key(key)
    try:
        create_markdown_artifact(key=name, markdown=markdown, description=description)
    except Exception as error:
        if not is_api_unreachable(error):
            raise
        log_warning(f"Prefect's API is away, so it does not get the page {name}; the run goes on")
