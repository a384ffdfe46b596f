"""Stage 4, evaluate: the morning. One report on the last checkpoint, kept in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import CheckpointRef, DatasetManifest, EvaluationReport
from gpt.config import RunConfig
from gpt.evaluation.report import evaluate as evaluation_of
from gpt.files import write_text
from tasks.console import tell
from tasks.tracking import RunRef, attach, recording

REPORT = "report.json"
SAMPLES = "samples.md"
MODEL_FILES = ("model.safetensors", "config.json")


@task(name="evaluate", task_run_name="evaluate", cache_policy=NO_CACHE)
def evaluate(
    config: RunConfig, dataset: DatasetManifest, checkpoint: CheckpointRef, run: RunRef
) -> EvaluationReport:
    """Evaluate the checkpoint, unless the run folder has that report already."""
    asked = {"step": checkpoint.step, "evaluation": config.evaluation.model_dump(mode="json")}
    with recording(run) as recorder:
        report = _kept_report(run.folder, asked)
        if report is None:
            tell(f"evaluating step {checkpoint.step}")
            report = evaluation_of(config, dataset, checkpoint)
            _keep_report(run.folder, asked, report)
        recorder.report(report)
        model = {f"model/{name}": checkpoint.folder / name for name in MODEL_FILES}
        attach(run, {name: run.folder / name for name in (REPORT, SAMPLES)} | model)
    return report


def _kept_report(folder: Path, asked: dict[str, Any]) -> EvaluationReport | None:
    path = folder / REPORT
    if not path.exists():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return EvaluationReport(**kept["report"]) if kept["asked"] == asked else None


def _keep_report(folder: Path, asked: dict[str, Any], report: EvaluationReport) -> None:
    """The samples first: a report that is there is whole."""
    write_text(folder / SAMPLES, samples_page(report))
    text = json.dumps({"asked": asked, "report": report.model_dump(mode="json")}, indent=2)
    write_text(folder / REPORT, text + "\n")


def samples_page(report: EvaluationReport) -> str:
    """What the model writes, as Markdown: each prompt in bold, its continuation quoted."""
    parts = [f"# What the model writes after step {report.step}"]
    for sample in report.samples:
        lines = "\n".join(f"> {line}" for line in sample.text.splitlines())
        parts.append(f"**{sample.prompt}**\n\n{lines}")
    return "\n\n".join(parts) + "\n"
