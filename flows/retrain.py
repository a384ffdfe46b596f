"""The retraining flow: train a challenger on new data, promote it if it beats the champion."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.pretrain import run_name_from_config, train_and_register
from flows.runtime.flow_run import STATE_HOOKS, call_task, cancelled_on_signal
from flows.runtime.outcome import locate_mlflow_ui, locate_prefect_ui
from flows.runtime.retrain_report import RetrainResult, TokenCounts, render_result
from gpt.artifacts import CheckpointRef, DatasetManifest
from gpt.config.loading import load_config
from gpt.data.continued import DERIVED_DATASETS, build_new_validation_set, group_units_by_file
from gpt.data.tokenize.units import read_stored_units, read_unit_keys
from gpt.training.run_dir import open_run_dir
from tasks.display import log_info
from tasks.evaluate import SliceReports, evaluate_slices
from tasks.retrain_data import (
    RetrainPlan,
    StartFrom,
    comparison_caveats,
    continue_data,
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
@cancelled_on_signal
def retrain(
    config: str,
    overrides: dict[str, Any] | None = None,
    path: str | None = None,
    start: StartFrom = "scratch",
) -> RetrainResult:
    """Train a challenger if the source holds data that is new to the champion; promote the
    challenger if it is better.

    Running it again resumes an interrupted retraining and does nothing once it is finished.

    Args:
        config: Path of a TOML config.
        overrides: Values that override the config's, e.g. {"training": {"max_steps": 20}}.
        path: A new Parquet file, added to data.source if that does not cover it.
        start: scratch: train the config from random weights on all data. champion: continue from
            the champion's weights on the new tokens and a share of the old ones, for at most the
            training.max_steps of `overrides`.
    """
    overrides = overrides or {}
    checked = call_task(validate_config)(config, overrides)
    plan = call_task(find_changes)(checked, path, start)
    if plan.is_up_to_date:
        return _publish(_up_to_date_result(plan, plan.reason))
    planned, known_units = plan.config, read_unit_keys(plan.config.run.root / "datasets")
    dataset = call_task(tokenize_parquet)(planned)
    if reason := _why_nothing_to_train_on(plan, dataset):
        log_info(reason)
        return _publish(_up_to_date_result(plan, reason))
    tokens = _count_tokens(dataset, known_units)
    new_text = build_new_validation_set(
        dataset, plan.changes.known, planned.run.root / DERIVED_DATASETS
    )
    if plan.champion and start == "champion":
        max_steps = overrides.get("training", {}).get("max_steps")
        planned, dataset = call_task(continue_data)(planned, dataset, plan.changes, max_steps)
    slices: list[SliceReports] = []

    def compare_with_champion(checkpoint: CheckpointRef, run: RunRef) -> None:
        if plan.champion and plan.model:
            compared = (dataset, new_text, checkpoint, run, plan.champion, plan.model)
            slices.append(call_task(evaluate_slices)(planned, *compared))

    outcome = train_and_register(
        planned,
        dataset,
        open_run_dir(planned, dataset),
        trial=plan.trial,
        before_registration=compare_with_champion,
    )
    return _publish(
        RetrainResult(
            name=planned.run.name,
            reason=plan.reason,
            notes=tuple(comparison_caveats(plan)),
            start=str(plan.champion or "scratch") if start == "champion" else "scratch",
            text=tokens,
            champion=str(plan.champion or ""),
            outcome=outcome,
            slices=slices[0] if slices else None,
            prefect_ui=outcome.prefect_ui,
            mlflow_ui=outcome.mlflow_ui,
        )
    )


def check_up_to_date(
    config: str, overrides: dict[str, Any], path: str | None, start: StartFrom
) -> RetrainResult | None:
    """Return the flow's result if there is nothing to do, else None. Starts and writes nothing.

    Raises what the flow raises.
    """
    plan = plan_retraining(load_config(config, overrides), path, start)
    return _up_to_date_result(plan, plan.reason) if plan.is_up_to_date else None


def _up_to_date_result(plan: RetrainPlan, reason: str) -> RetrainResult:
    root = plan.config.run.root
    return RetrainResult(
        name=plan.config.run.name,
        reason=reason,
        champion=str(plan.champion or ""),
        prefect_ui=locate_prefect_ui(plan.config),
        mlflow_ui=locate_mlflow_ui(resolve_tracking_uri(plan.config), root),
    )


def _why_nothing_to_train_on(plan: RetrainPlan, dataset: DatasetManifest) -> str:
    """Return why the new files add nothing to train on; empty if they do. Their documents may all
    be filtered out, held out for validation or cut off by data.max_tokens."""
    if not plan.champion or plan.changes.settings or not plan.changes.known:
        return ""
    known = set(plan.changes.known)
    new = (units for file, units in group_units_by_file(dataset) if file.sha256 not in known)
    if any(unit.entry.counts.splits["train"].tokens for units in new for unit in units):
        return ""
    return f"unchanged: no document for training is in {format_names(plan.changes.new)}"


def _count_tokens(dataset: DatasetManifest, known_units: set[str]) -> TokenCounts:
    """Count the dataset's tokens by whether earlier datasets had them."""
    counts = {True: 0, False: 0}
    for unit in read_stored_units(dataset.folder):
        counts[unit.entry.key in known_units] += unit.entry.counts.tokens
    return TokenCounts(tokenized=counts[False], reused=counts[True])


def _publish(result: RetrainResult) -> RetrainResult:
    publish_markdown(f"retraining-{result.name}", render_result(result), result.reason)
    return result
