"""Settings that MLflow reads from the environment, some of them when it is imported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

REQUEST_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Fail fast when the server is unreachable: the sync thread retries by itself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    REQUEST_TIMEOUT: "20",
    # The model must not depend on the folder that the run was started in.
    "MLFLOW_UV_AUTO_DETECT": "false",
}


def apply() -> None:
    """Set the defaults; call before importing mlflow. Existing environment variables win."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


@contextmanager
def upload_timeout(seconds: int) -> Iterator[None]:
    """Raise the request timeout of this process during an upload, unless the user has set it: a
    server that proxies artifacts answers only after its own store has the file."""
    is_default = os.environ.get(REQUEST_TIMEOUT) == SETTINGS[REQUEST_TIMEOUT]
    if is_default:
        os.environ[REQUEST_TIMEOUT] = str(seconds)
    try:
        yield
    finally:
        if is_default:
            os.environ[REQUEST_TIMEOUT] = SETTINGS[REQUEST_TIMEOUT]
