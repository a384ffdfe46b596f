"""The main flow: validate -> tokenize -> train -> evaluate -> register, each a Prefect task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import State, flow
from prefect.runtime import flow_run

from flows.runtime.outcome import Outcome, build_outcome, render_outcome
from flows.runtime.stages import (
    STATE_HOOKS,
    Call,
    as_function,
    as_task,
    cancelled_on_signal,
    run_flow,
)
from gpt.artifacts import CheckpointRef, DatasetManifest
from gpt.config.loading import merge_overrides, read_toml
from gpt.config.schema import RunConfig
from gpt.errors import GPTError
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
    """The run's name; the config file's where that cannot be read, which the flow will say."""
    parameters = flow_run.get_parameters()
    path = Path(parameters["config"])
    try:
        raw = merge_overrides(read_toml(path), parameters["overrides"] or {})
        return str(raw["run"]["name"])
    except (GPTError, KeyError, TypeError):
        return path.stem


@flow(name="pretrain", flow_run_name=run_name_from_config, **STATE_HOOKS)
def pretrain(
    config: str,
    overrides: dict[str, Any] | None = None,
    fresh: bool = False,
    parent: str | None = None,
) -> Outcome | State:
    """Pretrain a GPT from Parquet to an evaluated, registered model.

    A signal that stops it makes it Cancelled.

    Args:
        config: Path of a TOML config.
        overrides: Values laid over the config, key by key: {"training": {"max_steps": 20}}.
        fresh: Begin a new run folder even where this run can be gone on with.
        parent: Folder of a comparison that this run is part of.
    """
    return run_flow(lambda: _stages(config, overrides or {}, fresh, parent, as_task))


def pretrain_without_prefect(
    config: str, overrides: dict[str, Any], fresh: bool, parent: str | None = None
) -> Outcome | State:
    """The same stages, told to nobody."""
    return cancelled_on_signal(lambda: _stages(config, overrides, fresh, parent, as_function))


def _stages(
    config: str, overrides: dict[str, Any], fresh: bool, parent: str | None, call: Call
) -> Outcome:
    checked = call(validate_config)(config, overrides)
    dataset = call(tokenize_parquet)(checked)
    folder = open_run_dir(checked, dataset, fresh=fresh)
    return train_and_register(
        checked, dataset, folder, call, parent=Path(parent) if parent else None
    )


def train_and_register(
    config: RunConfig,
    dataset: DatasetManifest,
    folder: Path,
    call: Call,
    parent: Path | None = None,
    trial: str = "",
    before_registration: Callable[[CheckpointRef, RunRef], None] = lambda *_: None,
) -> Outcome:
    """The stages from training on, in a run's folder. `trial` names what is tried, for
    the version; `before_registration` is done between the evaluation and the registration."""
    with run_lock(folder), _standing_told(folder):
        run = open_run(config, dataset, folder, parent, trial)
        with track_run_status(run):
            checkpoint = call(train)(config, dataset, run)
            report = call(evaluate)(config, dataset, checkpoint, run)
            before_registration(checkpoint, run)
            registered = call(register_model)(config, run)
    outcome = build_outcome(config, folder, checkpoint, report, run.uri, run.run_id, registered)
    reached = f"Validation loss {report.loss:.4f} after {report.step} steps"
    publish_markdown(f"result-{outcome.name}", render_outcome(outcome), reached)
    return outcome


@contextmanager
def _standing_told(folder: Path) -> Iterator[None]:
    """A stop says from which step the run can go on."""
    try:
        yield
    except StopRequested as stop:
        checkpoint = latest_checkpoint(folder)
        stop.after_step = checkpoint.step if checkpoint else 0
        raise
