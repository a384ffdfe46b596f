"""A data set for people: what is in it, in numbers, in a picture, and in its own words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt.artifacts import DatasetManifest, Split
from gpt.data.shards import open_shard
from gpt.data.tokenize.tokenizer import END_OF_TEXT, load_tokenizer
from gpt.files import PARTIAL, write_text

PAGE = "summary.md"
PICTURE = "document-lengths.png"
SAMPLE_TOKENS = 120


def figures(manifest: DatasetManifest) -> dict[str, str]:
    """The totals, each as text."""
    train, validation = manifest.train, manifest.validation
    text_bytes = train.text_bytes + validation.text_bytes
    documents = train.documents + validation.documents
    text_tokens = train.tokens + validation.tokens - documents
    shards = len(train.shards) + len(validation.shards)
    rows = {
        "data set": manifest.fingerprint[:16],
        "folder": str(manifest.folder),
        "training": _side(train),
        "validation": _side(validation),
        "bytes per token": f"{text_bytes / max(1, text_tokens):.3f}",
        "shards": f"{shards}, SHA-256 in the manifest",
        "sources": f"{len(manifest.sources)} files, {sum(s.rows for s in manifest.sources):,} rows",
        "left out": ", ".join(f"{count:,} {why}" for why, count in manifest.skipped.items()),
        "tokenizer": f"{manifest.tokenizer}, by {manifest.engine}",
    }
    asked = {key: value for key, value in manifest.settings.items() if value}
    if asked:
        rows["settings"] = ", ".join(f"{key} = {value}" for key, value in asked.items())
    for number, file in enumerate(manifest.skipped_files, 1):
        rows[f"file left out {number}"] = f"{file.path}: {file.reason}"
    for number, note in enumerate(manifest.notes, 1):
        rows[f"note {number}"] = note
    return rows


def _side(split: Split) -> str:
    text = f"{split.text_bytes:,} bytes of text"
    return f"{split.tokens:,} tokens, {split.documents:,} documents, {text}"


def lengths(manifest: DatasetManifest) -> list[tuple[str, int]]:
    """Documents by their length in tokens, in powers of two, from the shortest on."""
    bins: list[tuple[str, int]] = []
    for bits, count in enumerate(manifest.document_lengths):
        if not count and not bins:
            continue
        first, last = (1 << bits) // 2, (1 << bits) - 1
        bins.append((f"{first:,} to {last:,}" if last > first else f"{first}", count))
    return bins


def render_summary(manifest: DatasetManifest) -> str:
    """All of it as Markdown."""
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in figures(manifest).items())
    rows = "\n".join(f"| {tokens} | {count:,} |" for tokens, count in lengths(manifest))
    parts = [f"# Data set {manifest.fingerprint[:16]}", f"| | |\n|---|---|\n{table}"]
    if rows:
        parts.append(f"## Document lengths\n\n| tokens | documents |\n|---|---:|\n{rows}")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def write_summary(manifest: DatasetManifest) -> dict[str, Path]:
    """The page and the picture beside the shards, if they are not there; where they lie, by name.

    Nothing where the folder cannot be written.
    """
    files = {name: manifest.folder / name for name in (PAGE, PICTURE)}
    try:
        if not files[PAGE].exists():
            write_text(files[PAGE], render_summary(manifest))
        if not files[PICTURE].exists():
            _draw(manifest, files[PICTURE])
    except OSError:
        return {}
    return files


def _draw(manifest: DatasetManifest, path: Path) -> None:
    # The figure's own canvas: pyplot would choose a window system and keep the figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bins = lengths(manifest)
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.bar(range(len(bins)), [count for _, count in bins], width=0.9)
    axes.set_xticks(range(len(bins)), [name for name, _ in bins], rotation=45, ha="right")
    axes.set_xlabel("tokens in a document")
    axes.set_ylabel("documents")
    total = manifest.train.documents + manifest.validation.documents
    axes.set_title(f"{total:,} documents")
    partial = path.with_name(f".{path.stem}.{os.getpid()}{PARTIAL}")
    figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)


def format_summary(manifest: DatasetManifest) -> str:
    """The figures and the document lengths as lines."""
    lines = [f"{name:<16} {value}" for name, value in figures(manifest).items()]
    bins = lengths(manifest)
    if bins:
        most = max(count for _, count in bins) or 1
        lines.append("document lengths, tokens")
        lines += [f"{name:>24} {count:>10,} {'#' * (count * 40 // most)}" for name, count in bins]
    return "\n".join(lines)


def read_samples(manifest: DatasetManifest, split: Split, count: int) -> Iterator[str]:
    """How the first documents of a split begin, decoded from the first shard."""
    shard = split.shards[0]
    ids = open_shard(manifest.folder / shard.name, shard)
    starts = np.flatnonzero(ids == END_OF_TEXT)[:count]
    for start in starts.tolist():
        beginning = ids[start + 1 : start + 1 + SAMPLE_TOKENS]
        ends = np.flatnonzero(beginning == END_OF_TEXT)
        document = beginning[: ends[0]] if ends.size else beginning
        yield load_tokenizer().decode(document.tolist())
