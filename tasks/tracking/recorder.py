"""The numbers of a run on their way into its journal, under the names that MLflow shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gpt.artifacts import EvaluationReport
from gpt.training.loop import StepRecord
from tasks.display import log_warning
from tasks.tracking.journal import MetricsJournal, set_status
from tasks.tracking.system_metrics import SystemMetrics

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


def report_metrics(report: EvaluationReport) -> dict[str, float | None]:
    """Over the whole slice, after the last step; `val/` is of the slice's beginning."""
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
    """Takes metrics: onto the disk at once, to MLflow by and by. Never raises."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = MetricsJournal(folder)
        self._machine = SystemMetrics()
        self._failed = False

    def step(self, record: StepRecord) -> None:
        values = vars(record)
        if record.validation:
            metrics = {key: getattr(record.validation, n) for n, key in HELDOUT_METRICS.items()}
        else:
            metrics = {key: values[name] for name, key in STEP_METRICS.items()}
            metrics |= self._machine.sample(record.step)
        self._append(record.step, metrics)

    def report(self, report: EvaluationReport) -> None:
        self._append(report.step, report_metrics(report))

    def against(self, step: int, rival: EvaluationReport, others: Mapping[str, float]) -> None:
        """What the model of `step` is held against, and other numbers on both."""
        theirs = report_metrics(rival).items()
        metrics = {key.replace("final/", "champion/", 1): value for key, value in theirs}
        self._append(step, {**metrics, **others})

    def _append(self, step: int, metrics: Mapping[str, float | None]) -> None:
        try:
            known = {key: float(value) for key, value in metrics.items() if value is not None}
            if self._journal.append(step, known):
                set_status(self._folder, "RUNNING")
            self._tell_of(None)
        except OSError as error:
            self._tell_of(error)

    def _tell_of(self, fault: OSError | None) -> None:
        """Once when the disk takes no more metrics, once when it does again."""
        path = self._journal.path
        if fault and not self._failed:
            log_warning(f"metrics cannot be written to {path} and wait in memory: {fault.strerror}")
        elif self._failed and not fault:
            log_warning(f"metrics are written to {path} again; none is lost")
        self._failed = fault is not None
