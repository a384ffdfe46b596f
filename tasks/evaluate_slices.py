"""Evaluate challenger and champion on the same text: the current, the old and the new."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import Artifact, CheckpointRef, DatasetManifest, EvaluationReport
from gpt.config.schema import RunConfig
from gpt.evaluation.report_store import (
    CHAMPION_REPORT_FILE,
    REPORT_FILE,
    load_report,
    load_report_for,
    model_report_key,
    save_report_for,
)
from gpt.model.section import load_model_section
from tasks.display import log_info
from tasks.evaluate import evaluate_saved_model
from tasks.tracking.model_lookup import Champion
from tasks.tracking.recorder import report_metrics
from tasks.tracking.runs import RunRef, attach_artifacts, open_recorder


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
    loss_config = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update=loss_only)}
    )
    step = checkpoint.step
    ours = _Model(checkpoint.folder, f"step-{step}", step, "the challenger")
    theirs = _Model(model, champion.location, champion.step, str(champion))
    longest = max(config.model.block_size, load_model_section(model).block_size)

    metrics: dict[str, float | None] = {}

    def evaluate_pair(name: str, text: DatasetManifest | None) -> ReportPair | None:
        if text is None or text.validation.tokens <= longest:
            return None
        evaluate = partial(_load_or_evaluate, run, loss_config, text, f"{name} text")
        challenger_report = evaluate(ours, f"{name}_{REPORT_FILE}")
        champion_report = evaluate(theirs, f"{name}_{CHAMPION_REPORT_FILE}")
        metrics[f"final/{name}_text_loss"] = challenger_report.loss
        metrics[f"champion/{name}_text_loss"] = champion_report.loss
        return ReportPair(challenger=challenger_report, champion=champion_report)

    challenger_report = load_report(run.folder, config, step)
    assert challenger_report, "the evaluate task writes this report"
    with open_recorder(run) as recorder:
        champion_report = _load_or_evaluate(
            run, config, dataset, "the current slice", theirs, CHAMPION_REPORT_FILE
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


@dataclass(frozen=True)
class _Model:
    folder: Path
    identity: str
    """Permanent id, for the key of a stored report."""
    step: int
    description: str


def _load_or_evaluate(
    run: RunRef, config: RunConfig, dataset: DatasetManifest, text: str, model: _Model, file: str
) -> EvaluationReport:
    """Load the report from the run folder if it is on this model and data, else evaluate."""
    key = model_report_key(model.identity, dataset.fingerprint, config)
    report = load_report_for(run.folder / file, key)
    if report is None:
        log_info(f"evaluating {model.description} on {text}")
        report = evaluate_saved_model(model.folder, config, dataset, model.step)
        save_report_for(run.folder / file, key, report)
    return report
