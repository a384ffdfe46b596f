"""Stage continue-data: dataset and length of a training from the champion's weights."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.continued import DERIVED_DATASETS, build_continued_dataset
from gpt.data.source_changes import SourceChanges
from gpt.training.continued_pretraining import build_continuation_overrides
from tasks.display import log_info
from tasks.find_changes import override_config


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
