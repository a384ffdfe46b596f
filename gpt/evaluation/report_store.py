"""Reports stored in run folders, each with a key that says what it was made for.

A report is reused only if its key matches, so that a changed `[evaluation]` is evaluated again.
Does not import torch.
"""

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
    return read_report_file(folder / REPORT_FILE, step=step, evaluation=evaluation_values(config))


def save_report(folder: Path, config: RunConfig, report: EvaluationReport) -> None:
    """Save the report on the checkpoint of `report.step`."""
    key = {"step": report.step, "evaluation": evaluation_values(config)}
    write_report_file(folder / REPORT_FILE, report, **key)


def read_report_file(path: Path, **key: Any) -> EvaluationReport | None:
    """Read the report in a file; None if it cannot be read or its key has other values."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(path.read_bytes())
        if key.items() <= stored["asked"].items():
            return EvaluationReport(**stored["report"])
    return None


def write_report_file(path: Path, report: EvaluationReport, **key: Any) -> None:
    values = {"asked": key, "report": report.model_dump(mode="json")}
    write_text(path, json.dumps(values, indent=2) + "\n")


def evaluation_values(config: RunConfig) -> dict[str, Any]:
    """Return the part of a key that says how the model is evaluated."""
    return config.evaluation.model_dump(mode="json")
