"""Prefect's API: artifacts, and whether it can be reached. A run does not depend on it."""

import re

import httpx
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import PrefectHTTPStatusError

from gpt.errors import GPTError
from tasks.display import is_in_prefect_run, log_warning

UNREACHABLE = ("Failed to reach API", "Timed out while attempting to connect")
"""Beginnings of Prefect's own error messages about an unreachable API."""


def is_api_unreachable(error: BaseException | None) -> bool:
    """Return whether the error, or one of its causes, means that the API cannot be reached or does
    not work. A `GPTError` does not, whatever network error caused it."""
    while error is not None and not isinstance(error, GPTError):
        if isinstance(error, httpx.TransportError) or str(error).startswith(UNREACHABLE):
            return True
        if isinstance(error, PrefectHTTPStatusError):
            return error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
        error = error.__cause__ or error.__context__
    return False


def artifact_key(text: str) -> str:
    """Return `text` as a Prefect artifact key: lower-case letters, digits and dashes."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")


def publish_markdown(key: str, markdown: str, description: str) -> None:
    """Create a Markdown artifact of the current Prefect run; outside of one, do nothing."""
    if not is_in_prefect_run():
        return
    name = artifact_key(key)
    try:
        create_markdown_artifact(key=name, markdown=markdown, description=description)
    except Exception as error:
        if not is_api_unreachable(error):
            raise
        log_warning(f"Prefect's API is unreachable: the artifact {name} is not created")
