"""Small token data sets for tests: real shards and a real manifest, without text."""

import numpy as np

from gpt.artifacts import DatasetManifest, SourceFile, Split
from gpt.data.shards import ShardWriter, write_manifest


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
