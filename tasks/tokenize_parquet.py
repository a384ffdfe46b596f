"""Stage 2, tokenize-parquet: the Parquet source as token shards, built now or found."""

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
    """Raises `CorpusError` for a source that cannot be read or holds too little text."""
    dataset = find_or_tokenize(config)
    description = f"{dataset.train.tokens:,} training tokens"
    publish_markdown(f"dataset-{dataset.fingerprint[:16]}", render_summary(dataset), description)
    return dataset


def find_or_tokenize(config: RunConfig) -> DatasetManifest:
    """Find the dataset of a config, download it from data.store, or build it; also uploads it.

    Shows progress; needs no Prefect run.
    """
    store = config.data.store
    dataset, action = find_dataset(config), "found the dataset in"
    if dataset is None and store:
        dataset = show_transfer(f"downloading from {store}", download_dataset(config))
        action = "downloaded the dataset to"
    if dataset is None:
        cluster = resolve_cluster(config.data)
        log_info(f"tokenizing {', '.join(config.data.source)}")
        dataset, action = show_tokenizing(tokenize_corpus(config, cluster)), "tokenized into"
    else:
        for note in dataset.notes:
            log_warning(note)
    if dataset.skipped_files:
        log_warning(
            f"{len(dataset.skipped_files)} files were skipped; the dataset's summary names them"
        )
    write_summary(dataset)
    log_info(
        f"{action} {dataset.folder}: {dataset.train.tokens:,} training tokens, "
        f"{dataset.validation.tokens:,} validation tokens"
    )
    if store and show_transfer(f"uploading to {store}", upload_dataset(dataset, store)):
        log_info(f"uploaded the dataset to {store}")
    return dataset
