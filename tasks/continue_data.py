"""What a challenger that begins with the champion's weights is trained on, and for how long."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.continued import DERIVED_DATASETS, continuation
from gpt.data.source_changes import SourceChanges
from gpt.training.continued_pretraining import build_continuation_overrides
from tasks.display import log_info
from tasks.find_changes import override_config


@task(name="continue-data", task_run_name="continue-data", cache_policy=NO_CACHE)
def continue_data(
    config: RunConfig, dataset: DatasetManifest, changes: SourceChanges, max_steps_limit: int | None
) -> tuple[RunConfig, DatasetManifest]:
    """The config with the length and the schedule for the new text, and the data set of that text
    and a share of the old (gpt.data.continued)."""
    parent = config.run.root / DERIVED_DATASETS
    made = continuation(dataset, changes.known, config.tokens_per_step, parent)
    going_on = override_config(
        config, build_continuation_overrides(config, made.train.tokens, max_steps_limit)
    )
    what = "all of it, which is new" if made is dataset else made.notes[-1]
    log_info(f"{going_on.training.max_steps:,} steps with {made.folder}, {what}")
    return going_on, made
