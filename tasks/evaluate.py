"""Stage 4, evaluate: one report on the last checkpoint, stored in the run folder. A retraining then
evaluates challenger and champion on the same text: the current, the old and the new."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import Artifact, CheckpointRef, DatasetManifest, EvaluationReport
from gpt.config.schema import RunConfig
from gpt.evaluation.report import evaluate_model
from gpt.evaluation.report_store import (
    CHAMPION_REPORT_FILE,
    REPORT_FILE,
    evaluation_values,
    load_report,
    read_report_file,
    save_report,
    write_report_file,
)
from gpt.files import compute_sha256, write_text
from gpt.hardware.device import pick_device
from gpt.markdown import quote_samples
from gpt.model.io import load_model
from gpt.model.section import load_model_section
from gpt.training.checkpoint.retention import complete_checkpoints, read_progress
from tasks.display import log_info, show_evaluation
from tasks.tracking.journal import PendingModel
from tasks.tracking.model_lookup import MODEL_FILES, Champion
from tasks.tracking.recorder import report_metrics
from tasks.tracking.runs import RunRef, attach_artifacts, open_recorder

SAMPLES_FILE = "samples.md"


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
    report, models = folder / REPORT_FILE, []
    for checkpoint in reversed(complete_checkpoints(folder)):
        progress = read_progress(checkpoint)
        model = PendingModel(
            name=f"step-{progress.step}",
            step=progress.step,
            tokens_seen=progress.tokens_seen,
            folder=checkpoint,
        )
        if progress.step == evaluated_step:
            files = (*(checkpoint / name for name in MODEL_FILES), report)
            changes = {"files": files, "report_sha256": compute_sha256(report)}
            model = model.model_copy(update=changes)
        models.append(model)
    return tuple(models)


def render_samples(report: EvaluationReport) -> str:
    """Return the sample texts of a report as Markdown."""
    return f"# Samples after step {report.step}\n\n{quote_samples(report.samples)}\n"


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
    models = {
        # Folder, permanent id (for the key of a stored report), step and description.
        REPORT_FILE: (checkpoint.folder, f"step-{step}", step, "the challenger"),
        CHAMPION_REPORT_FILE: (model, champion.location, champion.step, str(champion)),
    }
    metrics: dict[str, float | None] = {}

    def load_or_evaluate(
        file: str, name: str, text: DatasetManifest, settings: RunConfig = loss_config
    ) -> EvaluationReport:
        folder, identity, model_step, description = models[file]
        path = run.folder / (file if name == "current" else f"{name}_{file}")
        values = evaluation_values(settings)
        key = {"model": identity, "dataset": text.fingerprint, "evaluation": values}
        report = read_report_file(path, **key)
        if report is None:
            log_info(f"evaluating {description} on the {name} text")
            report = evaluate_saved_model(folder, settings, text, model_step)
            write_report_file(path, report, **key)
        return report

    def evaluate_pair(name: str, text: DatasetManifest | None) -> ReportPair | None:
        if text is None or text.validation.tokens <= longest:
            return None
        pair = ReportPair(
            challenger=load_or_evaluate(REPORT_FILE, name, text),
            champion=load_or_evaluate(CHAMPION_REPORT_FILE, name, text),
        )
        metrics[f"final/{name}_text_loss"] = pair.challenger.loss
        metrics[f"champion/{name}_text_loss"] = pair.champion.loss
        return pair

    challenger_report = load_report(run.folder, config, step)
    assert challenger_report, "the evaluate task writes this report"
    with open_recorder(run) as recorder:
        champion_report = load_or_evaluate(CHAMPION_REPORT_FILE, "current", dataset, config)
        slices = SliceReports(
            current=ReportPair(challenger=challenger_report, champion=champion_report),
            old=evaluate_pair("old", champion.dataset if champion.dataset_is_local else None),
            new=evaluate_pair("new", new),
        )
        recorder.log_metrics(step, report_metrics(champion_report, "champion/") | metrics)
        files = sorted(run.folder.glob(f"*{REPORT_FILE}"))
        attach_artifacts(run, {path.name: path for path in files})
    return slices
