"""Stage 2, tokenize-parquet: the Parquet source as token shards, or the ones made before."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.store import fetch_dataset, put_dataset
from gpt.data.summary import page, write_summary
from gpt.data.tokenize.pipeline import find_dataset, tokenize_corpus
from gpt.data.tokenize.requests import Cluster
from tasks.cluster.runner import cluster_of
from tasks.display import TokenizeDisplay, carry_display, following, tell, tokenize_display, warn
from tasks.runtime.prefect_api import show_page


@task(name="tokenize-parquet", task_run_name="tokenize-parquet", cache_policy=NO_CACHE)
def tokenize_parquet(config: RunConfig) -> DatasetManifest:
    """Raises `CorpusError` for a source that cannot be read or holds too little."""
    dataset = tokenized(config)
    tokens = f"{dataset.train.tokens:,} tokens to train on"
    show_page(f"dataset-{dataset.fingerprint[:16]}", page(dataset), tokens)
    return dataset


def tokenized(config: RunConfig) -> DatasetManifest:
    """The data set of a config, made or found, with a bar and lines; needs no Prefect run."""
    dataset, verb = find_dataset(config), "already tokenised in"
    if dataset is None and config.data.store:
        dataset, verb = _fetched(config), "fetched into"
    if dataset is None:
        cluster = cluster_of(config.data)
        tell(f"tokenising {', '.join(config.data.source)}")
        with tokenize_display() as display:
            dataset, verb = _made(config, cluster, display), "tokenised into"
    else:
        for note in dataset.notes:
            warn(note)
    if dataset.skipped_files:
        warn(f"{len(dataset.skipped_files)} files were left out; the data set's page names them")
    write_summary(dataset)
    tell(
        f"{verb} {dataset.folder}: {dataset.train.tokens:,} tokens to train on, "
        f"{dataset.validation.tokens:,} to validate"
    )
    if config.data.store:
        _put(dataset, config.data.store)
    return dataset


def _fetched(config: RunConfig) -> DatasetManifest | None:
    with carry_display(f"fetching from {config.data.store}") as display:
        return display.following(fetch_dataset(config))


def _put(dataset: DatasetManifest, store: str) -> None:
    with carry_display(f"putting into {store}") as display:
        if display.following(put_dataset(dataset, store)):
            tell(f"put into {store}, for other machines")


def _made(config: RunConfig, cluster: Cluster | None, display: TokenizeDisplay) -> DatasetManifest:
    return following(tokenize_corpus(config, cluster), display.show)
