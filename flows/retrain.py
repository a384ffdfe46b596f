"""New data in, a challenger trained, the champion kept unless beaten."""

from __future__ import annotations

from typing import Any

from prefect import State, flow

from flows.pretrain import run_name_asked, trained
from flows.runtime.outcome import look_mlflow, look_prefect
from flows.runtime.retrain_report import Retrained, Text, page
from flows.runtime.stages import TOLD, Call, as_function, as_task, stopped_or, told
from gpt.artifacts import CheckpointRef, DatasetManifest
from gpt.config.loading import load_config
from gpt.data.continued import DERIVED, new_validation_text, units_by_file
from gpt.data.tokenize.units import keys_below
from gpt.training.run_dir import open_run_folder
from tasks.continue_data import continue_data
from tasks.display import tell
from tasks.evaluate_slices import Slices, evaluate_slices
from tasks.find_changes import Look, Start, find_changes_since, listed, look, notes
from tasks.runtime.prefect_api import show_page
from tasks.tokenize_parquet import tokenize_parquet
from tasks.tracking.metadata import tracking_uri
from tasks.tracking.runs import RunRef
from tasks.validate_config import validate_config


@flow(name="retrain", flow_run_name=run_name_asked, **TOLD)
def retrain(
    config: str,
    overrides: dict[str, Any] | None = None,
    path: str | None = None,
    start: Start = "scratch",
) -> Retrained | State:
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
    return told(lambda: _stages(config, overrides or {}, path, start, as_task))


def retrain_without_prefect(
    config: str, overrides: dict[str, Any], path: str | None = None, start: Start = "scratch"
) -> Retrained | State:
    """The same stages, told to nobody."""
    return stopped_or(lambda: _stages(config, overrides, path, start, as_function))


def nothing_to_do(
    config: str, overrides: dict[str, Any], path: str | None, start: Start
) -> Retrained | None:
    """What the flow would say of a source with nothing new, without starting anything; None where
    there is something to do. Raises as the flow does."""
    found = look(load_config(config, overrides), path, start)
    return _ended(found, found.reason) if found.ends else None


def _stages(
    config: str, overrides: dict[str, Any], path: str | None, start: Start, call: Call
) -> Retrained:
    checked = call(validate_config)(config, overrides)
    found: Look = call(find_changes_since)(checked, path, start)
    if found.ends:
        return _shown(_ended(found, found.reason))
    asked, before = found.config, keys_below(found.config.run.root / "datasets")
    dataset: DatasetManifest = call(tokenize_parquet)(asked)
    if reason := _only_known_text(found, dataset):
        tell(reason)
        return _shown(_ended(found, reason))
    text = _text(dataset, before)
    new = new_validation_text(dataset, found.changes.known, asked.run.root / DERIVED)
    begins = found.champion if start == "champion" else None
    if begins:
        most = overrides.get("training", {}).get("max_steps")
        asked, dataset = call(continue_data)(asked, dataset, found.changes, most)
    slices: list[Slices] = []

    def held_against(checkpoint: CheckpointRef, run: RunRef) -> None:
        if found.champion and found.model:
            evaluating = call(evaluate_slices)
            held = (dataset, new, checkpoint, run, found.champion, found.model)
            slices.append(evaluating(asked, *held))

    outcome = trained(
        asked,
        dataset,
        open_run_folder(asked, dataset),
        call,
        trial=found.trial,
        before_judgement=held_against,
    )
    return _shown(
        Retrained(
            name=asked.run.name,
            reason=found.reason,
            notes=tuple(notes(found)),
            start=str(begins or "scratch"),
            text=text,
            champion=str(found.champion or ""),
            outcome=outcome,
            slices=slices[0] if slices else None,
            look_prefect=outcome.look_prefect,
            look_mlflow=outcome.look_mlflow,
        )
    )


def _ended(found: Look, reason: str) -> Retrained:
    root = found.config.run.root
    return Retrained(
        name=found.config.run.name,
        reason=reason,
        champion=str(found.champion or ""),
        look_prefect=look_prefect(found.config),
        look_mlflow=look_mlflow(tracking_uri(found.config), root),
    )


def _only_known_text(found: Look, dataset: DatasetManifest) -> str:
    """Why there is nothing to train on after all; empty where there is. Documents that are left out
    or kept for validation, or that data.max_tokens cuts off, teach nothing."""
    if not found.champion or found.changes.settings or not found.changes.known:
        return ""
    known = set(found.changes.known)
    new = (units for file, units in units_by_file(dataset) if file.sha256 not in known)
    if any(unit.entry.tally.sides["train"].tokens for units in new for unit in units):
        return ""
    return f"unchanged: no document for training is in {listed(found.changes.new)}"


def _text(dataset: DatasetManifest, before: set[str]) -> Text:
    """Which tokens were there before this data set was made."""
    counts = {True: 0, False: 0}
    for _, units in units_by_file(dataset):
        for unit in units:
            counts[unit.entry.key in before] += unit.entry.tally.tokens
    return Text(tokenised=counts[False], reused=counts[True])


def _shown(done: Retrained) -> Retrained:
    show_page(f"retraining-{done.name}", page(done), done.reason)
    return done
