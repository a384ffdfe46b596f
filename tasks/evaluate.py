"""Stage 4, evaluate: one report on the last checkpoint, stored in the run folder. A retraining then
evaluates challenger and champion on the same text: the current, the old and the new."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import Artifact, CheckpointRef, DatasetManifest, EvaluationReport
from gpt.config.schema import RunConfig
from gpt.evaluation.report import evaluate_model
from gpt.evaluation.report_store import (
    CHAMPION_REPORT_FILE,
    REPORT_FILE,
    load_report,
    load_report_for,
    model_report_key,
    save_report,
    save_report_for,
)
from gpt.files import compute_sha256, write_text
from gpt.hardware.device import pick_device
from gpt.markdown import quote_samples
from gpt.model.io import load_model
from gpt.model.section import CONFIG_FILE, MODEL_FILE, load_model_section
from gpt.training.checkpoint.retention import (
    PROGRESS_FILE,
    checkpoint_step,
    complete_checkpoints,
    read_progress,
)
from tasks.display import log_info, show_evaluation
from tasks.tracking.journal import PendingModel
from tasks.tracking.model_lookup import Champion
from tasks.tracking.recorder import report_metrics
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


# --- the challenger of a retraining and the champion ---------------------------------------------


class ReportPair(Artifact):
    """Two reports on one slice."""

    challenger: EvaluationReport
    champion: EvaluationReport


class SliceReports(Artifact):
    """Reports on text that neither model was trained on."""

    current: ReportPair
    """The slice of the current dataset, which decides about the promotion."""
    old: ReportPair | None = None
    """The slice of the champion's dataset, if that still exists: has the challenger forgotten?"""
    new: ReportPair | None = None
    """The validation text of the files that are new since the champion, if the dataset has files
    of both: has the challenger learned?"""


@task(name="evaluate-slices", task_run_name="evaluate-slices", cache_policy=NO_CACHE)
def evaluate_slices(
    config: RunConfig,
    dataset: DatasetManifest,
    new: DatasetManifest | None,
    checkpoint: CheckpointRef,
    run: RunRef,
    champion: Champion,
    model: Path,
) -> SliceReports:
    """Evaluate the champion on the challenger's slice, then both on the old and the new slice.

    `model` is the champion's model folder; `new` holds the new text. Reports that the run folder
    has already are reused.
    """
    loss_only = {"hellaswag": "", "lambada": "", "prompts": ()}
    evaluation = config.evaluation.model_copy(update=loss_only)
    loss_config = config.model_copy(update={"evaluation": evaluation})
    step = checkpoint.step
    longest = max(config.model.block_size, load_model_section(model).block_size)
    # Folder, permanent id (for the key of a stored report), step and description.
    ours = (checkpoint.folder, f"step-{step}", step, "the challenger")
    theirs = (model, champion.location, champion.step, str(champion))
    metrics: dict[str, float | None] = {}

    def load_or_evaluate(
        evaluated: tuple[Path, str, int, str],
        text: DatasetManifest,
        name: str,
        settings: RunConfig,
        file: str,
    ) -> EvaluationReport:
        folder, identity, model_step, description = evaluated
        key = model_report_key(identity, text.fingerprint, settings)
        report = load_report_for(run.folder / file, key)
        if report is None:
            log_info(f"evaluating {description} on {name}")
            report = evaluate_saved_model(folder, settings, text, model_step)
            save_report_for(run.folder / file, key, report)
        return report

    def evaluate_pair(name: str, text: DatasetManifest | None) -> ReportPair | None:
        if text is None or text.validation.tokens <= longest:
            return None
        our_report, their_report = (
            load_or_evaluate(evaluated, text, f"{name} text", loss_config, f"{name}_{file}")
            for evaluated, file in ((ours, REPORT_FILE), (theirs, CHAMPION_REPORT_FILE))
        )
        metrics[f"final/{name}_text_loss"] = our_report.loss
        metrics[f"champion/{name}_text_loss"] = their_report.loss
        return ReportPair(challenger=our_report, champion=their_report)

    challenger_report = load_report(run.folder, config, step)
    assert challenger_report, "the evaluate task writes this report"
    with open_recorder(run) as recorder:
        champion_report = load_or_evaluate(
            theirs, dataset, "the current slice", config, CHAMPION_REPORT_FILE
        )
        slices = SliceReports(
            current=ReportPair(challenger=challenger_report, champion=champion_report),
            old=evaluate_pair("old", champion.dataset if champion.dataset_is_local else None),
            new=evaluate_pair("new", new),
        )
        recorder.log_metrics(step, report_metrics(champion_report, "champion/") | metrics)
        files = sorted(run.folder.glob(f"*{REPORT_FILE}"))
        attach_artifacts(run, {path.name: path for path in files})
    return slices
