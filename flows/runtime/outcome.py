"""What a run reached, where it lies, and how to look at it. Without Prefect and MLflow, so that a
finished run is told of in a second."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

from flows.runtime.environment import EMBEDDED_API, prefect_home
from gpt.artifacts import Artifact, CheckpointRef, EvaluationReport
from gpt.config.loading import load_config
from gpt.config.schema import RunConfig
from gpt.data.tokenize.pipeline import find_dataset
from gpt.evaluation.report_store import load_report
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.run_dir import find_run_dir
from tasks.tracking.journal import (
    RegisteredVersion,
    SyncState,
    count_unsent_lines,
    find_registered_version,
    read_sync_state,
)


class Outcome(Artifact):
    name: str
    report: EvaluationReport
    tokens_seen: int
    folder: Path
    model: Path
    mlflow_uri: str
    mlflow_run_id: str | None
    registered: RegisteredVersion | None = None
    """None where no registered model is named, or where MLflow has not answered."""
    prefect_ui: str
    """Shows Prefect's pages on this run: a command, or an address where a server runs."""
    mlflow_ui: str
    """The same for MLflow."""

    def __str__(self) -> str:
        report = self.report
        return (
            f"validation loss {report.loss:.4f}, {report.bits_per_byte:.4f} bits per byte "
            f"after {report.step:,} steps, {self.tokens_seen:,} tokens"
        )


def build_outcome(
    config: RunConfig,
    folder: Path,
    checkpoint: CheckpointRef,
    report: EvaluationReport,
    mlflow_uri: str,
    mlflow_run_id: str | None,
    registered: RegisteredVersion | None,
) -> Outcome:
    return Outcome(
        name=config.run.name,
        report=report,
        tokens_seen=checkpoint.tokens_seen,
        folder=folder.resolve(),
        model=(checkpoint.folder / "model.safetensors").resolve(),
        mlflow_uri=mlflow_uri,
        mlflow_run_id=mlflow_run_id,
        registered=registered,
        prefect_ui=prefect_ui(config),
        mlflow_ui=mlflow_ui(mlflow_uri, folder),
    )


def find_finished_outcome(path: str, overrides: Mapping[str, Any]) -> Outcome | None:
    """Of a run that is finished, evaluated and told to MLflow; None where something is left to do.

    Raises `ConfigError` for a config that cannot work, and what `find_dataset` raises.
    """
    config = load_config(path, overrides)
    dataset = find_dataset(config)
    folder = dataset and find_run_dir(config, dataset)
    checkpoint = folder and latest_checkpoint(folder)
    if not (folder and checkpoint and checkpoint.finished):
        return None
    report, receipt = load_report(folder, config, checkpoint.step), read_sync_state(folder)
    if report is None or receipt is None or not _all_is_told(folder, receipt):
        return None
    name = config.tracking.registered_model
    registered = find_registered_version(receipt, name, checkpoint.step)
    if name and not registered:
        return None
    return build_outcome(
        config, folder, checkpoint, report, receipt.uri, receipt.run_id, registered
    )


def _all_is_told(folder: Path, receipt: SyncState) -> bool:
    return receipt.status == "FINISHED" and not count_unsent_lines(folder, receipt)


def render_outcome(outcome: Outcome) -> str:
    """The run's result as Markdown."""
    report = outcome.report
    rows = {
        "validation loss": f"{report.loss:.4f} nats a token, over {report.tokens:,} tokens",
        "perplexity": f"{report.perplexity:,.2f}",
        "bits per byte": f"{report.bits_per_byte:.4f}",
        "trained": f"{report.step:,} steps, {outcome.tokens_seen:,} tokens",
        "run folder": f"`{outcome.folder}`",
        "model": f"`{outcome.model}`",
        "MLflow run": f"`{outcome.mlflow_run_id or 'not made yet: MLflow was away'}`",
        "registered": str(outcome.registered or "no"),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    samples = "\n\n".join(
        f"**{sample.prompt}**\n\n{indent(sample.text, ' ' * 4, lambda _: True)}"
        for sample in report.samples
    )
    return (
        f"# {outcome.name}\n\n| | |\n|---|---|\n{table}\n\n"
        f"## Look at it\n\n```sh\n{outcome.prefect_ui}\n{outcome.mlflow_ui}\n```\n\n"
        f"## What it writes\n\n{samples}\n"
    )


def prefect_ui(config: RunConfig) -> str:
    api = os.environ.get("PREFECT_API_URL", "")
    if api and EMBEDDED_API not in os.environ:
        return api.removesuffix("/api")
    home = os.environ.get("PREFECT_HOME", str(prefect_home(config.run.root)))
    settings = f"PREFECT_HOME={shlex.quote(home)} PREFECT_SERVER_ANALYTICS_ENABLED=false"
    return f"{settings} {_program('prefect')} server start"


def mlflow_ui(uri: str, folder: Path) -> str:
    """The page with the curves of the experiment that the run of `folder` is in."""
    receipt = read_sync_state(folder)
    page = _CURVES.format(receipt.experiment_id) if receipt and receipt.experiment_id else ""
    if uri.startswith("http"):
        return f"{uri}{page}"
    # Without the workers for jobs that only prompts and traces need, it starts in half the time.
    settings = "DO_NOT_TRACK=1 MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
    command = f"{settings} {_program('mlflow')} ui --backend-store-uri {shlex.quote(uri)}"
    return f"{command}  # http://127.0.0.1:5000{page}"


_CURVES = "/#/experiments/{}/runs?compareRunsMode=CHART&workflowType=machine_learning"


def _program(name: str) -> str:
    """How this environment's program is called from anywhere: by name where the shell finds it."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    return name if found and Path(found) == own else shlex.quote(str(own))
