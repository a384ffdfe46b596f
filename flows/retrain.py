"""The flow `retrain`: train a challenger on new data, promote it if it beats the champion."""

from typing import Any

from prefect import flow

from flows.pretrain import run_name_from_config, train_and_register
from flows.runtime.flow_run import STATE_HOOKS, call_task, cancelled_on_signal
from flows.runtime.outcome import Outcome, locate_links, render_links
from gpt.artifacts import Artifact, CheckpointRef, DatasetManifest, EvaluationReport
from gpt.config.loading import load_config
from gpt.data.continued import DERIVED_DATASETS, build_new_validation_set, group_units_by_file
from gpt.data.tokenize.units import read_stored_units, read_unit_keys
from gpt.evaluation.significance import compare_reports
from gpt.markdown import render_table
from gpt.training.run_dir import open_run_dir
from tasks.display import log_info
from tasks.evaluate import ReportPair, SliceReports, evaluate_slices
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


class RetrainResult(Artifact):
    """What a retraining did; `outcome` is None if there was nothing to do."""

    name: str
    reason: str
    """Why there was something to do, or why not."""
    notes: tuple[str, ...] = ()
    start: str = ""
    tokenized_tokens: int = 0
    """Tokens of the dataset that were tokenized for this retraining."""
    reused_tokens: int = 0
    """Tokens of the dataset from earlier ones."""
    champion: str = ""
    """The champion before this retraining; empty if there was none."""
    outcome: Outcome | None = None
    slices: SliceReports | None = None
    links: tuple[str, str]
    """See `locate_links`."""

    def __str__(self) -> str:
        return "; ".join(f"{name}: {text}" for name, text in self.lines)

    @property
    def lines(self) -> list[tuple[str, str]]:
        """The report as pairs of heading and text."""
        lines = [("source", self.reason), *(("note", note) for note in self.notes)]
        if (outcome := self.outcome) is None:
            return lines
        counts = f"{self.tokenized_tokens:,} tokenized, {self.reused_tokens:,} reused"
        length = f"{outcome.report.step:,} steps, {outcome.checkpoint.tokens_seen:,} tokens"
        return [
            *lines,
            ("tokens", counts),
            ("challenger", f"trained from {self.start}: {length}"),
            *_slice_lines(outcome.report, self.slices, self.champion),
            ("verdict", str(outcome.registered or "not yet: MLflow was unreachable")),
            ("run", str(outcome.folder)),
        ]


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
    units = [unit.entry for unit in read_stored_units(dataset.folder)]
    reused = sum(unit.counts.tokens for unit in units if unit.key in known_units)
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

    folder = open_run_dir(planned, dataset)
    outcome = train_and_register(
        planned, dataset, folder, trial=plan.trial, before_registration=compare_with_champion
    )
    return _publish(
        RetrainResult(
            name=planned.run.name,
            reason=plan.reason,
            notes=tuple(comparison_caveats(plan)),
            start=str(plan.champion or "scratch") if start == "champion" else "scratch",
            tokenized_tokens=sum(unit.counts.tokens for unit in units) - reused,
            reused_tokens=reused,
            champion=str(plan.champion or ""),
            outcome=outcome,
            slices=slices[0] if slices else None,
            links=outcome.links,
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
    config = plan.config
    links = locate_links(config, config.run.root, resolve_tracking_uri(config))
    champion = str(plan.champion or "")
    return RetrainResult(name=config.run.name, reason=reason, champion=champion, links=links)


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


def _publish(result: RetrainResult) -> RetrainResult:
    table, links = render_table(result.lines), render_links(result.links)
    page = f"# Retraining of {result.name}\n\n{table}\n\n{links}"
    publish_markdown(f"retraining-{result.name}", page, result.reason)
    return result


def _slice_lines(
    report: EvaluationReport, slices: SliceReports | None, champion: str
) -> list[tuple[str, str]]:
    count = f"loss over {report.tokens:,} tokens"
    if slices is None:
        return [("current slice", f"challenger {report.loss:.4f} ({count})")]
    lines = [("current slice", f"{_losses(slices.current, champion)} ({count})")]
    for name, pair, better, worse in (
        ("old slice", slices.old, "better on it too", "the challenger has forgotten some of it"),
        ("new text", slices.new, "the challenger has learned it", "worse on it too"),
    ):
        if pair is None:
            continue
        verdict = "not compared: their block sizes divide the slice differently"
        if pair.challenger.slice_fingerprint == pair.champion.slice_fingerprint:
            found = compare_reports(pair.challenger, pair.champion)
            verdict = better if found.is_significantly_better else worse
            verdict = verdict if found.is_significant else "no significant difference"
            verdict += f" ({found.interval})"
        lines.append((name, f"{_losses(pair, champion)}: {verdict}"))
    if slices.old and slices.old.challenger.slice_fingerprint == report.slice_fingerprint:
        same = (
            "the current slice equals the old one: new text comes after the first "
            f"{report.tokens:,} validation tokens; raise evaluation.tokens to include it"
        )
        lines.append(("note", same))
    return lines


def _losses(pair: ReportPair, champion: str) -> str:
    return f"challenger {pair.challenger.loss:.4f}, {champion} {pair.champion.loss:.4f}"
