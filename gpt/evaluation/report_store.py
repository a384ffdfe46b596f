"""Reports stored in run folders, each with a key that says what it was made for.

A report is reused only if its key matches, so that a changed `[evaluation]` is evaluated again.
Does not import torch.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt.artifacts import EvaluationReport
from gpt.config.schema import RunConfig
from gpt.files import write_text

REPORT_FILE = "report.json"
CHAMPION_REPORT_FILE = "champion_report.json"
"""The report on the champion that the run's model is compared with, on the slice of the run."""


def load_report(folder: Path, config: RunConfig, step: int) -> EvaluationReport | None:
    """Load the report on the checkpoint of `step`; None if there is none for this config."""
    return load_report_for(folder / REPORT_FILE, _checkpoint_report_key(config, step))


def save_report(folder: Path, config: RunConfig, report: EvaluationReport) -> None:
    """Save the report on the checkpoint of `report.step`."""
    save_report_for(folder / REPORT_FILE, _checkpoint_report_key(config, report.step), report)


def load_report_for(path: Path, key: dict[str, Any]) -> EvaluationReport | None:
    """Load the report in a file; None if the file is missing or its key differs."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return EvaluationReport(**stored["report"]) if stored["asked"] == key else None


def save_report_for(path: Path, key: dict[str, Any], report: EvaluationReport) -> None:
    values = {"asked": key, "report": report.model_dump(mode="json")}
    write_text(path, json.dumps(values, indent=2) + "\n")


def read_report_file(path: Path) -> EvaluationReport | None:
    """Read the report in a file, whatever its key; None if it cannot be read."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return EvaluationReport(**json.loads(path.read_bytes())["report"])
    return None


def load_champion_report(folder: Path, model: str) -> EvaluationReport | None:
    """Load the report in a run folder on the champion `model`, the id in its key, if any."""
    path = folder / CHAMPION_REPORT_FILE
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(path.read_bytes())["asked"]["model"] == model:
            return read_report_file(path)
    return None


def model_report_key(model: str, dataset: str, config: RunConfig) -> dict[str, Any]:
    """Build the key of a report on a model, by a permanent id, on a dataset, by fingerprint."""
    return {"model": model, "dataset": dataset, "evaluation": _evaluation(config)}


def _checkpoint_report_key(config: RunConfig, step: int) -> dict[str, Any]:
    return {"step": step, "evaluation": _evaluation(config)}


def _evaluation(config: RunConfig) -> dict[str, Any]:
    return config.evaluation.model_dump(mode="json")
