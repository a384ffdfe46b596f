"""The summary page, plot and samples of a dataset, and `overnight inspect`, which verifies it."""

import os
import subprocess
import sys

import pytest
from corpus_data import TEXTS, build_dataset, decode_splits, write_parquet

from gpt.data.loader import SequenceDataset
from gpt.data.shards import read_manifest
from gpt.data.summary import (
    bin_document_lengths,
    format_summary,
    read_samples,
    render_summary,
    write_summary,
)
from gpt.errors import DatasetError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("summary")
    source = write_parquet(folder / "a.parquet", [*TEXTS, None, ""])
    return build_dataset(folder / "runs", source, min_length=3)


def inspect(folder):
    return subprocess.run(
        [sys.executable, "-m", "flows.cli.main", "inspect", str(folder), "--samples", "1"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": "."},
    )


def test_the_summary_has_the_totals_of_the_manifest(made):
    text = format_summary(made)
    text_bytes = sum(len(t.encode()) for t in TEXTS)
    tokens = made.train.tokens + made.validation.tokens - len(TEXTS)
    assert f"{text_bytes / tokens:.3f}" in text
    assert f"{made.train.documents:,} documents" in text
    assert "1 null, 1 empty" in text
    assert "min_length = 3" in text
    assert sum(count for _, count in bin_document_lengths(made)) == len(TEXTS)
    assert "## Document lengths" in render_summary(made)


def test_page_and_plot_are_written_beside_the_shards(made):
    files = write_summary(made)
    assert files["document-lengths.png"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert files["summary.md"].read_text() == render_summary(made)
    assert read_manifest(made.folder) == made


def test_samples_are_the_beginnings_of_documents(made):
    train, _ = decode_splits(made)
    assert list(read_samples(made, made.train, 3)) == train[:3]


def test_inspect_and_training_refuse_a_changed_shard(made):
    shown = inspect(made.folder)
    assert shown.returncode == 0, shown.stderr
    assert decode_splits(made)[0][0] in shown.stdout
    path = made.folder / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused = inspect(made.folder)
    assert refused.returncode == 2
    assert "train-00000.bin" in refused.stderr
    assert "Traceback" not in refused.stderr
    with pytest.raises(DatasetError, match=r"train-00000\.bin"):
        SequenceDataset(made, made.train, 8)
