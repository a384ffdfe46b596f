"""The commands about data: tokenize, inspect, sample-corpus."""

from pathlib import Path
from typing import Annotated

import typer

from flows.cli.options import ConfigPath, Overrides, resumable
from flows.runtime.environment import prepare
from gpt.config.loading import load_config, merge_overrides

app = typer.Typer(rich_markup_mode=None)


@app.command()
def tokenize(config: ConfigPath, overrides: Overrides = None) -> None:
    """Build the dataset of a config, or find the existing one.

    Re-run the same command to resume.
    """
    checked = load_config(config, merge_overrides({}, overrides or []))
    prepare(checked.run.root)
    from tasks.tokenize_parquet import find_or_tokenize

    with resumable():
        find_or_tokenize(checked)


@app.command()
def inspect(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Folder of a dataset.")],
    count: Annotated[int, typer.Option("--samples", help="Documents to show per split.")] = 2,
) -> None:
    """Verify a dataset's shards; show its summary and samples."""
    from gpt.data.shards import read_manifest, verify_if_changed
    from gpt.data.summary import format_summary, read_samples

    manifest = read_manifest(dataset.parent if dataset.is_file() else dataset)
    verify_if_changed(manifest)
    print(format_summary(manifest))
    for name, split in (("training", manifest.train), ("validation", manifest.validation)):
        for text in read_samples(manifest, split, count):
            print(f"\n--- {name}\n{text}")


@app.command()
def sample_corpus(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Parquet file to write.")],
) -> None:
    """Write a demo corpus from installed Python documentation."""
    from gpt.data.sample_corpus import write_sample_corpus

    path.parent.mkdir(parents=True, exist_ok=True)
    documents, text_bytes = write_sample_corpus(path)
    print(f"{path}: {documents:,} documents, {text_bytes:,} bytes of text")
