"""Settings that MLflow reads from the environment, at its import or at each call."""

from __future__ import annotations

import os

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A call that cannot reach a server gives up soon, since the courier tries again by itself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # Nothing of the folder that a run was started in belongs to its model.
    "MLFLOW_UV_AUTO_DETECT": "false",
}


def apply() -> None:
    """To be called before mlflow is imported. What is in the environment already wins."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
