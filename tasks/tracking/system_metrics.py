"""The machine beside the curves: what MLflow's own monitors see of CPU, memory, disk and GPUs.

Their background thread is not used: it would tell MLflow directly, which may be away. Sampled with
the steps, they go the way of every other metric, and compare between runs step by step.
"""

from __future__ import annotations

from contextlib import suppress

import psutil

from tasks.tracking import mlflow_settings

mlflow_settings.apply()

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor  # noqa: E402
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor  # noqa: E402
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor  # noqa: E402
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor  # noqa: E402

STEPS_A_SAMPLE = 10
"""Asking a card takes milliseconds."""
PREFIX = "system/"
"""By which MLflow's page of system metrics knows them."""


class SystemMetrics:
    def __init__(self) -> None:
        self._monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor()]
        with suppress(ImportError, RuntimeError):  # there is no NVIDIA GPU
            self._monitors.append(GPUMonitor())

    def sample(self, step: int) -> dict[str, float]:
        """Nothing, but for every `STEPS_A_SAMPLE`-th step."""
        if step % STEPS_A_SAMPLE:
            return {}
        metrics: dict[str, float] = {}
        with suppress(OSError, psutil.Error):
            for monitor in self._monitors:
                monitor.collect_metrics()
                metrics |= {PREFIX + name: v for name, v in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
        return metrics
