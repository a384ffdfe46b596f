"""Metrics of a run under their MLflow keys: from step records and reports into the journal."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from gpt.artifacts import EvaluationReport
from gpt.training.metrics import StepRecord
from tasks.display import log_warning
from tasks.tracking.journal import MetricsJournal, set_status
from tasks.tracking.mlflow_api import CPUMonitor, DiskMonitor, GPUMonitor

STEP_METRICS = {
    "loss": "train/loss",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
    "mfu": "mfu",
    "peak_memory_bytes": "memory/peak_bytes",
    "learning_rate": "lr",
    "tokens_seen": "tokens_seen",
    "batch_size": "batch_size",
    "skipped_steps": "skipped_steps",
    "recoveries": "recoveries",
    "energy_joules": "energy_joules",
}
HELDOUT_METRICS = {
    "loss": "val/loss",
    "perplexity": "val/perplexity",
    "bits_per_byte": "val/bits_per_byte",
}
SYSTEM_PREFIX = "system/"
"""MLflow shows metrics with this prefix on its page of system metrics."""
STEPS_PER_SYSTEM_SAMPLE = 10
"""Querying a GPU takes milliseconds."""


def report_metrics(report: EvaluationReport) -> dict[str, float | None]:
    """Metrics of the final evaluation, over the whole slice; `val/` covers the first part of it."""
    swag, last = report.hellaswag, report.lambada
    return {
        "final/loss": report.loss,
        "final/loss_error": report.standard_error,
        "final/perplexity": report.perplexity,
        "final/bits_per_byte": report.bits_per_byte,
        "final/hellaswag": swag.normalized_accuracy if swag else None,
        "final/lambada": last.accuracy if last else None,
        "final/lambada_perplexity": last.perplexity if last else None,
    }


class Recorder:
    """Appends metrics to the journal of a run folder. A full disk raises nothing: the metrics wait
    in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = MetricsJournal(folder)
        self._system = SystemMetrics()
        self._write_failed = False

    def log_step(self, record: StepRecord) -> None:
        values = vars(record)
        if record.validation:
            metrics = {key: getattr(record.validation, n) for n, key in HELDOUT_METRICS.items()}
        else:
            metrics = {key: values[name] for name, key in STEP_METRICS.items()}
            metrics |= self._system.sample(record.step)
        self.log_metrics(record.step, metrics)

    def log_report(self, report: EvaluationReport) -> None:
        self.log_metrics(report.step, report_metrics(report))

    def log_champion(
        self, step: int, champion: EvaluationReport, others: Mapping[str, float]
    ) -> None:
        """Record the champion's report beside the model of `step`, and other metrics of both."""
        metrics = report_metrics(champion).items()
        renamed = {key.replace("final/", "champion/", 1): value for key, value in metrics}
        self.log_metrics(step, renamed | dict(others))

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Record metrics by MLflow key; None: not measured."""
        error = None
        try:
            measured = {key: float(value) for key, value in metrics.items() if value is not None}
            if self._journal.append(step, measured):
                set_status(self._folder, "RUNNING")
        except OSError as caught:
            error = caught
        path = self._journal.path
        if error and not self._write_failed:
            log_warning(f"metrics cannot be written to {path} and wait in memory: {error.strerror}")
        elif self._write_failed and not error:
            log_warning(f"metrics can be written to {path} again; none is lost")
        self._write_failed = error is not None


class SystemMetrics:
    """CPU, memory, disk and GPU metrics from MLflow's own monitors.

    MLflow's background thread is not used, because it sends to the server directly. Sampled with
    the steps, the metrics are buffered like all others and compare between runs step by step.
    """

    def __init__(self) -> None:
        self._monitors = [CPUMonitor(), DiskMonitor()]
        with suppress(ImportError, RuntimeError):  # no NVIDIA GPU
            self._monitors.append(GPUMonitor())

    def sample(self, step: int) -> dict[str, float]:
        """Sample every `STEPS_PER_SYSTEM_SAMPLE` steps; empty for the steps between."""
        if step % STEPS_PER_SYSTEM_SAMPLE:
            return {}
        metrics: dict[str, float] = {}
        with suppress(OSError, psutil.Error):
            for monitor in self._monitors:
                monitor.collect_metrics()
                values = monitor.aggregate_metrics()
                metrics |= {SYSTEM_PREFIX + name: value for name, value in values.items()}
                monitor.clear_metrics()
        return metrics
