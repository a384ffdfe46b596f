"""New data in, a challenger trained, the champion kept unless beaten."""

from __future__ import annotations

from typing import Any

from prefect import State, flow

from flows.pretrain import run_name_from_config, train_and_register
from flows.runtime.outcome import mlflow_ui, prefect_ui
from flows.runtime.retrain_report import RetrainResult, TokenCounts, page
from flows.runtime.stages import (
    STATE_HOOKS,
    Call,
    as_function,
    as_task,
    cancelled_on_signal,
    run_flow,
)
from gpt.artifacts import CheckpointRef, DatasetManifest
from gpt.config.loading import load_config
from gpt.data.continued import DERIVED_DATASETS, build_new_validation_set, group_units_by_file
from gpt.data.tokenize.units import read_unit_keys
from gpt.training.run_dir import open_run_dir
from tasks.continue_data import continue_data
from tasks.display import log_info
from tasks.evaluate_slices import SliceReports, evaluate_slices
from tasks.find_changes import (
    RetrainPlan,
    StartFrom,
    comparison_caveats,
    find_changes,
    format_names,
    plan_retraining,
)
from tasks.runtime.prefect_api import publish_markdown
from tasks.tokenize_parquet import tokenize_parquet
from tasks.tracking.metadata import resolve_tracking_uri
from tasks.tracking.runs import RunRef
from tasks.validate_config import validate_config


@flow(name="retrain", flow_run_name=run_name_from_config, **STATE_HOOKS)
def retrain(
    config: str,
    overrides: dict[str, Any] | None = None,
    path: str | None = None,
    start: StartFrom = "scratch",
) -> RetrainResult | State:
    """Train a challenger on what the source holds now, if the champion does not know all of it, and
    promote it where it is better.

    The same again goes on where it was stopped, and does nothing where all is done.

    Args:
        config: Path of a TOML config.
        overrides: Values laid over the config, key by key: {"training": {"max_steps": 20}}.
        path: A Parquet file that has come, added to data.source where that does not cover it.
        start: scratch: the config as it is, on all data. champion: on from the champion's weights,
            over the new tokens and a share of the old; a max_steps in `overrides` is the most then.
    """
    return run_flow(lambda: _stages(config, overrides or {}, path, start, as_task))


def retrain_without_prefect(
    config: str, overrides: dict[str, Any], path: str | None = None, start: StartFrom = "scratch"
) -> RetrainResult | State:
    """The same stages, told to nobody."""
    return cancelled_on_signal(lambda: _stages(config, overrides, path, start, as_function))


def check_up_to_date(
    config: str, overrides: dict[str, Any], path: str | None, start: StartFrom
) -> RetrainResult | None:
    """What the flow would say of a source with nothing new, without starting anything; None where
    there is something to do. Raises as the flow does."""
    found = plan_retraining(load_config(config, overrides), path, start)
    return _ended(found, found.reason) if found.is_up_to_date else None


def _stages(
    config: str, overrides: dict[str, Any], path: str | None, start: StartFrom, call: Call
) -> RetrainResult:
    checked = call(validate_config)(config, overrides)
    found: RetrainPlan = call(find_changes)(checked, path, start)
    if found.is_up_to_date:
        return _shown(_ended(found, found.reason))
    asked, before = found.config, read_unit_keys(found.config.run.root / "datasets")
    dataset: DatasetManifest = call(tokenize_parquet)(asked)
    if reason := _only_known_text(found, dataset):
        log_info(reason)
        return _shown(_ended(found, reason))
    text = _text(dataset, before)
    new = build_new_validation_set(dataset, found.changes.known, asked.run.root / DERIVED_DATASETS)
    begins = found.champion if start == "champion" else None
    if begins:
        most = overrides.get("training", {}).get("max_steps")
        asked, dataset = call(continue_data)(asked, dataset, found.changes, most)
    slices: list[SliceReports] = []

    def held_against(checkpoint: CheckpointRef, run: RunRef) -> None:
        if found.champion and found.model:
            evaluating = call(evaluate_slices)
            held = (dataset, new, checkpoint, run, found.champion, found.model)
            slices.append(evaluating(asked, *held))

    outcome = train_and_register(
        asked,
        dataset,
        open_run_dir(asked, dataset),
        call,
        trial=found.trial,
        before_registration=held_against,
    )
    return _shown(
        RetrainResult(
            name=asked.run.name,
            reason=found.reason,
            notes=tuple(comparison_caveats(found)),
            start=str(begins or "scratch"),
            text=text,
            champion=str(found.champion or ""),
            outcome=outcome,
            slices=slices[0] if slices else None,
            prefect_ui=outcome.prefect_ui,
            mlflow_ui=outcome.mlflow_ui,
        )
    )


def _ended(found: RetrainPlan, reason: str) -> RetrainResult:
    root = found.config.run.root
    return RetrainResult(
        name=found.config.run.name,
        reason=reason,
        champion=str(found.champion or ""),
        prefect_ui=prefect_ui(found.config),
        mlflow_ui=mlflow_ui(resolve_tracking_uri(found.config), root),
    )


def _only_known_text(found: RetrainPlan, dataset: DatasetManifest) -> str:
    """Why there is nothing to train on after all; empty where there is. Documents that are left out
    or kept for validation, or that data.max_tokens cuts off, teach nothing."""
    if not found.champion or found.changes.settings or not found.changes.known:
        return ""
    known = set(found.changes.known)
    new = (units for file, units in group_units_by_file(dataset) if file.sha256 not in known)
    if any(unit.entry.tally.sides["train"].tokens for units in new for unit in units):
        return ""
    return f"unchanged: no document for training is in {format_names(found.changes.new)}"


def _text(dataset: DatasetManifest, before: set[str]) -> TokenCounts:
    """Which tokens were there before this data set was made."""
    counts = {True: 0, False: 0}
    for _, units in group_units_by_file(dataset):
        for unit in units:
            counts[unit.entry.key in before] += unit.entry.tally.tokens
    return TokenCounts(tokenised=counts[False], reused=counts[True])


def _shown(done: RetrainResult) -> RetrainResult:
    publish_markdown(f"retraining-{done.name}", page(done), done.reason)
    return done
