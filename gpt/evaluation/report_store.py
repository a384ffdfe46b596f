"""The report that a run's folder keeps, and for what it was asked. Without torch."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from gpt.artifacts import EvaluationReport
from gpt.config.schema import RunConfig
from gpt.files import write_text

REPORT_FILE = "report.json"
CHAMPION_REPORT_FILE = "champion_report.json"
"""On the model that the run's own is held against, on the slice of the run."""


def load_report(folder: Path, config: RunConfig, step: int) -> EvaluationReport | None:
    """The report on the checkpoint of `step`, made with the config's [evaluation]."""
    return load_report_for(folder / REPORT_FILE, _asked(config, step))


def load_report_for(path: Path, asked: dict[str, Any]) -> EvaluationReport | None:
    """The report in such a file, if it was made for what is asked."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return EvaluationReport(**kept["report"]) if kept["asked"] == asked else None


def read_report_file(path: Path) -> EvaluationReport | None:
    """The report in such a file, whatever it was asked for; None where none can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return EvaluationReport(**json.loads(path.read_bytes())["report"])
    return None


def save_report(folder: Path, config: RunConfig, report: EvaluationReport) -> None:
    save_report_for(folder / REPORT_FILE, _asked(config, report.step), report)


def save_report_for(path: Path, asked: dict[str, Any], report: EvaluationReport) -> None:
    values = {"asked": asked, "report": report.model_dump(mode="json")}
    write_text(path, json.dumps(values, indent=2) + "\n")


def model_report_key(model: str, dataset: str, config: RunConfig) -> dict[str, Any]:
    """For a report on a model, by what names it for good, on the data set of that fingerprint."""
    evaluation = config.evaluation.model_dump(mode="json")
    return {"model": model, "dataset": dataset, "evaluation": evaluation}


def load_champion_report(folder: Path, model: str) -> EvaluationReport | None:
    """The report that a run's folder keeps on `model`, if it does."""
    path = folder / CHAMPION_REPORT_FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(path.read_bytes())["asked"]["model"] == model:
            return read_report_file(path)
    return None


def _asked(config: RunConfig, step: int) -> dict[str, Any]:
    return {"step": step, "evaluation": config.evaluation.model_dump(mode="json")}
