"""Describe a dataset: its totals, the lengths of its documents, and sample texts."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt.artifacts import DatasetManifest, Split
from gpt.data.shards import open_shard
from gpt.data.tokenize.tokenizer import END_OF_TEXT, load_tokenizer
from gpt.files import atomic_file, write_text
from gpt.markdown import render_table

PAGE = "summary.md"
PLOT = "document-lengths.png"
SAMPLE_TOKENS = 120


def list_totals(manifest: DatasetManifest) -> dict[str, str]:
    """Return the rows of the summary, by name."""
    train, validation = manifest.train, manifest.validation
    text_bytes = train.text_bytes + validation.text_bytes
    text_tokens = train.tokens + validation.tokens - train.documents - validation.documents
    shards = len(train.shards) + len(validation.shards)
    settings = [f"{key} = {value}" for key, value in manifest.settings.items() if value]
    rows = {
        "dataset": manifest.fingerprint[:16],
        "folder": str(manifest.folder),
        "training": _format_split(train),
        "validation": _format_split(validation),
        "bytes per token": f"{text_bytes / max(1, text_tokens):.3f}",
        "shards": f"{shards}, SHA-256 in the manifest",
        "sources": f"{len(manifest.sources)} files, {sum(s.rows for s in manifest.sources):,} rows",
        "skipped rows": ", ".join(f"{count:,} {why}" for why, count in manifest.skipped.items()),
        "tokenizer": f"{manifest.tokenizer}, by {manifest.engine}",
        "settings": ", ".join(settings),
    }
    for number, file in enumerate(manifest.skipped_files, 1):
        rows[f"skipped file {number}"] = f"{file.path}: {file.reason}"
    for number, note in enumerate(manifest.notes, 1):
        rows[f"note {number}"] = note
    return {name: value for name, value in rows.items() if value}


def _format_split(split: Split) -> str:
    text = f"{split.text_bytes:,} bytes of text"
    return f"{split.tokens:,} tokens, {split.documents:,} documents, {text}"


def bin_document_lengths(manifest: DatasetManifest) -> list[tuple[str, int]]:
    """Return the number of documents per range of token counts, shortest first.

    Each range is twice as wide as the one before.
    """
    bins: list[tuple[str, int]] = []
    for bits, count in enumerate(manifest.document_lengths):
        if count or bins:
            first, last = (1 << bits) // 2, (1 << bits) - 1
            bins.append((f"{first:,} to {last:,}" if last > first else f"{first}", count))
    return bins


def render_summary(manifest: DatasetManifest) -> str:
    """Render the summary as Markdown."""
    totals = render_table(list_totals(manifest).items())
    parts = [f"# Dataset {manifest.fingerprint[:16]}", totals]
    if bins := bin_document_lengths(manifest):
        rows = [(tokens, f"{count:,}") for tokens, count in bins]
        parts += ["## Document lengths", render_table(rows, ("tokens", "documents"))]
    return "\n\n".join(parts) + "\n"


def format_summary(manifest: DatasetManifest) -> str:
    """Format the summary for a terminal."""
    lines = [f"{name:<16} {value}" for name, value in list_totals(manifest).items()]
    if bins := bin_document_lengths(manifest):
        most = max(count for _, count in bins) or 1
        lines.append("document lengths, tokens")
        lines += [f"{name:>24} {count:>10,} {'#' * (count * 40 // most)}" for name, count in bins]
    return "\n".join(lines)


def write_summary(manifest: DatasetManifest) -> dict[str, Path]:
    """Write the page and the plot to the dataset's folder unless they exist; return their paths.

    Returns nothing if the folder is read-only.
    """
    files = {name: manifest.folder / name for name in (PAGE, PLOT)}
    try:
        if not files[PAGE].exists():
            write_text(files[PAGE], render_summary(manifest))
        if not files[PLOT].exists():
            _plot_document_lengths(manifest, files[PLOT])
    except OSError:
        return {}
    return files


def _plot_document_lengths(manifest: DatasetManifest, path: Path) -> None:
    # Without pyplot, which would choose a window system and keep the figure in memory.
    from matplotlib.figure import Figure

    bins = bin_document_lengths(manifest)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(bins)), [count for _, count in bins], width=0.9)
    axes.set_xticks(range(len(bins)), [name for name, _ in bins], rotation=45, ha="right")
    axes.set_xlabel("tokens per document")
    axes.set_ylabel("documents")
    total = manifest.train.documents + manifest.validation.documents
    axes.set_title(f"{total:,} documents")
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def read_samples(manifest: DatasetManifest, split: Split, count: int) -> Iterator[str]:
    """Decode the beginnings of the first `count` documents of a split's first shard."""
    if not split.shards:
        return
    shard = split.shards[0]
    ids = open_shard(manifest.folder / shard.name, shard)
    for start in np.flatnonzero(ids == END_OF_TEXT)[:count].tolist():
        beginning = ids[start + 1 : start + 1 + SAMPLE_TOKENS]
        ends = np.flatnonzero(beginning == END_OF_TEXT)
        document = beginning[: ends[0]] if ends.size else beginning
        yield load_tokenizer().decode(document.tolist())
