"""Stage 2, tokenize-parquet: the Parquet source as token shards, or the ones made before."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt.artifacts import DatasetManifest
from gpt.config.schema import RunConfig
from gpt.data.store import download_dataset, upload_dataset
from gpt.data.summary import render_summary, write_summary
from gpt.data.tokenize.pipeline import find_dataset, tokenize_corpus
from tasks.cluster.runner import resolve_cluster
from tasks.display import log_info, log_warning, show_tokenizing, show_transfer
from tasks.runtime.prefect_api import publish_markdown


@task(name="tokenize-parquet", task_run_name="tokenize-parquet", cache_policy=NO_CACHE)
def tokenize_parquet(config: RunConfig) -> DatasetManifest:
    """Raises `CorpusError` for a source that cannot be read or holds too little."""
    dataset = find_or_tokenize(config)
    tokens = f"{dataset.train.tokens:,} tokens to train on"
    publish_markdown(f"dataset-{dataset.fingerprint[:16]}", render_summary(dataset), tokens)
    return dataset


def find_or_tokenize(config: RunConfig) -> DatasetManifest:
    """The data set of a config, made or found, with a bar and lines; needs no Prefect run."""
    dataset, verb = find_dataset(config), "already tokenised in"
    if dataset is None and config.data.store:
        dataset, verb = _fetched(config), "fetched into"
    if dataset is None:
        cluster = resolve_cluster(config.data)
        log_info(f"tokenising {', '.join(config.data.source)}")
        dataset, verb = show_tokenizing(tokenize_corpus(config, cluster)), "tokenised into"
    else:
        for note in dataset.notes:
            log_warning(note)
    if dataset.skipped_files:
        log_warning(
            f"{len(dataset.skipped_files)} files were left out; the data set's page names them"
        )
    write_summary(dataset)
    log_info(
        f"{verb} {dataset.folder}: {dataset.train.tokens:,} tokens to train on, "
        f"{dataset.validation.tokens:,} to validate"
    )
    if config.data.store:
        _put(dataset, config.data.store)
    return dataset


def _fetched(config: RunConfig) -> DatasetManifest | None:
    return show_transfer(f"fetching from {config.data.store}", download_dataset(config))


def _put(dataset: DatasetManifest, store: str) -> None:
    if show_transfer(f"putting into {store}", upload_dataset(dataset, store)):
        log_info(f"put into {store}, for other machines")
