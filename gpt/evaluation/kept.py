"""The report that a run's folder keeps, and for what it was asked. Without torch."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from gpt.artifacts import EvaluationReport
from gpt.config import RunConfig
from gpt.files import write_text

REPORT = "report.json"


def kept_report(folder: Path, config: RunConfig, step: int) -> EvaluationReport | None:
    """The report on the checkpoint of `step`, made with the config's [evaluation]."""
    try:
        kept = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return EvaluationReport(**kept["report"]) if kept["asked"] == _asked(config, step) else None


def read_report(path: Path) -> EvaluationReport | None:
    """The report in such a file, whatever it was asked for; None where none can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return EvaluationReport(**json.loads(path.read_bytes())["report"])
    return None


def keep_report(folder: Path, config: RunConfig, report: EvaluationReport) -> None:
    values = {"asked": _asked(config, report.step), "report": report.model_dump(mode="json")}
    write_text(folder / REPORT, json.dumps(values, indent=2) + "\n")


def _asked(config: RunConfig, step: int) -> dict[str, Any]:
    return {"step": step, "evaluation": config.evaluation.model_dump(mode="json")}
