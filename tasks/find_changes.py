"""The first look of a retraining: who the champion is, and what of the source is new to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import Artifact
from gpt.config.loading import build_config, merge_overrides
from gpt.config.schema import RunConfig, fingerprint
from gpt.data.filters import RowFilter
from gpt.data.parquet import inspect
from gpt.data.source_changes import SourceChanges, find_source_changes
from gpt.data.sources import find_sources
from gpt.errors import ConfigError, CorpusError, Problem
from gpt.preflight.checks import check_init_from
from gpt.training.identity import identity_values
from tasks.display import log_info, log_warning
from tasks.tracking.champion import (
    Champion,
    EarlierTrial,
    fetch_champion,
    find_champion,
    find_earlier_trial,
)
from tasks.tracking.metadata import tracking_uri

MOST_LISTED = 5
"""Files that a line names."""
StartFrom = Literal["scratch", "champion"]
"""With which weights a challenger begins."""


class RetrainPlan(Artifact):
    """What a retraining goes on from."""

    config: RunConfig
    """With the file that it was started for among its sources, and with the champion's weights to
    begin with, where it is to go on from them."""
    champion: Champion | None
    """None: there is none yet."""
    model: Path | None = None
    """The champion's folder, where it will be needed."""
    changes: SourceChanges
    trial: str
    """Names what is to be tried: data, settings and where it begins."""
    tried: EarlierTrial | None = None
    """What came of trying it before."""

    @property
    def is_up_to_date(self) -> bool:
        """Whether there is nothing to do."""
        return self.tried is not None or (self.champion is not None and not self.changes.any)

    @property
    def reason(self) -> str:
        """Why there is something to do, or nothing, in a sentence."""
        if self.champion is None:
            return "there is no champion yet: the first one is trained"
        if not self.changes.any:
            removed = len(self.changes.removed)
            since = f"; {removed} of its files are gone, which is nothing new" if removed else ""
            return f"unchanged: {self.champion} was trained on every file of the source{since}"
        if self.tried:
            became = "became" if self.tried.alias == "champion" else "stayed"
            return (
                f"already tried: {self.champion.name} version {self.tried.version}, of the same "
                f"data and settings, {became} {self.tried.alias}: {self.tried.reason}"
            )
        if not self.champion.dataset:
            return f"changed: what {self.champion} was trained on is not known any more: all is new"
        named = format_names(self.changes.new)
        new = [f"new to {self.champion}: {named}"] if named else []
        return f"changed: {'; '.join([*new, *self.changes.settings])}"


@task(name="find-changes", task_run_name="find-changes", cache_policy=NO_CACHE)
def find_changes(config: RunConfig, path: str | None, start: StartFrom) -> RetrainPlan:
    """`plan_retraining`, told."""
    found = plan_retraining(config, path, start)
    log_info(found.reason)
    for note in notes(found):
        log_warning(note)
    return found


def plan_retraining(config: RunConfig, path: str | None, start: StartFrom) -> RetrainPlan:
    """Hold the source, and the file `path` beside it, against the champion's data set. Writes
    nothing but the hashes of files.

    Raises `ConfigError` for what cannot be retrained, `CorpusError` for files that cannot be used,
    `RegistryError` where MLflow cannot be asked.
    """
    name = config.tracking.registered_model
    if not name:
        rule = "is empty: there is no champion, and nothing that a challenger could become"
        raise ConfigError(
            Problem("tracking.registered_model", "", rule, "name a registered model, as gpt")
        )
    asked = add_source_file(config, path) if path else config
    uri, root = tracking_uri(asked), asked.run.root
    champion = find_champion(name, uri, root)
    if champion:
        _refuse_smaller_validation(asked, champion)
    changes = find_source_changes(asked, champion.dataset if champion else None)
    if champion and not changes.any:
        return RetrainPlan(config=asked, champion=champion, changes=changes, trial="")
    begins = champion if start == "champion" else None
    values = identity_values(asked, changes.fingerprint) | {
        "max_steps": asked.training.max_steps,
        "begins_with": begins.location if begins else "",
    }
    trial = fingerprint(values)
    tried = find_earlier_trial(name, uri, trial)
    model = fetch_champion(champion, uri, root) if champion and not tried else None
    if begins and model:
        asked = _beginning_with(asked, model)
    return RetrainPlan(
        config=asked, champion=champion, model=model, changes=changes, trial=trial, tried=tried
    )


def notes(found: RetrainPlan) -> list[str]:
    """What a person should know of a comparison that will not be quite fair or whole."""
    champion, config = found.champion, found.config
    if champion is None or found.is_up_to_date:
        return []
    said = []
    if champion.dataset and found.changes.removed:
        removed = format_names(found.changes.removed)
        said.append(f"the source does not have any more what {champion} was trained on: {removed}")
    if champion.dataset and not champion.dataset_is_local:
        said.append(f"the data set of {champion} is gone: nothing is told of its old slice")
    before = champion.validation_fraction
    if before is not None and config.data.validation_fraction > before:
        said.append(
            f"data.validation_fraction was {before}: {champion} was trained on some of the "
            "documents that are kept out now, so its loss on the current slice is too good"
        )
    return said


def add_source_file(config: RunConfig, path: str) -> RunConfig:
    """The config with the file at `path` among its sources, where they do not have it already.
    Raises `CorpusError` for one that is not there or is no Parquet with the text column."""
    given = path if "://" in path else str(Path(path).expanduser().absolute())
    data = config.data
    try:
        files = find_sources((given,))
        for file in files:
            inspect(file, RowFilter(data.text_column))
    except CorpusError as error:
        of_path = [replace(p, key="path") if p.key == "data.source" else p for p in error.problems]
        raise CorpusError(*of_path) from error
    covered = {file.key for file in find_sources(data.source)}
    if all(file.key in covered for file in files):
        return config
    return override_config(config, {"data": {"source": [*data.source, given]}})


def format_names(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(names) - MOST_LISTED
    return ", ".join(names[:MOST_LISTED]) + (f" and {more:,} more" if more > 0 else "")


def override_config(config: RunConfig, values: dict[str, dict[str, object]]) -> RunConfig:
    """The config with other values. Raises `ConfigError`."""
    return build_config(merge_overrides(config.model_dump(mode="json"), values))


def _beginning_with(config: RunConfig, model: Path) -> RunConfig:
    begun = override_config(config, {"training": {"init_from": str(model)}})
    if problem := check_init_from(begun):
        rule = f"the champion cannot be gone on from: it {problem.rule}"
        remedy = f'give {problem.remedy}, or start from "scratch"'
        raise ConfigError(Problem("start", "champion", rule, remedy))
    return begun


def _refuse_smaller_validation(config: RunConfig, champion: Champion) -> None:
    """A smaller share would let documents into training that were kept out of it before."""
    fraction, before = config.data.validation_fraction, champion.validation_fraction
    if before is None or fraction >= before:
        return
    rule = (
        f"is less than the {before} of {champion}: documents that were kept for validation then "
        "would be trained on now"
    )
    remedy = f"set it to {before} or more, or begin anew with another tracking.registered_model"
    raise ConfigError(Problem("data.validation_fraction", str(fraction), rule, remedy))
