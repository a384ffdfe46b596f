"""The result of a run: losses, folder, model, and where to see it in Prefect and MLflow.

Imports neither Prefect nor MLflow, so that a finished run is reported within a second.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.runtime.environment import EMBEDDED_API, prefect_home
from gpt.artifacts import Artifact, CheckpointRef, EvaluationReport
from gpt.config.loading import load_config
from gpt.config.schema import RunConfig
from gpt.data.tokenize.pipeline import find_dataset
from gpt.evaluation.report_store import load_report
from gpt.markdown import quote_samples, render_table
from gpt.model.section import MODEL_FILE
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.run_dir import find_run_dir
from tasks.tracking.journal import (
    RegisteredVersion,
    count_unsent_lines,
    find_registered_version,
    read_sync_state,
)


class Outcome(Artifact):
    name: str
    folder: Path
    checkpoint: CheckpointRef
    report: EvaluationReport
    mlflow_run_id: str | None
    registered: RegisteredVersion | None = None
    """None if the config names no registered model, or MLflow was unreachable."""
    links: tuple[str, str]
    """See `locate_links`."""

    @property
    def model(self) -> Path:
        return (self.checkpoint.folder / MODEL_FILE).resolve()

    def __str__(self) -> str:
        report = self.report
        return (
            f"validation loss {report.loss:.4f}, {report.bits_per_byte:.4f} bits per byte "
            f"after {report.step:,} steps, {self.checkpoint.tokens_seen:,} tokens"
        )


def find_finished_outcome(path: str, overrides: Mapping[str, Any]) -> Outcome | None:
    """Return the result of a run that is trained, evaluated and fully in MLflow, else None.

    Raises `ConfigError` for an invalid config, and what `find_dataset` raises.
    """
    config = load_config(path, overrides)
    dataset = find_dataset(config)
    folder = dataset and find_run_dir(config, dataset)
    checkpoint = folder and latest_checkpoint(folder)
    if not (folder and checkpoint and checkpoint.finished):
        return None
    report, sync = load_report(folder, config, checkpoint.step), read_sync_state(folder)
    if report is None or sync is None or sync.status != "FINISHED":
        return None
    name = config.tracking.registered_model
    registered = find_registered_version(sync, name, checkpoint.step)
    if (name and not registered) or count_unsent_lines(folder, sync):
        return None
    return Outcome(
        name=config.run.name,
        folder=folder.resolve(),
        checkpoint=checkpoint,
        report=report,
        mlflow_run_id=sync.run_id,
        registered=registered,
        links=locate_links(config, folder, sync.uri),
    )


def render_outcome(outcome: Outcome) -> str:
    """Return the result as a Markdown page."""
    report = outcome.report
    rows = {
        "validation loss": f"{report.loss:.4f} nats per token, over {report.tokens:,} tokens",
        "perplexity": f"{report.perplexity:,.2f}",
        "bits per byte": f"{report.bits_per_byte:.4f}",
        "trained": f"{report.step:,} steps, {outcome.checkpoint.tokens_seen:,} tokens",
        "run folder": f"`{outcome.folder}`",
        "model": f"`{outcome.model}`",
        "MLflow run": f"`{outcome.mlflow_run_id or 'not created yet: MLflow was unreachable'}`",
        "registered": str(outcome.registered or "no"),
    }
    return (
        f"# {outcome.name}\n\n{render_table(rows.items())}\n\n"
        f"{render_links(outcome.links)}\n## Samples\n\n{quote_samples(report.samples)}\n"
    )


def render_links(links: tuple[str, str]) -> str:
    """Return the Markdown section that says where to see a result."""
    return "## Open in Prefect and MLflow\n\n```sh\n{}\n{}\n```\n".format(*links)


def locate_links(config: RunConfig, folder: Path, uri: str) -> tuple[str, str]:
    """Return the addresses of Prefect's UI and of the charts of the folder's experiment in MLflow
    at `uri`; where there is no server, the command that starts one."""
    prefect = os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    if not prefect or EMBEDDED_API in os.environ:
        home = os.environ.get("PREFECT_HOME", str(prefect_home(config.run.root)))
        settings = f"PREFECT_HOME={shlex.quote(home)} PREFECT_SERVER_ANALYTICS_ENABLED=false"
        prefect = f"{settings} {_program('prefect')} server start"
    page, sync = "", read_sync_state(folder)
    if sync and sync.experiment_id:
        charts = "compareRunsMode=CHART&workflowType=machine_learning"
        page = f"/#/experiments/{sync.experiment_id}/runs?{charts}"
    if uri.startswith("http"):
        return prefect, f"{uri}{page}"
    # Job workers only serve prompts and traces; without them it starts in half the time.
    settings = "DO_NOT_TRACK=1 MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false"
    command = f"{settings} {_program('mlflow')} ui --backend-store-uri {shlex.quote(uri)}"
    return prefect, f"{command}  # http://127.0.0.1:5000{page}"


def _program(name: str) -> str:
    """Return the name of this environment's program, or its path if the shell finds another."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    return name if found and Path(found) == own else shlex.quote(str(own))
