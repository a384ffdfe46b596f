"""Stage 4, evaluate: one report on the last checkpoint, stored in the run folder."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import CheckpointRef, DatasetManifest, EvaluationReport
from gpt.config.schema import RunConfig
from gpt.evaluation.report import evaluate_model
from gpt.evaluation.report_store import REPORT_FILE, load_report, save_report
from gpt.files import compute_sha256, write_text
from gpt.hardware.device import pick_device
from gpt.markdown import quote_samples
from gpt.model.io import load_model
from gpt.model.section import CONFIG_FILE, MODEL_FILE
from gpt.training.checkpoint.retention import (
    PROGRESS_FILE,
    checkpoint_step,
    complete_checkpoints,
    read_progress,
)
from tasks.display import log_info, show_evaluation
from tasks.tracking.journal import PendingModel
from tasks.tracking.runs import RunRef, attach_artifacts, open_recorder

SAMPLES_FILE = "samples.md"
MODEL_FILES = (MODEL_FILE, CONFIG_FILE, PROGRESS_FILE)


@task(name="evaluate", task_run_name="evaluate", cache_policy=NO_CACHE)
def evaluate(
    config: RunConfig, dataset: DatasetManifest, checkpoint: CheckpointRef, run: RunRef
) -> EvaluationReport:
    """Evaluate the checkpoint, unless the run folder has its report already."""
    with open_recorder(run) as recorder:
        report = load_report(run.folder, config, checkpoint.step)
        if report is None:
            log_info(f"evaluating step {checkpoint.step}")
            report = evaluate_saved_model(checkpoint.folder, config, dataset, checkpoint.step)
            # The report last: if it exists, the evaluation is complete.
            write_text(run.folder / SAMPLES_FILE, render_samples(report))
            save_report(run.folder, config, report)
        recorder.log_report(report)
        files = {name: run.folder / name for name in (REPORT_FILE, SAMPLES_FILE)}
        models = collect_models(run.folder.resolve(), checkpoint.step)
        attach_artifacts(run, files, models=models)
    return report


def evaluate_saved_model(
    folder: Path, config: RunConfig, dataset: DatasetManifest, step: int
) -> EvaluationReport:
    """Evaluate the model in a folder, with a progress bar."""
    model = load_model(folder, pick_device(config.hardware.device))
    return show_evaluation(evaluate_model(model, config, dataset, step))


def collect_models(folder: Path, evaluated_step: int) -> tuple[PendingModel, ...]:
    """List the checkpoints of a run for MLflow; the evaluated one with its files and report."""
    report = folder / REPORT_FILE
    return tuple(
        _describe_checkpoint(path, report if checkpoint_step(path) == evaluated_step else None)
        for path in reversed(complete_checkpoints(folder))
    )


def _describe_checkpoint(checkpoint: Path, report: Path | None) -> PendingModel:
    progress = read_progress(checkpoint)
    return PendingModel(
        name=f"step-{progress.step}",
        step=progress.step,
        tokens_seen=progress.tokens_seen,
        folder=checkpoint,
        files=(*(checkpoint / name for name in MODEL_FILES), report) if report else (),
        report_sha256=compute_sha256(report) if report else "",
    )


def render_samples(report: EvaluationReport) -> str:
    """Return the sample texts of a report as Markdown."""
    samples = quote_samples(report.samples)
    return f"# Samples after step {report.step}\n\n{samples}\n"
