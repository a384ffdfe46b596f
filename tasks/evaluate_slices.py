"""The challenger and the champion on the same text: what there is now, and what there was then."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import Artifact, CheckpointRef, DatasetManifest, EvaluationReport
from gpt.config import RunConfig
from gpt.evaluation.kept import RIVAL_REPORT, asked_of_model, keep_for, kept_for
from tasks.champion import Champion
from tasks.console import tell
from tasks.evaluate import evaluated
from tasks.tracking import RunRef, attach, recording

OLD_REPORT, OLD_RIVAL_REPORT = "report_old_slice.json", f"old_slice_{RIVAL_REPORT}"


class Slices(Artifact):
    """Reports on the validation slice of the current data set and, where the champion's data set is
    still there, on the slice of that one."""

    champion: EvaluationReport
    old: EvaluationReport | None = None
    """The challenger's."""
    champion_old: EvaluationReport | None = None


@task(name="evaluate-slices", task_run_name="evaluate-slices", cache_policy=NO_CACHE)
def evaluate_slices(
    config: RunConfig,
    dataset: DatasetManifest,
    checkpoint: CheckpointRef,
    run: RunRef,
    champion: Champion,
    model: Path,
) -> Slices:
    """Evaluate the champion, which lies in `model`, on the current slice, as the challenger was;
    then both on the champion's own. A report that the run folder has is not made again."""
    old = champion.dataset if champion.dataset_is_here else None
    on_text = config.model_copy(
        update={
            "evaluation": config.evaluation.model_copy(
                update={"hellaswag": "", "lambada": "", "prompts": ()}
            )
        }
    )
    challenger = (checkpoint.folder, f"step-{checkpoint.step}", checkpoint.step)
    theirs = (model, champion.location, champion.step)
    with recording(run) as recorder:
        slices = Slices(
            champion=_report(run, RIVAL_REPORT, config, dataset, f"{champion}", *theirs),
            old=old
            and _report(
                run, OLD_REPORT, on_text, old, "the challenger on the old slice", *challenger
            ),
            champion_old=old
            and _report(run, OLD_RIVAL_REPORT, on_text, old, f"{champion} on its slice", *theirs),
        )
        recorder.against(checkpoint.step, slices.champion, slices.old, slices.champion_old)
        names = (RIVAL_REPORT, OLD_REPORT, OLD_RIVAL_REPORT) if old else (RIVAL_REPORT,)
        attach(run, {name: run.folder / name for name in names})
    return slices


def _report(
    run: RunRef,
    name: str,
    config: RunConfig,
    dataset: DatasetManifest,
    told: str,
    model: Path,
    named: str,
    step: int,
) -> EvaluationReport:
    """The report of that name in the run folder, if it is on this model and data, else made."""
    asked = asked_of_model(named, dataset.fingerprint, config)
    report = kept_for(run.folder / name, asked)
    if report is None:
        tell(f"evaluating {told}")
        report = evaluated(model, config, dataset, step)
        keep_for(run.folder / name, asked, report)
    return report
