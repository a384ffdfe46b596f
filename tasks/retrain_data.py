"""Stages of a retraining that choose its data: find-changes (the champion, and what the source has
that is new) and continue-data (the new text with a share of the old)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import Artifact, DatasetManifest
from gpt.config.loading import build_config, merge_overrides
from gpt.config.schema import RunConfig, fingerprint
from gpt.data.continued import DERIVED_DATASETS, build_continued_dataset
from gpt.data.filters import RowFilter
from gpt.data.parquet import inspect_parquet
from gpt.data.sources import find_sources
from gpt.data.tokenize.plan import FILTER_SETTINGS, make_plan
from gpt.errors import ConfigError, CorpusError, Problem
from gpt.preflight.checks import check_init_from
from gpt.schedule import build_continuation_overrides
from gpt.training.run_dir import identity_values
from tasks.display import log_info, log_warning
from tasks.tracking.journal import RegisteredVersion
from tasks.tracking.metadata import resolve_tracking_uri
from tasks.tracking.model_lookup import Champion, fetch_model, find_champion, find_earlier_trial

MAX_NAMES = 5
"""File names in one line."""
StartFrom = Literal["scratch", "champion"]
"""Initial weights of a challenger."""


class SourceChanges(Artifact):
    """What changed in a config's source since a dataset was built.

    Files are compared by the hash of their bytes, so a renamed file is not a change.
    """

    fingerprint: str
    """Fingerprint of the dataset that the source gives now."""
    new: tuple[str, ...]
    """Names of files whose bytes are not in the earlier dataset."""
    removed: tuple[str, ...]
    """Earlier names of files whose bytes are no longer in the source."""
    settings: tuple[str, ...] = ()
    """Changed settings of [data] that select or split documents differently, as sentences."""
    known: tuple[str, ...] = ()
    """SHA-256 of the unchanged files; empty if settings changed."""

    @property
    def any(self) -> bool:
        """Whether there is text that the earlier model was not trained on."""
        return bool(self.new or self.settings)


class RetrainPlan(Artifact):
    """What a retraining starts from."""

    config: RunConfig
    """With the given file among its sources and, for start = "champion", training.init_from set."""
    champion: Champion | None
    """None: there is none yet."""
    model: Path | None = None
    """The champion's folder, if it is needed."""
    changes: SourceChanges
    trial: str
    """Key of data, settings and initial weights."""
    tried: RegisteredVersion | None = None
    """Result of an earlier retraining with the same key."""

    @property
    def is_up_to_date(self) -> bool:
        return self.tried is not None or (self.champion is not None and not self.changes.any)

    @property
    def reason(self) -> str:
        """Why a challenger is trained or not, in one sentence."""
        champion, changes = self.champion, self.changes
        if champion is None:
            return "there is no champion yet: training the first one"
        if not changes.any:
            count = len(changes.removed)
            removed = f"; {count} of its files were removed, which adds nothing" if count else ""
            return f"unchanged: {champion} was trained on every file of the source{removed}"
        if self.tried:
            became = "became" if self.tried.alias == "champion" else "stayed"
            return (
                f"already tried: {champion.name} version {self.tried.version} has the same data "
                f"and settings and {became} {self.tried.alias}: {self.tried.reason}"
            )
        if not champion.dataset:
            return f"changed: the dataset of {champion} is unknown, so all files count as new"
        new = [f"new to {champion}: {format_names(changes.new)}"] if changes.new else []
        return f"changed: {'; '.join([*new, *changes.settings])}"


@task(name="find-changes", task_run_name="find-changes", cache_policy=NO_CACHE)
def find_changes(config: RunConfig, path: str | None, start: StartFrom) -> RetrainPlan:
    """Run `plan_retraining` and log its result."""
    plan = plan_retraining(config, path, start)
    log_info(plan.reason)
    for caveat in comparison_caveats(plan):
        log_warning(caveat)
    return plan


def plan_retraining(config: RunConfig, path: str | None, start: StartFrom) -> RetrainPlan:
    """Compare the source, and the file `path`, with the champion's dataset. Writes nothing but the
    hashes of files.

    Raises `ConfigError` for a config that cannot be retrained, `CorpusError` for unusable files,
    `RegistryError` if MLflow cannot be reached.
    """
    name = config.tracking.registered_model
    if not name:
        rule = "empty, so there is no champion to compare with"
        remedy = 'name a registered model, e.g. "gpt"'
        raise ConfigError(Problem("tracking.registered_model", "", rule, remedy))
    if path:
        config = add_source_file(config, path)
    uri, root = resolve_tracking_uri(config), config.run.root
    champion = find_champion(name, uri, root)
    fraction = config.data.validation_fraction
    before = champion.validation_fraction if champion else None
    if before is not None and fraction < before:
        rule = f"less than the {before} of {champion}, so held-out documents would be trained on"
        remedy = f"use {before} or more, or start over with another tracking.registered_model"
        raise ConfigError(Problem("data.validation_fraction", str(fraction), rule, remedy))
    changes = find_source_changes(config, champion.dataset if champion else None)
    if champion and not changes.any:
        return RetrainPlan(config=config, champion=champion, changes=changes, trial="")
    initial = champion if start == "champion" else None
    # The names of the values are part of the key, by which stores know earlier trials.
    values = identity_values(config, changes.fingerprint) | {
        "max_steps": config.training.max_steps,
        "begins_with": initial.location if initial else "",
    }
    trial = fingerprint(values)
    tried = find_earlier_trial(name, uri, trial)
    model = None
    if champion and not tried:
        model = fetch_model(f"models:/{name}/{champion.version}", uri, root)
    if initial and model:
        config = override_config(config, {"training": {"init_from": str(model)}})
        if problem := check_init_from(config):
            rule = f"the champion cannot be used as initial weights: {problem.rule}"
            remedy = f'{problem.remedy}, or use start = "scratch"'
            raise ConfigError(Problem("start", "champion", rule, remedy))
    return RetrainPlan(
        config=config, champion=champion, model=model, changes=changes, trial=trial, tried=tried
    )


