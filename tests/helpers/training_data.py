"""Small training configs, token datasets to train on, and what a run leaves behind."""

from __future__ import annotations

import dataclasses

import numpy as np

from gpt.artifacts import DatasetManifest, SourceFile, Split
from gpt.config.loading import build_config
from gpt.data.shards import ShardWriter, write_manifest
from gpt.training.checkpoint.retention import latest_checkpoint


def tiny_config(root, **changes):
    raw = {
        "run": {"name": "t", "root": str(root)},
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "dropout": 0.1},
        "data": {"source": "unused.parquet"},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 3},
        "training": {
            "batch_size": 4,
            "grad_acc": 2,
            "max_steps": 20,
            "checkpoint_interval": 10,
            "compile": False,
        },
        "evaluation": {"interval": 10, "tokens": 640, "batch_size": 4},
        "hardware": {"device": "cpu"},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        raw[section][name] = value
    return build_config(raw)


def small_config(root, **changes):
    """As `tiny_config`, with a quarter of the tokens: for tests that train often."""
    return tiny_config(root, **{"model__block_size": 8, "evaluation__tokens": 64, **changes})


def numbers(records):
    """What must be equal in two runs: everything but speed and memory."""
    return [
        dataclasses.replace(record, tokens_per_second=None, peak_memory_bytes=None)
        for record in records
    ]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(latest_checkpoint(folder).folder / "model.safetensors")


def make_token_dataset(
    folder, train_tokens=20_000, validation_tokens=4_000, tokens_per_shard=7_000
):
    """Ids that follow a pattern a small model can learn: a noisy cycle of 50 ids."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = DatasetManifest(
        fingerprint="f" * 64,
        folder=folder,
        tokenizer="gpt2",
        ranks_sha256="0" * 64,
        text_column="text",
        validation_fraction=0.1,
        sources=(SourceFile(path="made/up.parquet", size_bytes=1, sha256="1" * 64, rows=1),),
        train=_split(folder, "train", train_tokens, tokens_per_shard),
        validation=_split(folder, "validation", validation_tokens, tokens_per_shard),
        skipped={},
    )
    write_manifest(manifest)
    return manifest


def _split(folder, name, tokens, tokens_per_shard):
    generator = np.random.default_rng(len(name))
    ids = (np.arange(tokens) * 7) % 50 + 1000
    noise = generator.random(tokens) < 0.1
    ids[noise] = generator.integers(0, 50257, noise.sum())
    with ShardWriter(folder, name, tokens_per_shard) as writer:
        writer.write(ids)
        shards = writer.close()
    return Split(shards=shards, documents=1, tokens=tokens, text_bytes=tokens * 4)
