"""gigatoken: the ids of tiktoken, or a fallback to tiktoken for the whole dataset."""

import logging

import numpy as np
import pytest
from corpus_data import (
    AWKWARD_TEXTS,
    TEXTS,
    build_dataset,
    reference_ids,
    stored_ids,
    write_parquet,
)
from hypothesis import given, settings

from gpt.data.tokenize import chunks, gigatoken_encoder, tokenizer, units
from gpt.data.tokenize.gigatoken_encoder import GigatokenEncoder, spans_to_verify
from gpt.data.tokenize.tokenizer import EncoderMismatchError

ENCODER = GigatokenEncoder()
PLAIN = "Plain English words, one after the other; nothing else is in here. " * 400


@given(AWKWARD_TEXTS.filter(bool))
@settings(max_examples=300, deadline=None)
def test_ids_equal_those_of_tiktoken(text):
    texts = [text.encode(), b"next document", (text * 3).encode()]
    for ours, theirs in zip(ENCODER.encode(texts), tokenizer.encode_texts(texts), strict=True):
        assert np.array_equal(ours, theirs)


@given(AWKWARD_TEXTS.filter(bool))
@settings(max_examples=200, deadline=None)
def test_special_long_and_non_ascii_text_is_verified(text):
    """A span contains each non-ASCII character, each long run and all of a text with `<|`."""
    texts = [PLAIN.encode(), f"{PLAIN[:500]}{text} and {'=' * 140}{PLAIN[:300]}".encode()]
    joined = b"".join(texts)
    edges = np.cumsum([0, *map(len, texts)])
    spans = spans_to_verify(joined, edges)
    covered = np.zeros(len(joined), dtype=bool)
    for start, end in spans.tolist():
        assert not covered[start:end].any()
        assert not any(start < edge < end for edge in edges)
        covered[start:end] = True
    data = np.frombuffer(joined, dtype=np.uint8)
    assert covered[data >= 128].all()
    run = joined.index(b"=" * 140)
    assert covered[run : run + 140].all()
    if "<|" in text:
        assert covered[edges[1] :].all()
    assert covered.sum() >= gigatoken_encoder.SAMPLE_BYTES // 2


class Faulty:
    """gigatoken with a fault: other tokens for the same bytes wherever `marker` occurs."""

    def __init__(self, encoder, marker, ids):
        self.encoder, self.marker, self.ids = encoder, marker, ids

    def encode(self, text):
        pieces = [self.encoder.encode(piece) for piece in text.split(self.marker)]
        fault = np.array(self.ids, dtype=np.uint32)
        return np.concatenate([pieces[0], *(part for p in pieces[1:] for part in (fault, p))])


def letters(text):
    ranks = tokenizer.read_ranks(tokenizer.ranks_folder())
    return [ranks[bytes([byte])] for byte in text]


FAULTS = {
    "special": (b"<|endoftext|>", [50256]),
    "special letter by letter": (b"<|endoftext|>", letters(b"<|endoftext|>")),
    "non-ASCII": ("東京".encode(), letters("東京".encode())),
    "a long run": (b"-" * 140, letters(b"-" * 140)),
    "other bytes": (b"word", [1, 2]),
    "plain words": (b" the", letters(b" the")),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_any_mismatch_falls_back_to_tiktoken_for_the_dataset(tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 3_000)
    monkeypatch.setattr(units, "UNIT_BYTES", 4_000)
    marker, ids = FAULTS[kind]
    fresh = GigatokenEncoder._rebuild

    def faulty(self):
        fresh(self)
        self._encoder = Faulty(self._encoder, marker, ids)

    monkeypatch.setattr(GigatokenEncoder, "_rebuild", faulty)
    texts = [text.replace("東京", "").replace("<|endoftext|>", "") for text in TEXTS]
    texts.insert(250, f"It is {marker.decode()} in here, and the rest is plain.")
    source = write_parquet(tmp_path / "a.parquet", texts, row_group_size=50)
    with caplog.at_level(logging.WARNING):
        dataset = build_dataset(tmp_path / "runs", source, engine="gigatoken")
    assert stored_ids(dataset) == reference_ids(texts)
    assert dataset.engine == "tiktoken"
    assert "gigatoken was replaced" in dataset.notes[0]
    assert dataset.notes[0] in caplog.text
    assert not list((tmp_path / "runs/datasets").glob("*.partial"))


def test_both_engines_write_the_same_shards(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", row_group_size=50)
    fast = build_dataset(tmp_path / "fast", source, engine="gigatoken")
    slow = build_dataset(tmp_path / "slow", source, engine="tiktoken")
    assert (fast.engine, slow.engine) == ("gigatoken", "tiktoken")
    assert fast.train == slow.train
    assert fast.validation == slow.validation
    assert build_dataset(tmp_path / "fast", source, engine="tiktoken") == fast


def test_encoder_is_rebuilt_when_it_has_grown(monkeypatch):
    encoder = GigatokenEncoder()
    first = encoder._encoder
    encoder.encode([b"a"])
    assert encoder._encoder is first
    monkeypatch.setattr(gigatoken_encoder, "REBUILD_TEXT_BYTES", 0)
    encoder.encode([b"b"])
    assert encoder._encoder is not first
    second = encoder._encoder
    monkeypatch.setattr(gigatoken_encoder, "REBUILD_TEXT_BYTES", 10**9)
    monkeypatch.setattr(gigatoken_encoder, "resident_bytes", lambda: 10**12)
    encoder.encode([b"c"])
    assert encoder._encoder is not second


def test_token_across_two_texts_is_detected(monkeypatch):
    class Shifted:
        def __init__(self, encoder):
            self.parts = iter([encoder.encode(b"hello wor"), encoder.encode(b"ld and more")])

        def encode(self, text):
            return next(self.parts)

    encoder = GigatokenEncoder()
    encoder._encoder = Shifted(encoder._encoder)
    with pytest.raises(EncoderMismatchError, match="end where a text does"):
        encoder.encode([b"hello world", b" and more"])
