"""Metrics of a run under their MLflow keys: from step records and reports into the journal."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from gpt.artifacts import EvaluationReport
from gpt.training.metrics import StepRecord
from tasks.display import log_warning
from tasks.tracking.journal import MetricsJournal, update_metadata
from tasks.tracking.mlflow_api import CPUMonitor, DiskMonitor, GPUMonitor

STEP_METRICS = {
    "loss": "train/loss",
    "peak_memory_bytes": "memory/peak_bytes",
    "learning_rate": "lr",
}
"""Keys of those values of a step that have another name in MLflow."""
HELDOUT_METRICS = ("loss", "perplexity", "bits_per_byte")
STEPS_PER_SYSTEM_SAMPLE = 10
"""Querying a GPU takes milliseconds."""


def report_metrics(report: EvaluationReport, prefix: str = "final/") -> dict[str, float | None]:
    """Metrics of the final evaluation, over the whole slice; `val/` covers the first part of it."""
    swag, last = report.hellaswag, report.lambada
    metrics = {
        "loss": report.loss,
        "loss_error": report.standard_error,
        "perplexity": report.perplexity,
        "bits_per_byte": report.bits_per_byte,
        "hellaswag": swag.normalized_accuracy if swag else None,
        "lambada": last.accuracy if last else None,
        "lambada_perplexity": last.perplexity if last else None,
    }
    return {prefix + name: value for name, value in metrics.items()}


class Recorder:
    """Appends metrics to the journal of a run folder. A full disk raises nothing: the metrics wait
    in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = MetricsJournal(folder)
        self._write_failed = False
        self._monitors = [CPUMonitor(), DiskMonitor()]
        with suppress(ImportError, RuntimeError):  # no NVIDIA GPU
            self._monitors.append(GPUMonitor())

    def log_step(self, record: StepRecord) -> None:
        if record.validation:
            metrics = {f"val/{name}": getattr(record.validation, name) for name in HELDOUT_METRICS}
        else:
            values = {k: v for k, v in vars(record).items() if k not in ("step", "validation")}
            metrics = {STEP_METRICS.get(name, name): value for name, value in values.items()}
            if record.step % STEPS_PER_SYSTEM_SAMPLE == 0:
                metrics |= self._sample_system()
        self.log_metrics(record.step, metrics)

    def log_report(self, report: EvaluationReport) -> None:
        self.log_metrics(report.step, report_metrics(report))

    def log_metrics(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Record metrics by MLflow key; None: not measured."""
        error = None
        try:
            measured = {key: float(value) for key, value in metrics.items() if value is not None}
            if self._journal.append(step, measured):
                update_metadata(self._folder, status="RUNNING", error="")
        except OSError as caught:
            error = caught
        path = self._journal.path
        if error and not self._write_failed:
            log_warning(f"metrics cannot be written to {path} and wait in memory: {error.strerror}")
        elif self._write_failed and not error:
            log_warning(f"metrics can be written to {path} again; none is lost")
        self._write_failed = error is not None

    def _sample_system(self) -> dict[str, float]:
        """Sample CPU, memory, disk and GPU with MLflow's own monitors.

        MLflow's background thread is not used, because it sends to the server directly. Sampled
        with the steps, the metrics are buffered like all others and compare between runs step by
        step. MLflow shows those with the prefix `system/` on a page of their own.
        """
        metrics: dict[str, float] = {}
        with suppress(OSError, psutil.Error):
            for monitor in self._monitors:
                monitor.collect_metrics()
                metrics |= {f"system/{k}": v for k, v in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
        return metrics
