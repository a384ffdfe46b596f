"""What this package uses of MLflow, imported after `mlflow_settings` has set the environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.tracking import mlflow_settings

mlflow_settings.apply()

from mlflow import artifacts as artifacts  # noqa: E402
from mlflow import entities as entities  # noqa: E402
from mlflow.entities.model_registry import ModelVersion as ModelVersion  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor as CPUMonitor  # noqa: E402
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor as DiskMonitor  # noqa: E402
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor as GPUMonitor  # noqa: E402
from mlflow.tracking import MlflowClient as MlflowClient  # noqa: E402


def get_or_none(request: Callable[[], Any]) -> Any:
    """Return the result of an MLflow call, or None if the entity does not exist."""
    try:
        return request()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def error_summary(error: Exception) -> str:
    """Return the first line of an error message; MLflow's messages can fill a page."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
