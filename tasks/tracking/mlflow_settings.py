"""Settings that MLflow reads from the environment, at its import or at each call."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

ANSWER = "MLFLOW_HTTP_REQUEST_TIMEOUT"
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A call that cannot reach a server gives up soon, since the courier tries again by itself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    ANSWER: "20",
    # Nothing of the folder that a run was started in belongs to its model.
    "MLFLOW_UV_AUTO_DETECT": "false",
}


def apply() -> None:
    """To be called before mlflow is imported. What is in the environment already wins."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


@contextmanager
def uploading(seconds: int) -> Iterator[None]:
    """Wait so long for an answer, unless the environment was told how long: a server that has taken
    a file is silent until the store behind it has it too. Of the whole process, as the setting."""
    ours = os.environ.get(ANSWER) == SETTINGS[ANSWER]
    if ours:
        os.environ[ANSWER] = str(seconds)
    try:
        yield
    finally:
        if ours:
            os.environ[ANSWER] = SETTINGS[ANSWER]
