"""Parquet files for tests of tokenizing, and the ids they must give."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from gpt.config.loading import build_config
from gpt.data.shards import open_shard
from gpt.data.tokenize.chunks import is_validation
from gpt.data.tokenize.pipeline import tokenize_corpus
from gpt.data.tokenize.tokenizer import END_OF_TEXT, load_tokenizer
from gpt.data.tokenize.units import SPLITS

TEXTS = [f"Document {i}: <|endoftext|> naïve 東京 🦙 " + "word " * (i % 7) for i in range(300)]


def make_config(root, source, **data):
    return build_config(
        {
            "run": {"name": "t", "root": str(root)},
            "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8},
            "data": {"source": source, "validation_fraction": 0.1, "workers": 1, **data},
            "training": {"batch_size": 1, "grad_acc": 1, "max_steps": 1},
        }
    )


def write_parquet(path, texts=TEXTS, kind=None, column="text", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = pa.array(texts) if kind is None else pa.array(texts, pa.string()).cast(kind)
    table = pa.table({"id": pa.array(range(len(texts)), pa.int64()), column: values})
    pq.write_table(table, path, **options)
    return str(path)


def tokenize_with_progress(config):
    """Every progress report of `tokenize_corpus`, and its manifest."""
    progress, generator = [], tokenize_corpus(config)
    while True:
        try:
            progress.append(next(generator))
        except StopIteration as stop:
            return progress, stop.value


def build_dataset(root, source, **data):
    return tokenize_with_progress(make_config(root, source, **data))[1]


def reference_ids(texts, fraction=0.1):
    """The ids of both splits, by the simplest loop over tiktoken."""
    splits = {"train": [], "validation": []}
    for text in texts:
        if text:
            split = "validation" if is_validation(text.encode(), fraction) else "train"
            splits[split] += [END_OF_TEXT, *load_tokenizer().encode_ordinary(text)]
    return {name: np.array(ids, dtype="<u2").tobytes() for name, ids in splits.items()}


def stored_ids(manifest):
    """The ids of both splits as they stand in the shards."""
    return {
        name: b"".join(
            open_shard(manifest.folder / s.name, s).tobytes()
            for s in getattr(manifest, name).shards
        )
        for name in SPLITS
    }


def decode_documents(manifest, split):
    ids = np.concatenate([open_shard(manifest.folder / s.name, s) for s in split.shards])
    assert ids[0] == END_OF_TEXT
    documents = np.split(ids, np.flatnonzero(ids == END_OF_TEXT))[1:]
    return [load_tokenizer().decode(piece[1:].tolist()) for piece in documents]


def decode_splits(manifest):
    return tuple(decode_documents(manifest, getattr(manifest, name)) for name in SPLITS)


def decode_all(manifest):
    train, validation = decode_splits(manifest)
    return sorted(train + validation)


AWKWARD_PARTS = st.sampled_from(
    [
        *("'", "'s", "'ll", "'re", " ", "  ", "\n", "\r\n", "\t", "\u3000", "\xa0", "\x1c", "\x85"),
        *("a", "it", "LL", "é", "e\u0301", "ß", "東", "京", "。", "、", "カ", "한", "ก็", "م", "\0"),
        *("1", "23", "²", "Ⅷ", "٣", "-", "--", "_", "<|endoftext|>", "\u2019", "🦙", "\u200d"),
    ]
)
AWKWARD_TEXTS = st.one_of(st.lists(AWKWARD_PARTS, max_size=40).map("".join), st.text(max_size=60))