def find_source_changes(config: RunConfig, before: DatasetManifest | None) -> SourceChanges:
    """Compare the config's source with the dataset `before`; None means that everything is new.

    Hashes only files whose size or times changed. Raises `CorpusError` if nothing matches the
    source.
    """
    plan = make_plan(config)
    current = {identity.sha256: file.name for file, identity in plan.identities.by_file.items()}
    earlier = {source.sha256: source.path for source in before.sources} if before else {}
    settings = _find_changed_settings(config, before) if before else ()
    return SourceChanges(
        fingerprint=plan.fingerprint,
        new=tuple(name for sha256, name in current.items() if sha256 not in earlier),
        removed=tuple(name for sha256, name in earlier.items() if sha256 not in current),
        settings=settings,
        known=() if settings else tuple(sha256 for sha256 in current if sha256 in earlier),
    )


def _find_changed_settings(config: RunConfig, before: DatasetManifest) -> tuple[str, ...]:
    data = config.data
    earlier = {
        "text_column": before.text_column,
        "validation_fraction": before.validation_fraction,
        **{name: before.settings.get(name) for name in FILTER_SETTINGS},
    }
    return tuple(
        f"data.{name} is {getattr(data, name) or 'not set'} and was {value or 'not set'}"
        for name, value in earlier.items()
        # A setting at its default may be missing from the manifest.
        if (getattr(data, name) or None) != (value or None)
    )


def comparison_caveats(plan: RetrainPlan) -> list[str]:
    """Return what makes the comparison with the champion incomplete or biased."""
    champion = plan.champion
    if champion is None or plan.is_up_to_date:
        return []
    caveats = []
    if champion.dataset and plan.changes.removed:
        removed = format_names(plan.changes.removed)
        caveats.append(f"{champion} was trained on files that the source no longer has: {removed}")
    if champion.dataset and not champion.dataset_is_local:
        caveats.append(f"the dataset of {champion} is missing: its old slice is not evaluated")
    before = champion.validation_fraction
    if before is not None and plan.config.data.validation_fraction > before:
        caveats.append(
            f"data.validation_fraction was {before}: {champion} was trained on some of the "
            "documents that are held out now, so its loss on the current slice is too low"
        )
    return caveats


def add_source_file(config: RunConfig, path: str) -> RunConfig:
    """Add the file at `path` to data.source, unless the source already covers it. Raises
    `CorpusError` if it does not exist or is not Parquet with the text column."""
    given = path if "://" in path else str(Path(path).expanduser().absolute())
    data = config.data
    try:
        files = find_sources((given,))
        for file in files:
            inspect_parquet(file, RowFilter(data.text_column))
    except CorpusError as error:
        problems = [replace(p, key="path") if p.key == "data.source" else p for p in error.problems]
        raise CorpusError(*problems) from error
    covered = {file.key for file in find_sources(data.source)}
    if all(file.key in covered for file in files):
        return config
    return override_config(config, {"data": {"source": [*data.source, given]}})


def format_names(names: Sequence[str]) -> str:
    """Format the first names, and the number of the others."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more:,} more" if more > 0 else "")


def override_config(config: RunConfig, values: dict[str, dict[str, object]]) -> RunConfig:
    return build_config(merge_overrides(config.model_dump(mode="json"), values))


@task(name="continue-data", task_run_name="continue-data", cache_policy=NO_CACHE)
def continue_data(
    config: RunConfig, dataset: DatasetManifest, changes: SourceChanges, max_steps_limit: int | None
) -> tuple[RunConfig, DatasetManifest]:
    """Return the config with steps and schedule for the new text, and the dataset of that text and
    a share of the known text (gpt.data.continued)."""
    parent = config.run.root / DERIVED_DATASETS
    continued = build_continued_dataset(dataset, changes.known, config.tokens_per_step, parent)
    overrides = build_continuation_overrides(config, continued.train.tokens, max_steps_limit)
    config = override_config(config, overrides)
    text = "new text only" if continued is dataset else continued.notes[-1]
    log_info(f"{config.training.max_steps:,} steps on {continued.folder}: {text}")
    return config, continued
