"""The main flow: validate -> tokenize -> train -> evaluate -> register, each a Prefect task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from flows.runtime.flow_run import STATE_HOOKS, call_task, cancelled_on_signal
from flows.runtime.outcome import Outcome, locate_links, render_outcome
from gpt.artifacts import CheckpointRef, DatasetManifest
from gpt.config.loading import read_run_section
from gpt.config.schema import RunConfig
from gpt.training.checkpoint.retention import latest_checkpoint
from gpt.training.run_dir import open_run_dir
from gpt.training.run_lock import run_lock
from tasks.evaluate import evaluate
from tasks.register_model import register_model
from tasks.runtime.prefect_api import publish_markdown
from tasks.runtime.signals import StopRequested
from tasks.tokenize_parquet import tokenize_parquet
from tasks.tracking.runs import RunRef, open_run, track_run_status
from tasks.train import train
from tasks.validate_config import validate_config


def run_name_from_config() -> str:
    """Return the config's `run.name`, or the file's name if it cannot be read."""
    parameters = flow_run.get_parameters()
    path, overrides = parameters["config"], parameters.get("overrides") or {}
    return str(read_run_section(path, overrides).get("name") or Path(path).stem)


@flow(name="pretrain", flow_run_name=run_name_from_config, **STATE_HOOKS)
@cancelled_on_signal
def pretrain(
    config: str,
    overrides: dict[str, Any] | None = None,
    fresh: bool = False,
    parent: str | None = None,
) -> Outcome:
    """Pretrain a GPT from Parquet to an evaluated, registered model.

    A stop signal writes a checkpoint and ends the run as Cancelled.

    Args:
        config: Path of a TOML config.
        overrides: Values that override the config's, e.g. {"training": {"max_steps": 20}}.
        fresh: Start a new run folder instead of resuming.
        parent: Folder of the comparison that this run is part of.
    """
    checked = call_task(validate_config)(config, overrides or {})
    dataset = call_task(tokenize_parquet)(checked)
    folder = open_run_dir(checked, dataset, fresh=fresh)
    return train_and_register(checked, dataset, folder, parent=Path(parent) if parent else None)


def train_and_register(
    config: RunConfig,
    dataset: DatasetManifest,
    folder: Path,
    parent: Path | None = None,
    trial: str = "",
    before_registration: Callable[[CheckpointRef, RunRef], None] = lambda *_: None,
) -> Outcome:
    """Train, evaluate and register the run of `folder`.

    Args:
        parent: Folder of the comparison that this run is part of.
        trial: Identifies what a retraining tries; stored with the model version.
        before_registration: Called after the evaluation.
    """
    try:
        with run_lock(folder):
            run = open_run(config, dataset, folder, parent, trial)
            with track_run_status(run):
                checkpoint = call_task(train)(config, dataset, run)
                report = call_task(evaluate)(config, dataset, checkpoint, run)
                before_registration(checkpoint, run)
                registered = call_task(register_model)(config, run)
    except StopRequested as stop:
        last = latest_checkpoint(folder)
        stop.after_step = last.step if last else 0
        raise
    outcome = Outcome(
        name=config.run.name,
        folder=folder.resolve(),
        checkpoint=checkpoint,
        report=report,
        mlflow_run_id=run.run_id,
        registered=registered,
        links=locate_links(config, folder, run.uri),
    )
    summary = f"Validation loss {report.loss:.4f} after {report.step} steps"
    publish_markdown(f"result-{outcome.name}", render_outcome(outcome), summary)
    return outcome
