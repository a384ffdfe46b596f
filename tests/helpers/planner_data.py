"""A corpus of metadata alone: what the footers of its files would say, and the dataset that
tokenizing would leave, as sparse files."""

import hashlib
from pathlib import Path

import numpy as np

from gpt.artifacts import DatasetManifest, Shard, SourceFile, Split
from gpt.config.loading import build_config
from gpt.data.parquet import ParquetSource
from gpt.data.shards import HEADER_BYTES, TOKEN_BYTES, build_header
from gpt.data.sources import CorpusFile, FileIdentities, FileIdentity
from gpt.data.tokenize.plan import plan_for_files

ROWS = 1_000
"""Per row group, about."""


def digest(number):
    return hashlib.sha256(number.to_bytes(8, "little")).hexdigest()


def sources(files, groups, text_bytes_of_group):
    """Files with `groups` row groups each, of random sizes."""
    for number in range(files):
        chance = np.random.default_rng(number)
        sizes = np.empty((groups, 2), dtype=np.int64)
        sizes[:, 0] = chance.integers(ROWS // 2, ROWS * 2, groups)
        sizes[:, 1] = chance.integers(
            text_bytes_of_group // 2, text_bytes_of_group * 3 // 2, groups
        )
        name = f"corpus/dump-{number // 1000:03d}/part-{number:06d}.parquet"
        yield ParquetSource(CorpusFile(name, key=f"/{name}"), sizes)


def config(root, **data):
    """The smallest config for a plan."""
    return build_config(
        {
            "run": {"name": "planned", "root": str(root)},
            "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 1024},
            "data": {"source": ["corpus"], **data},
            "training": {"batch_size": 1, "grad_acc": 1, "max_steps": 1},
        }
    )


def plan(root, found, **data):
    """The plan for these sources, as if their bytes had been hashed."""
    files = [source.file for source in found]
    identities = FileIdentities((), Path(root) / "hashes.json")
    identities.by_file = {file: FileIdentity("0:0:0", digest(n)) for n, file in enumerate(files)}
    return plan_for_files(config(root, **data), files, identities)


def manifest(folder, found, tokens, tokens_per_shard):
    """The manifest of a dataset with `tokens` training tokens and one validation shard."""
    whole, rest = divmod(tokens, tokens_per_shard)
    sizes = [tokens_per_shard] * whole + ([rest] if rest else [])
    return DatasetManifest(
        fingerprint=digest(tokens),
        folder=folder,
        tokenizer="gpt2",
        ranks_sha256="0" * 64,
        text_column="text",
        validation_fraction=0.001,
        sources=tuple(
            SourceFile(
                path=source.file.name,
                size_bytes=source.text_bytes // 2,
                sha256=digest(n),
                rows=source.rows,
            )
            for n, source in enumerate(found)
        ),
        train=_split("train", sizes),
        validation=_split("validation", [min(tokens, 10_000)]),
        skipped={"null": 0, "empty": 0},
    )


def _split(name, sizes):
    shards = tuple(
        Shard(name=f"{name}-{n:05d}.bin", tokens=size, sha256=digest(n))
        for n, size in enumerate(sizes)
    )
    return Split(shards=shards, documents=1, tokens=sum(sizes), text_bytes=4 * sum(sizes))


def write_sparse_shards(made):
    """Write the shards as sparse files of the right length."""
    for shard in made.train.shards + made.validation.shards:
        with (made.folder / shard.name).open("wb") as file:
            file.truncate(HEADER_BYTES + TOKEN_BYTES * shard.tokens)


def write_ids(made, shard, first_token, ids):
    """Write ids and the header into a sparse shard."""
    with (made.folder / made.train.shards[shard].name).open("r+b") as file:
        file.write(build_header(made.train.shards[shard].tokens))
        file.seek(HEADER_BYTES + TOKEN_BYTES * first_token)
        file.write(np.asarray(ids, dtype="<u2").tobytes())
