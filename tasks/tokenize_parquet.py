"""Stage 2, tokenize-parquet: the Parquet source as token shards, or the ones made before."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import DatasetManifest
from gpt.config import RunConfig
from gpt.data.corpus import find_dataset, tokenize_corpus
from tasks.console import TokenizeDisplay, tell, tokenize_display


@task(name="tokenize-parquet", task_run_name="tokenize-parquet", cache_policy=NO_CACHE)
def tokenize_parquet(config: RunConfig) -> DatasetManifest:
    """Raises `CorpusError` for a source that cannot be read or holds too little."""
    dataset = find_dataset(config)
    if dataset is None:
        tell(f"tokenising {', '.join(config.data.source)}")
        with tokenize_display() as display:
            dataset = _tokenized(config, display)
        verb = "tokenised into"
    else:
        verb = "already tokenised in"
    tell(
        f"{verb} {dataset.folder}: {dataset.train.tokens:,} tokens to train on, "
        f"{dataset.validation.tokens:,} to validate"
    )
    return dataset


def _tokenized(config: RunConfig, display: TokenizeDisplay) -> DatasetManifest:
    steps = tokenize_corpus(config)
    while True:
        try:
            display.show(next(steps))
        except StopIteration as done:
            manifest: DatasetManifest = done.value
            return manifest
