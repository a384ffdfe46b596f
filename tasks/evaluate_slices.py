"""The challenger and the champion on the same text: what there is now, and what there was then."""

from __future__ import annotations

from dataclasses import dataclass
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
from tasks.tracking.champion import Champion
from tasks.tracking.runs import RunRef, attach_artifacts, open_recorder


class ReportPair(Artifact):
    """Two reports on one slice."""

    challenger: EvaluationReport
    champion: EvaluationReport


class SliceReports(Artifact):
    """Losses on text that neither was trained on."""

    current: ReportPair
    """The slice of the current data set, by which they are judged."""
    old: ReportPair | None = None
    """The slice of the champion's data set, where that is still there: whether something was
    forgotten."""
    new: ReportPair | None = None
    """The validation text of the files that are new to the champion, where some of its own are in
    the data set too: whether something was learned."""


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
    """Evaluate the champion, which lies in `model`, on the slice that the challenger was evaluated
    on; then both on the champion's own, and on that of `new`. A report that the run folder has is
    not made again."""
    on_text = config.model_copy(
        update={
            "evaluation": config.evaluation.model_copy(
                update={"hellaswag": "", "lambada": "", "prompts": ()}
            )
        }
    )
    ours = _Model(checkpoint.folder, f"step-{checkpoint.step}", checkpoint.step, "the challenger")
    theirs = _Model(model, champion.location, champion.step, str(champion))
    longest = max(config.model.block_size, load_model_section(model).block_size)

    def pair(name: str, on: DatasetManifest | None) -> ReportPair | None:
        if on is None or on.validation.tokens <= longest:
            return None
        return ReportPair(
            challenger=_report(run, f"{name}_{REPORT_FILE}", on_text, on, ours, f"{name} text"),
            champion=_report(
                run, f"{name}_{CHAMPION_REPORT_FILE}", on_text, on, theirs, f"{name} text"
            ),
        )

    challenger = load_report(run.folder, config, checkpoint.step)
    assert challenger, "the evaluate task keeps it"
    with open_recorder(run) as recorder:
        rival = _report(run, CHAMPION_REPORT_FILE, config, dataset, theirs, "the current slice")
        slices = SliceReports(
            current=ReportPair(challenger=challenger, champion=rival),
            old=pair("old", champion.dataset if champion.dataset_is_local else None),
            new=pair("new", new),
        )
        recorder.log_champion(checkpoint.step, rival, _losses(slices))
        files = sorted(run.folder.glob(f"*{REPORT_FILE}"))
        attach_artifacts(run, {path.name: path for path in files})
    return slices


@dataclass(frozen=True)
class _Model:
    folder: Path
    identity: str
    """Names it for good."""
    step: int
    told: str


def _report(
    run: RunRef, name: str, config: RunConfig, dataset: DatasetManifest, model: _Model, told: str
) -> EvaluationReport:
    """The report of that name in the run folder, if it is on this model and data, else made."""
    asked = model_report_key(model.identity, dataset.fingerprint, config)
    report = load_report_for(run.folder / name, asked)
    if report is None:
        log_info(f"evaluating {model.told} on {told}")
        report = evaluate_saved_model(model.folder, config, dataset, model.step)
        save_report_for(run.folder / name, asked, report)
    return report


def _losses(slices: SliceReports) -> dict[str, float]:
    """By MLflow's key; the challenger's on the current slice is told already."""
    found = {}
    for name, pair in (("old", slices.old), ("new", slices.new)):
        if pair:
            found[f"final/{name}_text_loss"] = pair.challenger.loss
            found[f"champion/{name}_text_loss"] = pair.champion.loss
    return found
