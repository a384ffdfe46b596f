"""What this package uses of MLflow, imported after `mlflow_settings` has set the environment."""

from collections.abc import Callable
from enum import StrEnum
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


class Alias(StrEnum):
    """Aliases of model versions."""

    CHAMPION = "champion"
    CHALLENGER = "challenger"
    PREVIOUS = "previous-champion"


class Tag(StrEnum):
    """Tags of runs, models and model versions."""

    UID = "overnight.uid"
    """Finds the run or version again after an interrupted sync."""
    STEP = "overnight.step"
    LOSS = "overnight.loss"
    FOLDER = "overnight.folder"
    ERROR = "overnight.error"
    ALIAS = "overnight.alias"
    """The promotion decision: champion or challenger."""
    REASON = "overnight.reason"
    AGAINST = "overnight.judged_against"
    """The champion's version at the time of the decision; empty: there was none."""
    TRIAL = "overnight.trial"
    """Key of the retraining, so that a challenger that lost is not trained again."""
    NOTE = "mlflow.note.content"
    PARENT_RUN = "mlflow.parentRunId"
    MODEL_VERSIONS = "mlflow.modelVersions"


def get_or_none(request: Callable[[], Any]) -> Any:
    """Return the result of an MLflow call, or None if the entity does not exist."""
    try:
        return request()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
